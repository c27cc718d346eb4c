"""``soft_assign``: entropy and usage of the soft assignment of rows to codes, a softmax over all codes, never N x K.

Contract: rows ``x`` (H, N, D) and ``codes`` (H, K, D), any strides; ``weight`` (H, N) of each row, not negative. With

    score_nk = 2 x_n.c_k - |c_k|^2  if ``squared``: minus the squared distance but for |x_n|^2, the same for all codes
    score_nk = x_n.c_k              otherwise
    p_nk     = exp(score_nk / temperature) / sum_j exp(score_nj / temperature)

it returns, contiguous, in float32 (float64 if ``x`` is) like the arithmetic,

* entropy (H,): sum_n weight_n (-sum_k p_nk log p_nk), in nats
* usage (H, K): sum_n weight_n p_nk

A row of weight 0 counts nowhere, whatever it holds, NaN and Inf included; another row with them, a code with them or a
score / temperature out of range makes the results of its head undefined. Sums are made in an order that depends on the
sizes alone: two runs give the same bits, and native kernels do for any number of threads. Backends may differ in the
last bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.ops._register import register

__all__ = ["soft_assign"]


def _fake(
    x: Tensor, codes: Tensor, weight: Tensor, squared: bool, temperature: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return codes.new_empty(codes.shape[:1], dtype=dtype), codes.new_empty(codes.shape[:2], dtype=dtype)


soft_assign = register(
    "soft_assign",
    "(Tensor x, Tensor codes, Tensor weight, bool squared, float temperature, str backend='auto') -> (Tensor, Tensor)",
    _fake,
)
