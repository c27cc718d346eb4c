"""``soft_assign_grad``: the gradient that reaches rows and codes through a softmax over all codes, never N x K.

Contract: ``x`` (H, N, D), ``codes`` (H, K, D), ``weight`` (H, N), squared, temperature and p_nk as in ``soft_assign``.
Given is what the loss says of its results, ``grad_entropy`` (H,) and ``grad_usage`` (H, K); or of each row's soft code
sum_k p_nk ``values``_k (Shi et al. 2024, "Scalable Image Tokenization with Index Backpropagation Quantization",
eq. 3), ``grad_soft`` (H, N, D) with ``values`` (H, K, D); the first two or the last two may be ``None``, any strides.
With a_nk the sum of what is given of

    grad_usage_k - grad_entropy log p_nk + grad_soft_n.values_k

the gradient of score_nk / temperature is t_nk = weight_n p_nk (a_nk - sum_j p_nj a_nj), and with f = 1 / temperature,
twice that if squared, it returns, contiguous,

* dx (H, N, D) = f sum_k t_nk c_k, in x's dtype; 0 for a row of weight 0, of which nothing is read
* dcodes (H, K, D) = f sum_n t_nk x_n, less f c_k sum_n t_nk if squared, in float32 (float64 if ``x`` is)

Arithmetic, undefined results and the order of sums are those of ``soft_assign``. ``values`` themselves get no gradient
here: where the hard code is what counts, theirs is ``codebook_sum``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.ops._register import register

__all__ = ["soft_assign_grad"]


def _fake(
    x: Tensor,
    codes: Tensor,
    weight: Tensor,
    grad_entropy: Tensor | None,
    grad_usage: Tensor | None,
    grad_soft: Tensor | None,
    values: Tensor | None,
    squared: bool,
    temperature: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), codes.new_empty(codes.shape, dtype=dtype)


soft_assign_grad = register(
    "soft_assign_grad",
    "(Tensor x, Tensor codes, Tensor weight, Tensor? grad_entropy, Tensor? grad_usage, Tensor? grad_soft, "
    "Tensor? values, bool squared, float temperature, str backend='auto') -> (Tensor, Tensor)",
    _fake,
)
