"""Whether indices are codes at all.

Called by the reference backends of the ops that read indices; the native kernels look while they read.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["check"]


def check(op: str, indices: Tensor, num_codes: int) -> None:
    """Every index is -1 or a code. Waits for the device that they are on.

    Raises:
        ValueError: names the first one that is not.
    """
    if indices.numel() and (indices.min() < -1 or indices.max() >= num_codes):
        wrong = indices[(indices < -1) | (indices >= num_codes)][0].item()
        raise ValueError(f"vqkernels: {op}: indices contains {wrong}, expected -1 or a code in [0, {num_codes})")
