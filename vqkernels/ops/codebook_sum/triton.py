# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
"""``codebook_sum`` on Triton kernels: a stable sort by code, then the contract's chunked sums, to the bit.

Called by ``dispatch``. No atomics, no host synchronisation: how many chunks there are is bounded from the shapes, and
programs beyond the last one have nothing to do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels import _triton
from vqkernels.ops.codebook_sum import CHUNK


@triton.jit(do_not_specialize=["num_keys", "num_rows", "inner"])
def _chunk_sums(
    x, x_head, x_batch, x_row, x_dim, order, owners, edges, first_chunk, partial, num_keys, num_rows, inner, dim,
    CHUNK: tl.constexpr, DOUBLE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One chunk of one code's rows, added in ascending order of row."""
    chunk = tl.program_id(0).to(tl.int64)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    owner = tl.load(owners + chunk)
    if owner < num_keys:
        begin = tl.load(edges + owner) + (chunk - tl.load(first_chunk + owner)) * CHUNK
        end = tl.minimum(tl.load(edges + owner + 1), begin + CHUNK)
        total = tl.zeros([BLOCK_D], tl.float64 if DOUBLE else tl.float32)
        for at in range(begin, end):
            row = tl.load(order + at)
            n = row % num_rows
            start = x + row // num_rows * x_head + n // inner * x_batch + n % inner * x_row
            total += tl.load(start + d * x_dim, mask=d < dim, other=0.0).to(total.dtype)
        tl.store(partial + chunk * dim + d, total, mask=d < dim)


@triton.jit
def _merge_chunks(
    partial, edges, first_chunk, sums, counts, dim, CHUNK: tl.constexpr, DOUBLE: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One code: its chunks in order, and its count."""
    key = tl.program_id(0).to(tl.int64)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    size = tl.load(edges + key + 1) - tl.load(edges + key)
    begin = tl.load(first_chunk + key)
    total = tl.zeros([BLOCK_D], tl.float64 if DOUBLE else tl.float32)
    for chunk in range(begin, begin + (size + CHUNK - 1) // CHUNK):
        total += tl.load(partial + chunk * dim + d, mask=d < dim, other=0.0)
    tl.store(sums + key * dim + d, total, mask=d < dim)
    tl.store(counts + key + d, tl.zeros([BLOCK_D], tl.float32) + size.to(tl.float32), mask=d == 0)


def supports(x: Tensor, indices: Tensor, num_codes: int) -> str | None:
    """Every shape and stride; float32, float64, float16 and bfloat16; 32-bit sort keys and grids."""
    if indices.numel() + x.shape[0] * num_codes >= 2**31 - 1:
        return f"{indices.numel()} rows and {num_codes} codes; keys and grids are 32-bit"
    return _triton.unsupported_dtype(_triton.DTYPES, x=x)


def run(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """On GPUs an index out of range is skipped, for a check would wait for the device."""
    h, b, s, d = x.shape
    device, n, keys = x.device, b * s, h * num_codes
    _triton.check_indices("codebook_sum", indices, num_codes)
    double = x.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    sums = torch.zeros((h, num_codes, d), dtype=dtype, device=device)
    counts = torch.zeros((h, num_codes), dtype=torch.float32, device=device)
    if n == 0 or keys == 0:
        return sums, counts
    # Rows without a code sort last, behind every key.
    known = (indices >= 0) & (indices < num_codes)
    first = torch.arange(h, device=device).view(h, 1, 1) * num_codes
    key, order = torch.where(known, indices + first, keys).to(torch.int32).flatten().sort(stable=True)
    edges = torch.searchsorted(key, torch.arange(keys + 1, device=device, dtype=torch.int32))
    chunks = (edges.diff() + CHUNK - 1) // CHUNK
    last_chunk = chunks.cumsum(0)
    first_chunk = last_chunk - chunks
    most = h * n // CHUNK + min(keys, h * n)
    owners = torch.searchsorted(last_chunk, torch.arange(most, device=device), right=True)
    partial = torch.empty((most, d), dtype=dtype, device=device)
    block = min(128, _triton.power_of_two(d))
    with _triton.on_device(x):
        _chunk_sums[(most, max(1, _triton.ceil_div(d, block)))](
            x, *_triton.strides(x), order, owners, edges, first_chunk, partial, keys, n, s, d,
            CHUNK=CHUNK, DOUBLE=double, BLOCK_D=block, num_warps=1,
        )  # fmt: skip
        _merge_chunks[(keys, max(1, _triton.ceil_div(d, block)))](
            partial, edges, first_chunk, sums, counts, d, CHUNK=CHUNK, DOUBLE=double, BLOCK_D=block, num_warps=1
        )
    return sums, counts
