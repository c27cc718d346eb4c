"""``codebook_sum`` on the C++ kernel of csrc/cpu/codebook_sum.cpp: counting sort, then chunked sums.

Called by ``dispatch``.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vqkernels import _native


def supports(x: Tensor, indices: Tensor, num_codes: int) -> str | None:
    """Every shape and stride; float32, float64, float16 and bfloat16; row ids are 32-bit."""
    if x.dtype not in _native.DTYPES:
        return f"dtype {x.dtype} is not one of float32, float64, float16, bfloat16"
    if indices.numel() >= 2**31:
        return f"{indices.numel()} rows; native row ids are 32-bit"
    return None


def run(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """The library fills both results, zeros of unused codes included."""
    h, d = x.shape[0], x.shape[3]
    sums = torch.empty((h, num_codes, d), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    counts = torch.empty((h, num_codes), dtype=torch.float32)
    if counts.numel() == 0:
        return sums, counts
    indices = indices.contiguous()
    rows = _native.rows(x)
    _native.check(
        _native.lib().vqk_cpu_codebook_sum(
            ctypes.byref(rows),
            _native.int64_pointer(indices),
            num_codes,
            sums.data_ptr(),
            _native.float_pointer(counts),
        )
    )
    return sums, counts
