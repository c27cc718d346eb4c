"""``quantize_output`` composed: the native gather, and torch's sums over rows that are in cache anyway.

Called by ``dispatch``. The search has measured the distances in the common case, so what is left to fuse is a sum of N
numbers: a kernel of its own would gain nothing on a CPU.
"""

from __future__ import annotations

from torch import Tensor

from vqkernels.ops.lookup import native as lookup
from vqkernels.ops.quantize_output import reference


def supports(
    z: Tensor, codebook: Tensor, indices: Tensor, distance: Tensor | None, masked: bool, channel_first: bool
) -> str | None:
    """What the native ``lookup`` can gather."""
    return lookup.supports(codebook, indices, channel_first, z.dtype)


def run(
    z: Tensor, codebook: Tensor, indices: Tensor, distance: Tensor | None, masked: bool, channel_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same sums as the reference, to the bit."""
    return reference._with(lookup.run, z, codebook, indices, distance, masked, channel_first)
