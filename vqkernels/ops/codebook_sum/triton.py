# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
"""``codebook_sum`` on Triton kernels: a stable sort by code, then the contract's chunked sums, to the bit.

Called by ``dispatch``. No atomics, no host synchronisation: how many chunks there are is bounded from the shapes, and
programs beyond the last one have nothing to do. Four launches and torch's sort.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels import _triton
from vqkernels.ops.codebook_sum import CHUNK

# The chunks of code k get neighbouring slots from edges[k] // CHUNK + k on: as edges grow by at least CHUNK per full
# chunk, codes do not meet, every code has a slot, and no prefix sum is needed to find it.


@triton.jit(do_not_specialize=["num_codes", "num_rows", "total"])
def _row_keys(indices, keys, num_codes, num_rows, total, unknown, BLOCK: tl.constexpr):
    """The code of each row, counted over all heads; rows without one sort last, behind every code."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices + at, mask=at < total, other=-1)
    known = (index >= 0) & (index < num_codes)
    key = tl.where(known, index + at // num_rows * num_codes, unknown)
    tl.store(keys + at, key.to(keys.dtype.element_ty), mask=at < total)


@triton.jit(do_not_specialize=["num_keys", "total", "slots", "steps"])
def _slot_owners(keys, edges, owners, num_keys, total, slots, steps, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Where the rows of each code begin among the sorted ones, and the code of each slot."""
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low, last_low = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    high, last_high = low + total, low + total
    for _ in range(steps):  # bisect for k and for k + 1
        middle, last_middle = (low + high) // 2, (last_low + last_high) // 2
        below = tl.load(keys + middle, mask=low < high, other=0) < k
        last_below = tl.load(keys + last_middle, mask=last_low < last_high, other=0) < k + 1
        low, high = tl.where(below & (low < high), middle + 1, low), tl.where(below, high, middle)
        last_low, last_high = (
            tl.where(last_below & (last_low < last_high), last_middle + 1, last_low),
            tl.where(last_below, last_high, last_middle),
        )
    tl.store(edges + k, low.to(tl.int32), mask=k <= num_keys)
    slot = low // CHUNK + k
    stop = tl.where(k < num_keys, last_low // CHUNK + k + 1, slots)  # what is left belongs to nobody
    stop = tl.where(k <= num_keys, stop, slot)
    for step in range(tl.max(stop - slot, 0)):
        tl.store(owners + slot + step, k.to(tl.int32), mask=slot + step < stop)


@triton.jit(do_not_specialize=["num_keys", "num_rows", "inner"])
def _chunk_sums(
    x, x_head, x_batch, x_row, x_dim, order, owners, edges, partial, sums, counts, num_keys, num_rows, inner, dim,
    CHUNK: tl.constexpr, DOUBLE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One chunk of one code's rows, added in ascending order of row; of a code with one chunk these are the results."""
    slot = tl.program_id(0).to(tl.int64)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    owner = tl.load(owners + slot).to(tl.int64)
    if owner < num_keys:
        start, stop = tl.load(edges + owner).to(tl.int64), tl.load(edges + owner + 1).to(tl.int64)
        chunk = slot - (start // CHUNK + owner)
        begin = start + chunk * CHUNK
        total = tl.zeros([BLOCK_D], tl.float64 if DOUBLE else tl.float32)
        for at in range(begin, tl.minimum(stop, begin + CHUNK)):
            row = tl.load(order + at)
            n = row % num_rows
            first = x + row // num_rows * x_head + n // inner * x_batch + n % inner * x_row
            total += tl.load(first + d * x_dim, mask=d < dim, other=0.0).to(total.dtype)
        if stop - start > CHUNK:
            # Codes with several chunks are at least a chunk apart: twice that is room for the last, broken one.
            if begin < stop:
                tl.store(partial + (start // CHUNK * 2 + chunk) * dim + d, total, mask=d < dim)
        elif chunk == 0:
            tl.store(sums + owner * dim + d, total, mask=d < dim)
            size = tl.zeros([BLOCK_D], tl.float32) + (stop - start).to(tl.float32)
            tl.store(counts + owner + d, size, mask=d == 0)


@triton.jit
def _merge_chunks(partial, edges, sums, counts, dim, CHUNK: tl.constexpr, DOUBLE: tl.constexpr, BLOCK_D: tl.constexpr):
    """One code with several chunks: their sums in order, and its count."""
    key = tl.program_id(0).to(tl.int64)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    start, stop = tl.load(edges + key).to(tl.int64), tl.load(edges + key + 1).to(tl.int64)
    if stop - start > CHUNK:
        begin = start // CHUNK * 2
        total = tl.zeros([BLOCK_D], tl.float64 if DOUBLE else tl.float32)
        for chunk in range(begin, begin + (stop - start + CHUNK - 1) // CHUNK):
            total += tl.load(partial + chunk * dim + d, mask=d < dim, other=0.0)
        tl.store(sums + key * dim + d, total, mask=d < dim)
        size = tl.zeros([BLOCK_D], tl.float32) + (stop - start).to(tl.float32)
        tl.store(counts + key + d, size, mask=d == 0)


def supports(x: Tensor, indices: Tensor, num_codes: int) -> str | None:
    """Every shape and stride; float32, float64, float16 and bfloat16; 32-bit sort keys and grids."""
    if indices.numel() + x.shape[0] * num_codes >= 2**31 - 1:
        return f"{indices.numel()} rows and {num_codes} codes; keys and grids are 32-bit"
    return _triton.unsupported_dtype(_triton.DTYPES, x=x)


def run(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """On GPUs an index out of range is skipped, for a check would wait for the device."""
    h, b, s, d = x.shape
    device, total, keys = x.device, h * b * s, h * num_codes
    _triton.check_indices("codebook_sum", indices, num_codes)
    double = x.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    if total == 0 or keys == 0 or d == 0:
        counts = torch.zeros((h, num_codes), dtype=torch.float32, device=device)
        return torch.zeros((h, num_codes, d), dtype=dtype, device=device), counts
    sums = torch.empty((h, num_codes, d), dtype=dtype, device=device)
    counts = torch.empty((h, num_codes), dtype=torch.float32, device=device)
    # A radix sort reads every bit of a key: 16 where they are enough.
    key = torch.empty(total, dtype=torch.int16 if keys < 2**15 else torch.int32, device=device)
    slots = total // CHUNK + keys + 1
    owners = torch.empty(slots, dtype=torch.int32, device=device)
    edges = torch.empty(keys + 1, dtype=torch.int32, device=device)
    partial = torch.empty((2 * (total // CHUNK) + 2, d), dtype=dtype, device=device)
    block = min(128, _triton.power_of_two(d))
    parts = _triton.ceil_div(d, block)
    with _triton.on_device(x):
        _row_keys[(_triton.ceil_div(total, 1024),)](
            indices.contiguous(), key, num_codes, b * s, total, keys, BLOCK=1024, num_warps=4
        )
        key, order = key.sort(stable=True)
        _slot_owners[(_triton.ceil_div(keys + 1, 128),)](
            key, edges, owners, keys, total, slots, total.bit_length(), CHUNK=CHUNK, BLOCK=128, num_warps=4
        )
        _chunk_sums[(slots, parts)](
            x, *_triton.strides(x), order, owners, edges, partial, sums, counts, keys, b * s, s, d,
            CHUNK=CHUNK, DOUBLE=double, BLOCK_D=block, num_warps=1,
        )  # fmt: skip
        if b * s > CHUNK:
            _merge_chunks[(keys, parts)](
                partial, edges, sums, counts, d, CHUNK=CHUNK, DOUBLE=double, BLOCK_D=block, num_warps=1
            )
    return sums, counts
