"""``codebook_sum`` on the kernels of csrc/cpu/codebook_sum.cpp and csrc/cuda/codebook_sum.cu: sort, then chunked sums.

Called by ``dispatch``.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vqkernels import _cuda, _native


def supports(x: Tensor, indices: Tensor, num_codes: int) -> str | None:
    """Every shape and stride; float32, float64, float16 and bfloat16; row ids are 32-bit."""
    if x.dtype not in _native.DTYPES:
        return f"dtype {x.dtype} is not one of float32, float64, float16, bfloat16"
    if indices.numel() >= 2**31:
        return f"{indices.numel()} rows; native row ids are 32-bit"
    return _cuda.unsupported(x)


def run(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """The library fills both results, zeros of unused codes included."""
    h, d = x.shape[0], x.shape[3]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = torch.empty((h, num_codes, d), dtype=dtype, device=x.device)
    counts = torch.empty((h, num_codes), dtype=torch.float32, device=x.device)
    if counts.numel() == 0:
        return sums, counts
    indices = indices.contiguous()
    rows = _native.rows(x)
    if _cuda.serves(x):
        lib = _cuda.lib()
        workspace = _cuda.workspace(x, lib.vqk_cuda_codebook_sum_workspace(ctypes.byref(rows), num_codes))
        with _cuda.on_device(x):
            _cuda.check(
                lib.vqk_cuda_codebook_sum(
                    ctypes.byref(rows),
                    indices.data_ptr(),
                    num_codes,
                    sums.data_ptr(),
                    counts.data_ptr(),
                    workspace.data_ptr(),
                    *_cuda.stream(x),
                )
            )
        return sums, counts
    _native.check(
        _native.lib().vqk_cpu_codebook_sum(
            ctypes.byref(rows),
            indices.data_ptr(),
            num_codes,
            sums.data_ptr(),
            counts.data_ptr(),
        )
    )
    return sums, counts
