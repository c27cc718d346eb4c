"""``residual_nearest``: the nearest code of every level, each level searching what the ones before it left over.

Contract (every backend gives the same bits, those of ``nearest`` and ``lookup`` called level by level):

* ``x`` (H, B, S, D) any strides, ``codebooks`` Q >= 1 tensors (H, K_q, D) any strides, K_q >= 1; float32/float64/
  float16/bfloat16 each. Sizes K_q may differ.
* Everything between the levels is in one dtype: float64 for float64 ``x``, else float32. The first residual is ``x``
  itself, the sum starts at zero; level q searches its residual exactly as ``nearest`` with metric "l2" does, then
  residual = residual - code and sum = sum + code, each rounded once per level, in this order.
* ``indices`` (Q, H, B, S) int64 and ``score`` (Q, H, B, S) float32, contiguous; the score is the squared distance of a
  level's residual to its code.
* ``values`` the sums, contiguous (H, B, S, D), or (H, B, D, S) with ``channel_first=True``.
* NaN as in ``nearest``: a residual that nothing can win takes index 0, at this level and at those after it.
* Memory beyond inputs and outputs: O(N*D + sum of K_q*D), never N x K, never N x D per level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vqkernels.ops._register import register

__all__ = ["residual_nearest"]


def _fake(
    x: Tensor, codebooks: Sequence[Tensor], channel_first: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    h, b, s, d = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    levels = len(codebooks)
    return (
        x.new_empty((levels, h, b, s), dtype=torch.int64),
        x.new_empty((h, b, d, s) if channel_first else (h, b, s, d), dtype=dtype),
        x.new_empty((levels, h, b, s), dtype=torch.float32),
    )


residual_nearest = register(
    "residual_nearest",
    "(Tensor x, Tensor[] codebooks, bool channel_first=False, str backend='auto') -> (Tensor, Tensor, Tensor)",
    _fake,
)
