"""``quantize_output``: what a quantizer returns once the codes are chosen - values and both losses, in one pass.

Contract: ``z`` (H, B, S, D) any strides, ``codebook`` (H, K, D) any strides, ``indices`` (H, B, S) int64 in [-1, K),
-1 where a row must not count (``masked`` says whether there may be any). ``distance`` (H, B, S) float32 is |z - e|^2
per row where a search has measured it already, else ``None``. Returns

* quantized (H, B, S, D) in z's dtype, contiguous, or contiguous (H, B, D, S) with ``channel_first=True``: the codes
  themselves, zeros where the index is -1 (as ``lookup``)
* codebook loss and commitment loss, 0-d, float32 (float64 if ``z`` is): both the mean of |z - e|^2 per element of the
  rows that count, 0 if there are none; two tensors, because their gradients go different ways
* weight, 0-d float64: 1 / (number of those elements), at least 1 of them, for the backward pass

The sum is taken in float64 in an order that depends on the sizes alone: two runs give the same bits. Backends may
differ in the last bits of the losses. On devices that have no float64, sum and weight are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels import _devices
from vqkernels.ops._register import register

__all__ = ["quantize_output"]


def _fake(
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    distance: Tensor | None,
    masked: bool = True,
    channel_first: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, b, s, d = z.shape[-4:]
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return (
        z.new_empty((h, b, d, s) if channel_first else (h, b, s, d)),
        z.new_empty((), dtype=dtype),
        z.new_empty((), dtype=dtype),
        z.new_empty((), dtype=_devices.widest(z.device)),
    )


quantize_output = register(
    "quantize_output",
    "(Tensor z, Tensor codebook, Tensor indices, Tensor? distance, bool masked=True, bool channel_first=False, "
    "str backend='auto') -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
