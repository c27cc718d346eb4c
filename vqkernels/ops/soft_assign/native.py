"""``soft_assign`` on the kernels of csrc/cpu/soft_assign*.cpp: scores, exponentials and sums by blocks of rows.

Called by ``dispatch``.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vqkernels import _native


def supports(x: Tensor, codes: Tensor, weight: Tensor, squared: bool, temperature: float) -> str | None:
    """Every shape and stride on CPUs; rows in float32, float16 and bfloat16, codes in float64 too."""
    if not x.is_cpu:
        return f"no native kernels for {x.device.type} devices"
    if x.dtype == torch.float64 or x.dtype not in _native.DTYPES:
        return f"x is {x.dtype}, not one of float32, float16, bfloat16"
    return None if codes.dtype in _native.DTYPES else f"codes is {codes.dtype}, not a floating dtype of the kernels"


def describe(x: Tensor, codes: Tensor, weight: Tensor, squared: bool, temperature: float) -> str:
    """Instruction set and threads."""
    return f"{_native.ISAS[min(_native.isa(), 2)]} kernels, {torch.get_num_threads()} threads"


def run(x: Tensor, codes: Tensor, weight: Tensor, squared: bool, temperature: float) -> tuple[Tensor, Tensor]:
    """The library fills both results."""
    entropy = torch.empty(codes.shape[:1], dtype=torch.float32)
    usage = torch.empty(codes.shape[:2], dtype=torch.float32)
    weight = weight.to(torch.float32).contiguous()
    rows, given = _native.rows(x.unsqueeze(1)), _native.codes(codes)
    _native.check(
        _native.lib().vqk_cpu_soft_assign(
            ctypes.byref(rows),
            ctypes.byref(given),
            weight.data_ptr(),
            int(squared),
            temperature,
            _native.isa(),
            entropy.data_ptr(),
            usage.data_ptr(),
        )
    )
    return entropy, usage
