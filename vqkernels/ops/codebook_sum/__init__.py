"""``codebook_sum``: per code, the sum and the number of the rows that chose it, deterministically.

Contract: ``x`` (H, B, S, D) any strides, ``indices`` (H, B, S) int64 in [-1, K); index -1 is skipped. Returns sums
(H, K, D) float32 (float64 for float64 ``x``) and counts (H, K) float32, contiguous. Bit-identical from run to run and
for any number of threads: rows of a code are added in ascending order within fixed chunks of ``CHUNK`` rows counted
from the code's first row, then the chunk sums are added in order. Exact for counts up to 2^24 per code. Different
backends may differ in the last bits of the sums (their error is bounded by the chunked sum's, tests/ops).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.ops._register import register

__all__ = ["CHUNK", "codebook_sum"]

CHUNK = 256


def _fake(x: Tensor, indices: Tensor, num_codes: int, backend: str = "auto") -> tuple[Tensor, Tensor]:
    h, d = x.shape[-4], x.shape[-1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((h, num_codes, d), dtype=dtype), x.new_empty((h, num_codes), dtype=torch.float32)


codebook_sum = register(
    "codebook_sum",
    "(Tensor x, Tensor indices, SymInt num_codes, str backend='auto') -> (Tensor, Tensor)",
    _fake,
)
