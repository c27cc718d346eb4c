"""``quantize_output`` in pure PyTorch: a gather, then a sum over chunks of rows. Any device, any strides.

Called by ``dispatch``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels import _devices
from vqkernels.ops.lookup import reference as lookup

# Elements that a pass over both operands may hold at a time.
CHUNK_ELEMENTS = 2**20


def supports(
    z: Tensor, codebook: Tensor, indices: Tensor, distance: Tensor | None, masked: bool, channel_first: bool
) -> str | None:
    """Everything."""
    return None


def run(
    z: Tensor, codebook: Tensor, indices: Tensor, distance: Tensor | None, masked: bool, channel_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the contract in the package docstring."""
    quantized = lookup.run(codebook, indices, channel_first, z.dtype)
    widest = _devices.widest(z.device)
    if masked:
        elements = (indices >= 0).sum(dtype=widest) * z.shape[-1]
        weight = elements.clamp(min=1.0).reciprocal()
    else:
        weight = torch.full((), 1.0 / max(z.numel(), 1), dtype=widest, device=z.device)
    if distance is None:
        # A half-precision output has lost digits of the codes: compare with the codes themselves.
        wide = quantized.dtype == codebook.dtype or quantized.dtype == torch.float64
        values = quantized if wide else lookup.run(codebook, indices, channel_first, codebook.dtype)
        total = _squared_error(z, values.transpose(-1, -2) if channel_first else values, indices)
    else:
        total = (torch.where(indices >= 0, distance, 0.0) if masked else distance).sum(dtype=widest)
    loss = (total * weight).to(torch.float64 if z.dtype == torch.float64 else torch.float32)
    return quantized, loss, loss.clone(), weight


def _squared_error(z: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """Sum of |z - e|^2 over the rows that have a code, in the widest dtype there is, without an N x D temporary."""
    h, b, s, d = z.shape
    if z.numel() <= CHUNK_ELEMENTS:
        return _chunk_error(z, values, indices)
    step = max(1, CHUNK_ELEMENTS // (h * b * d))
    total = torch.zeros((), dtype=_devices.widest(z.device), device=z.device)
    for i in range(0, s, step):
        total += _chunk_error(z[:, :, i : i + step], values[:, :, i : i + step], indices[:, :, i : i + step])
    return total


def _chunk_error(z: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    error = (z.to(dtype) - values.to(dtype)).square().sum(-1)
    return torch.where(indices >= 0, error, 0.0).sum(dtype=_devices.widest(z.device))
