"""``lookup`` on the kernels of csrc/cpu/lookup.cpp and csrc/cuda/lookup.cu.

Called by ``dispatch``.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vqkernels import _cuda, _native


def supports(codebook: Tensor, indices: Tensor, channel_first: bool, dtype: torch.dtype | None) -> str | None:
    """Every shape and stride; float32, float64, float16 and bfloat16 on either side."""
    for what in (codebook.dtype, dtype or codebook.dtype):
        if what not in _native.DTYPES:
            return f"dtype {what} is not one of float32, float64, float16, bfloat16"
    return _cuda.unsupported(codebook)


def run(codebook: Tensor, indices: Tensor, channel_first: bool, dtype: torch.dtype | None) -> Tensor:
    """Gather straight into the layout and dtype that were asked for."""
    (h, b, s), d = indices.shape, codebook.shape[2]
    shape = (h, b, d, s) if channel_first else (h, b, s, d)
    out = torch.empty(shape, dtype=dtype or codebook.dtype, device=codebook.device)
    if out.numel() == 0:
        return out
    indices = indices.contiguous()
    codes, rows = _native.codes(codebook), _native.rows(out.transpose(2, 3) if channel_first else out)
    if _cuda.serves(codebook):
        arguments = (ctypes.byref(codes), indices.data_ptr(), ctypes.byref(rows), *_cuda.stream(codebook))
        with _cuda.on_device(codebook):
            _cuda.check(_cuda.lib().vqk_cuda_lookup(*arguments))
        return out
    _native.check(_native.lib().vqk_cpu_lookup(ctypes.byref(codes), indices.data_ptr(), ctypes.byref(rows)))
    return out
