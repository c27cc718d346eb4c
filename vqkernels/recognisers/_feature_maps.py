"""A feature map against a codebook, where it lies: what the image quantizers of several libraries have in common.

Called by the families beside this file; calls :mod:`vqkernels.functional`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqkernels._arguments import autocast_dtype
from vqkernels.functional import vector_quantize

__all__ = ["QuantizedMap", "average_dtype", "check_map", "quantize_map"]


class QuantizedMap(NamedTuple):
    """``quantized`` (B, C, ...) with the straight-through gradient, ``indices`` (B * S,), and the two mean errors."""

    quantized: Tensor
    indices: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


def check_map(z: Tensor, codebook: Tensor, dims: int = 4, channels: int = 1) -> None:
    """``z`` has ``dims`` dims, and in dim ``channels`` as many entries as a code.

    The originals flatten first: with another number of channels they raise an error about something else, or none.
    """
    size = codebook.shape[-1]
    if z.dim() != dims or z.shape[channels] != size:
        names = [("B", "C", "L"), ("B", "C", "H", "W"), ("B", "T", "C", "H", "W")][dims - 3]
        wanted = ", ".join(str(size) if i == channels else name for i, name in enumerate(names))
        raise ValueError(f"the quantizer's input has shape {tuple(z.shape)}; expected ({wanted})")


def quantize_map(z: Tensor, codebook: Tensor, dims: int = 4) -> QuantizedMap:
    """Nearest codes by L2 of a map (B, C, ...), channels second; losses and result in the dtypes of the usual code.

    The usual code is ``z + (e - z).detach()`` with ``mean((e - z)^2)`` of each side detached: it promotes a
    half-precision map to the dtype of the codes, and averages in that dtype.
    """
    check_map(z, codebook, dims)
    z = z.to(torch.promote_types(z.dtype, codebook.dtype))
    out = vector_quantize(z.movedim(1, -1), codebook)
    dtype = average_dtype(z)
    return QuantizedMap(
        out.quantized.movedim(-1, 1).contiguous(),
        out.indices.reshape(-1),
        out.codebook_loss.to(dtype),
        out.commitment_loss.to(dtype),
    )


def average_dtype(z: Tensor) -> torch.dtype:
    """What ``torch.mean(z ** 2)`` has: CUDA's autocast computes powers in float32, the CPU's leaves them alone."""
    half = z.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and z.device.type != "cpu" and autocast_dtype(z) is not None else z.dtype
