"""``codebook_sum`` in pure PyTorch: any device, O(N + K*D) memory, deterministic. The fallback, and written to be read.

Called by ``dispatch``. There is no atomic and no scatter with duplicates in here: rows are sorted by code, and step
``p`` adds the p-th row of *every* chunk at once, each to its own accumulator. So every sum is made in the contract's
order on every device, and agrees with the native kernels to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vqkernels import _indices
from vqkernels.ops.codebook_sum import CHUNK


def supports(x: Tensor, indices: Tensor, num_codes: int) -> str | None:
    """Everything."""
    return None


def run(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring."""
    h, b, s, d = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = torch.zeros((h * num_codes, d), dtype=dtype, device=x.device)
    counts = torch.zeros((h, num_codes), dtype=torch.float32, device=x.device)
    if indices.numel() == 0:
        return sums.view(h, num_codes, d), counts
    _indices.check("codebook_sum", indices, num_codes)

    # One run of consecutive entries of `order` per (head, code), in row order; index -1 comes before all of them.
    first = torch.arange(h, device=x.device).view(h, 1, 1) * num_codes
    key, order = torch.where(indices < 0, -1, indices + first).flatten().sort(stable=True)
    edges = torch.searchsorted(key, torch.arange(h * num_codes + 1, device=x.device))
    size = edges.diff()
    counts.copy_(size.view(h, num_codes))

    used = size.nonzero().squeeze(1)
    size, begin = size[used], edges[used]
    chunks = (size + CHUNK - 1) // CHUNK
    first_chunk = chunks.cumsum(0) - chunks
    owner = torch.repeat_interleave(torch.arange(len(used), device=x.device), chunks)
    skipped = (torch.arange(len(owner), device=x.device) - first_chunk[owner]) * CHUNK

    def read_rows(at: Tensor) -> Tensor:
        row = order[at]
        return x[row // (b * s), row // s % b, row % s].to(dtype)

    start, length = begin[owner] + skipped, (size[owner] - skipped).clamp(max=CHUNK)
    partial = _segment_sums(read_rows, start, length, sums)
    sums[used] = _segment_sums(partial.__getitem__, first_chunk, chunks, sums)
    return sums.view(h, num_codes, d), counts


def _segment_sums(read: Callable[[Tensor], Tensor], start: Tensor, length: Tensor, like: Tensor) -> Tensor:
    """Sum of ``read(start) + read(start + 1) + ...`` per segment, strictly in that order, all segments side by side."""
    length, order = length.sort(descending=True, stable=True)
    start = start[order]
    total = like.new_zeros((len(start), like.shape[1]))
    if len(start):
        # Longest first: the segments that still have a row at step p are a prefix.
        step = torch.arange(int(length[0]), device=length.device)
        for p, active in enumerate(torch.searchsorted(-length, -step).tolist()):
            total[:active] += read(start[:active] + p)
    result = torch.empty_like(total)
    result[order] = total
    return result
