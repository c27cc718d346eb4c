"""``nearest``: for every row the index of the nearest code, exactly, lowest index on ties.

Contract (every backend gives the same bits):

* ``x`` (H, B, S, D) any strides, ``codebook`` (H, K, D) any strides, K >= 1; float32/float64/float16/bfloat16 each.
* ``indices`` (H, B, S) int64: the code whose distance, evaluated in float64 from the given values, is smallest.
  The evaluation is fixed: ``d`` ascending, one subtraction, one product and one sum per dim, no fused multiply-add
  - ``l2``      sum_d (x_d - e_d)^2, smallest
  - ``cosine``  (sum_d x_d e_d) / sqrt(sum_d e_d^2), largest; a code of zeros has similarity 0
  - ``dot``     sum_d x_d e_d, largest
* ``score`` (H, B, S) float32: that value, rounded once.
* NaN never wins, and neither does an infinite distance (``l2``) or a similarity of -inf. A row where nothing can win
  (a NaN in the row, say) gets index 0 and the score of code 0. Other rows are not affected.
* ``precision="fast"``: no certificate; the result is a code whose screened score is within rounding of the best.
* Memory beyond inputs and outputs: O(N + K*D), never N x K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.ops._register import register

__all__ = ["METRICS", "nearest"]

METRICS = ("l2", "cosine", "dot")


def _fake(
    x: Tensor, codebook: Tensor, metric: str = "l2", precision: str = "exact", backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    shape = x.shape[:-1]
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=torch.float32)


nearest = register(
    "nearest",
    "(Tensor x, Tensor codebook, str metric='l2', str precision='exact', str backend='auto') -> (Tensor, Tensor)",
    _fake,
)
