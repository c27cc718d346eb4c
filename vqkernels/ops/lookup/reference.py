"""``lookup`` in pure PyTorch: any device, any strides. The fallback, and written to be read.

Called by ``dispatch``. Rows go through in blocks, so that beyond the output only one block is alive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels import _indices

# Elements that a block of rows may hold at a time: 64 MB in float32, whatever N and D are.
BLOCK_ELEMENTS = 2**24


def supports(codebook: Tensor, indices: Tensor, channel_first: bool, dtype: torch.dtype | None) -> str | None:
    """Everything."""
    return None


def run(codebook: Tensor, indices: Tensor, channel_first: bool, dtype: torch.dtype | None) -> Tensor:
    """See the contract in the package docstring; on GPUs an index out of range is a device-side assertion."""
    (h, b, s), (k, d) = indices.shape, codebook.shape[1:]
    if indices.device.type == "cpu":
        _indices.check("lookup", indices, k)
    out = torch.empty(
        (h, b, d, s) if channel_first else (h, b, s, d), dtype=dtype or codebook.dtype, device=codebook.device
    )
    rows = out.transpose(2, 3) if channel_first else out
    step = max(1, BLOCK_ELEMENTS // max(d, 1))
    for begin in range(0, indices.numel(), step):
        row = torch.arange(begin, min(begin + step, indices.numel()), device=indices.device)
        head, item, position = row // (b * s), row // s % b, row % s
        index = indices[head, item, position]
        values = codebook[head, index.clamp(min=0)].masked_fill((index < 0)[:, None], 0)
        rows[head, item, position] = values.to(out.dtype)
    return out
