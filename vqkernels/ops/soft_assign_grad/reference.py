"""``soft_assign_grad`` in pure PyTorch: any device, any strides. The fallback, and written to be read.

Called by ``dispatch``. Makes each block's softmax again: nothing of it was kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels import _softmax


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
    """Everything."""
    return None


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
    """See the contract in the package docstring."""
    dtype = _softmax.arithmetic(x)
    codes = codes.to(dtype).contiguous()
    values = None if values is None else values.to(dtype).contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dcodes = torch.zeros(codes.shape, dtype=dtype, device=x.device)
    factor = (2.0 if squared else 1.0) / temperature
    with torch.autocast(x.device.type, enabled=False):
        for head, block in _softmax.blocks(x, codes):
            w = weight[head, block].to(dtype)
            rows = _softmax.that_count(x[head, block], w)
            log_p = _softmax.log_softmax(rows, codes[head], squared, temperature)
            p = log_p.exp()
            a = torch.zeros_like(p)  # what the loss says of p, up to a constant per row
            if grad_soft is not None and values is not None:
                a += _softmax.that_count(grad_soft[head, block], w) @ values[head].T
            if grad_usage is not None:
                a += grad_usage[head].to(dtype)
            if grad_entropy is not None:
                a -= grad_entropy[head].to(dtype) * log_p
            t = p.mul_(a.sub_((p * a).sum(1, keepdim=True))).mul_(w[:, None])
            dx[head, block] = (factor * (t @ codes[head])).to(x.dtype)
            dcodes[head] += factor * (t.T @ rows)
            if squared:
                dcodes[head] -= factor * t.sum(0)[:, None] * codes[head]
    return dx, dcodes
