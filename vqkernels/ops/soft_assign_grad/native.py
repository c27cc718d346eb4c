"""``soft_assign_grad`` on the kernels of csrc/cpu/soft_assign*.cpp: a block's scores once, then both sums over them.

Called by ``dispatch``.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vqkernels import _native
from vqkernels.ops.soft_assign import native as forward


def supports(
    x: Tensor,
    codes: Tensor,
    weight: Tensor,
    grad_entropy: Tensor | None,
    grad_usage: Tensor | None,
    grad_soft: Tensor | None,
    values: Tensor | None,
    squared: bool,
    temperature: float,
) -> str | None:
    """As ``soft_assign``."""
    for name, tensor in (("grad_soft", grad_soft), ("values", values)):
        if tensor is not None and tensor.dtype not in _native.DTYPES:
            return f"{name} is {tensor.dtype}, not a floating dtype of the kernels"
    return forward.supports(x, codes, weight, squared, temperature)


def describe(
    x: Tensor,
    codes: Tensor,
    weight: Tensor,
    grad_entropy: Tensor | None,
    grad_usage: Tensor | None,
    grad_soft: Tensor | None,
    values: Tensor | None,
    squared: bool,
    temperature: float,
) -> str:
    """Instruction set and threads."""
    return forward.describe(x, codes, weight, squared, temperature)


def run(
    x: Tensor,
    codes: Tensor,
    weight: Tensor,
    grad_entropy: Tensor | None,
    grad_usage: Tensor | None,
    grad_soft: Tensor | None,
    values: Tensor | None,
    squared: bool,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The library fills both results."""
    dx = torch.empty(x.shape, dtype=x.dtype)
    dcodes = torch.empty(codes.shape, dtype=torch.float32)
    weight = weight.to(torch.float32).contiguous()
    entropy, usage = (None if t is None else t.to(torch.float32).contiguous() for t in (grad_entropy, grad_usage))
    rows, given, result = _native.rows(x.unsqueeze(1)), _native.codes(codes), _native.rows(dx.unsqueeze(1))
    soft, mixed = None, None
    if grad_soft is not None and values is not None:
        soft, mixed = _native.rows(grad_soft.unsqueeze(1)), _native.codes(values)
    _native.check(
        _native.lib().vqk_cpu_soft_assign_grad(
            ctypes.byref(rows),
            ctypes.byref(given),
            weight.data_ptr(),
            None if entropy is None else entropy.data_ptr(),
            None if usage is None else usage.data_ptr(),
            None if soft is None else ctypes.byref(soft),
            None if mixed is None else ctypes.byref(mixed),
            int(squared),
            temperature,
            _native.isa(),
            ctypes.byref(result),
            dcodes.data_ptr(),
        )
    )
    return dx, dcodes
