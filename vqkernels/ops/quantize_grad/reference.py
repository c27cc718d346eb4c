"""``quantize_grad`` in pure PyTorch: any device, any strides. The fallback, and written to be read.

Called by ``dispatch``. Rows go through in blocks, so that beyond the output only one block is alive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels import _indices

# Elements that a block of rows may hold at a time: 16 MB in float32, for each of a handful of temporaries.
BLOCK_ELEMENTS = 2**22
# Norms below this are taken to be this (Fifty et al. 2024, the authors' implementation).
SMALLEST_NORM = 1e-6


def supports(
    grad: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    commitment: Tensor,
    gradient: str,
    channel_first: bool,
) -> str | None:
    """Everything."""
    return None


def run(
    grad: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    commitment: Tensor,
    gradient: str,
    channel_first: bool,
) -> Tensor:
    """See the contract in the package docstring."""
    if indices.device.type == "cpu":
        _indices.check("quantize_grad", indices, codebook.shape[1])
    h, b, s, d = z.shape
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    out = torch.empty((h, b, d, s) if channel_first else (h, b, s, d), dtype=z.dtype, device=z.device)
    rows = out.transpose(2, 3) if channel_first else out
    c = commitment.to(device=z.device, dtype=dtype)
    step = max(1, BLOCK_ELEMENTS // max(d, 1))
    for begin in range(0, indices.numel(), step):
        row = torch.arange(begin, min(begin + step, indices.numel()), device=z.device)
        at = row // (b * s), row // s % b, row % s
        index = indices[at]
        part = z[at].to(dtype)
        code = codebook[at[0], index.clamp(min=0)].to(dtype)
        dz = c * (part - code)
        if gradient == "straight_through":
            dz = grad[at].to(dtype) + dz
        elif gradient == "rotation":
            dz = _rotate_back(grad[at].to(dtype), part, code) + dz
        rows[at] = dz.masked_fill((index < 0)[:, None], 0).to(z.dtype)
    return out


def _rotate_back(g: Tensor, z: Tensor, e: Tensor) -> Tensor:
    """Transpose of the map that takes ``z`` onto ``e`` by one rotation and one scaling, applied to ``g`` (N, D)."""
    z_norm = z.norm(dim=1, keepdim=True).clamp(min=SMALLEST_NORM)
    e_norm = e.norm(dim=1, keepdim=True).clamp(min=SMALLEST_NORM)
    z_unit, e_unit = z / z_norm, e / e_norm
    w = z_unit + e_unit
    w = w / w.norm(dim=1, keepdim=True).clamp(min=SMALLEST_NORM)
    reflected = g - 2 * (g * w).sum(1, keepdim=True) * w + 2 * (g * e_unit).sum(1, keepdim=True) * z_unit
    rotated: Tensor = e_norm / z_norm * reflected
    return rotated
