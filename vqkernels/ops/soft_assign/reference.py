"""``soft_assign`` in pure PyTorch: any device, any strides. The fallback, and written to be read.

Called by ``dispatch``. Rows go through in blocks, so that only one block of scores is alive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels import _softmax


def supports(x: Tensor, codes: Tensor, weight: Tensor, squared: bool, temperature: float) -> str | None:
    """Everything."""
    return None


def run(x: Tensor, codes: Tensor, weight: Tensor, squared: bool, temperature: float) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    dtype = _softmax.arithmetic(x)
    codes = codes.to(dtype).contiguous()
    entropy = torch.zeros(codes.shape[:1], dtype=dtype, device=x.device)
    usage = torch.zeros(codes.shape[:2], dtype=dtype, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for head, block in _softmax.blocks(x, codes):
            w = weight[head, block].to(dtype)
            log_p = _softmax.log_softmax(_softmax.that_count(x[head, block], w), codes[head], squared, temperature)
            p = log_p.exp()
            entropy[head] -= w @ (p * log_p).sum(1)
            usage[head] += w @ p
    return entropy, usage
