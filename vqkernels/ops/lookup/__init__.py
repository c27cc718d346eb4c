"""``lookup``: gather codes by index.

Contract: ``codebook`` (H, K, D) any strides, ``indices`` (H, B, S) int64 in [-1, K). Returns values (H, B, S, D) in
the codebook's dtype (or ``dtype``), contiguous, or as contiguous (H, B, D, S) with ``channel_first=True``. Index -1
("no code": a masked row, a dropped residual level) gives zeros. An index outside [-1, K) is an error on CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.ops._register import register

__all__ = ["lookup"]


def _fake(
    codebook: Tensor,
    indices: Tensor,
    channel_first: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    h, b, s = indices.shape
    d = codebook.shape[-1]
    shape = (h, b, d, s) if channel_first else (h, b, s, d)
    return codebook.new_empty(shape, dtype=dtype or codebook.dtype)


lookup = register(
    "lookup",
    "(Tensor codebook, Tensor indices, bool channel_first=False, ScalarType? dtype=None, str backend='auto') -> Tensor",
    _fake,
)
