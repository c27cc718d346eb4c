"""The softmax over codes in plain PyTorch, a block of rows at a time.

Called by the reference backends of ``soft_assign`` and ``soft_assign_grad``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["arithmetic", "blocks", "log_softmax", "that_count"]

# Elements of the block of scores that is alive at a time (a handful of such arrays at once).
BLOCK_ELEMENTS = 2**20


def arithmetic(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64 rows."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def blocks(x: Tensor, codes: Tensor) -> Iterator[tuple[int, slice]]:
    """(head, rows) pairs: so many rows (H, N, D) at a time that their scores for all codes are few."""
    step = max(1, BLOCK_ELEMENTS // codes.shape[1])
    return ((h, slice(i, i + step)) for h in range(x.shape[0]) for i in range(0, x.shape[1], step))


def that_count(x: Tensor, weight: Tensor) -> Tensor:
    """Rows (n, D), in the dtype of their weights (n,), dense; zeros where the weight is 0."""
    return torch.where(weight[:, None] != 0, x.to(weight.dtype), 0.0).contiguous()


def log_softmax(x: Tensor, codes: Tensor, squared: bool, temperature: float) -> Tensor:
    """log p (n, K) of rows (n, D) and codes (K, D), both in the dtype of the arithmetic."""
    score = torch.addmm(-codes.square().sum(1), x, codes.T, alpha=2.0) if squared else x @ codes.T
    return score.div_(temperature).log_softmax(1)
