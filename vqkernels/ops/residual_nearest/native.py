"""``residual_nearest`` on the kernels of csrc/cuda.

Called by ``dispatch``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vqkernels import _cuda, _cuda_residual


def supports(x: Tensor, codebooks: Sequence[Tensor], channel_first: bool) -> str | None:
    """What the CUDA kernels take; there are none for the CPU."""
    if not _cuda.serves(x):
        return "no kernels for the CPU"
    return _cuda_residual.supports(x, codebooks)


def describe(x: Tensor, codebooks: Sequence[Tensor], channel_first: bool) -> str:
    """What :func:`vqkernels.explain` adds to "chosen"."""
    return _cuda_residual.describe(x, codebooks)


def run(x: Tensor, codebooks: Sequence[Tensor], channel_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """All levels."""
    return _cuda_residual.run(x, codebooks, channel_first)
