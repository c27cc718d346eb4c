"""``residual_nearest`` in pure PyTorch: the definition, level by level.

Called by ``dispatch``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vqkernels.ops.lookup import reference as lookup
from vqkernels.ops.nearest import reference as nearest


def supports(x: Tensor, codebooks: Sequence[Tensor], channel_first: bool) -> str | None:
    """Everything."""
    return None


def run(x: Tensor, codebooks: Sequence[Tensor], channel_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See the contract in the package docstring."""
    h, b, s, d = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    indices = torch.empty((len(codebooks), h, b, s), dtype=torch.int64, device=x.device)
    score = torch.empty((len(codebooks), h, b, s), dtype=torch.float32, device=x.device)
    values = torch.zeros((h, b, d, s) if channel_first else (h, b, s, d), dtype=dtype, device=x.device)
    rows = values.transpose(2, 3) if channel_first else values
    residual = x.to(dtype)
    for level, codebook in enumerate(codebooks):
        indices[level], score[level] = nearest.run(residual, codebook, "l2", "exact")
        chosen = lookup.run(codebook, indices[level], False, dtype)
        residual = residual - chosen
        rows += chosen
    return indices, values, score
