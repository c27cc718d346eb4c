# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
"""Triton kernels of the search itself: screen, merge, collect the candidates, decide them in float64, scan the rest.

Called by ``ops/nearest/triton.py``. Every row belongs to one program of each kernel and every loop runs in ascending
order, so there is nothing to race and nothing atomic: two runs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_scores(
    a_start, packed, bias, f, tile, code_base, padded_dim, row_ok, resident,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """t (BLOCK_M, BLOCK_N) of one tile of codes; rows start at the pointers ``a_start``."""
    code = code_base + tile * BLOCK_N + tl.arange(0, BLOCK_N)
    b_start = packed + code * padded_dim
    d = tl.arange(0, BLOCK_D)
    if RESIDENT:
        b = tl.load(b_start[None, :] + d[:, None])
        acc = tl.dot(resident, b)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, padded_dim, BLOCK_D):
            a = tl.load(a_start[:, None] + (first + d)[None, :], mask=row_ok[:, None], other=0.0)
            b = tl.load(b_start[None, :] + (first + d)[:, None])
            acc = tl.dot(a, b, acc)
    return acc + f[:, None] * tl.load(bias + code)[None, :]


@triton.jit
def tile_bound(bounds, head, tile, tiles, f, length, residual, offset):
    """|computed t - t| of every code of a tile, per row."""
    at = bounds + (head * tiles + tile) * 3
    eps = residual * tl.load(at) + length * tl.load(at + 1) + f * tl.load(at + 2) + offset
    return eps * 1.000004


@triton.jit
def screen(
    rows_packed, info, codes_packed, bias, bounds, part, rows, padded_dim, tiles, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Per row over one split of the tiles: best lower bound, best two upper bounds by tile, and the best one's tile."""
    split = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = r < rows
    at = info + head * 5 * rows + r
    f = tl.load(at, mask=ok, other=1.0)
    length = tl.load(at + rows, mask=ok, other=0.0)
    residual = tl.load(at + 2 * rows, mask=ok, other=0.0)
    offset = tl.load(at + 3 * rows, mask=ok, other=0.0)
    a_start = rows_packed + (head * rows + r) * padded_dim
    resident = tl.zeros([BLOCK_M, BLOCK_D], tl.float16)
    if RESIDENT:
        resident = tl.load(a_start[:, None] + tl.arange(0, BLOCK_D)[None, :], mask=ok[:, None], other=0.0)
    lower = tl.full([BLOCK_M], float("-inf"), tl.float32)
    upper = tl.full([BLOCK_M], float("-inf"), tl.float32)
    second = tl.full([BLOCK_M], float("-inf"), tl.float32)
    best = tl.zeros([BLOCK_M], tl.int32)
    begin = split * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, tiles)
    for tile in range(begin, end):
        t = tile_scores(
            a_start, codes_packed, bias, f, tile, head * tiles * BLOCK_N, padded_dim, ok, resident,
            BLOCK_N, BLOCK_D, BLOCK_M, RESIDENT,
        )  # fmt: skip
        most = tl.max(t, 1)
        eps = tile_bound(bounds, head, tile, tiles, f, length, residual, offset)
        lower = tl.maximum(lower, most - eps)
        high = most + eps
        best = tl.where(high > upper, tile, best)
        second = tl.maximum(second, tl.minimum(upper, high))
        upper = tl.maximum(upper, high)
    out = part + ((head * tl.num_programs(1) + split) * 4) * rows + r
    tl.store(out, lower, mask=ok)
    tl.store(out + rows, upper, mask=ok)
    tl.store(out + 2 * rows, second, mask=ok)
    tl.store(out + 3 * rows, best.to(tl.float32, bitcast=True), mask=ok)


@triton.jit
def merge(part, info, threshold, key, rows, tiles, splits, BLOCK: tl.constexpr):
    """Splits to one threshold per row, and the tile that holds all its candidates: ``tiles`` if that may be several."""
    head = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = r < rows
    lower = tl.full([BLOCK], float("-inf"), tl.float32)
    upper = tl.full([BLOCK], float("-inf"), tl.float32)
    second = tl.full([BLOCK], float("-inf"), tl.float32)
    best = tl.zeros([BLOCK], tl.int32)
    for split in range(0, splits):
        at = part + ((head * splits + split) * 4) * rows + r
        high = tl.load(at + rows, mask=ok, other=float("-inf"))
        tile = tl.load(at + 3 * rows, mask=ok, other=0.0).to(tl.int32, bitcast=True)
        lower = tl.maximum(lower, tl.load(at, mask=ok, other=float("-inf")))
        best = tl.where(high > upper, tile, best)
        second = tl.maximum(second, tl.load(at + 2 * rows, mask=ok, other=float("-inf")))
        second = tl.maximum(second, tl.minimum(upper, high))
        upper = tl.maximum(upper, high)
    scan = tl.load(info + head * 5 * rows + 4 * rows + r, mask=ok, other=1.0)
    wide = (second >= lower) & (second > float("-inf"))
    tl.store(threshold + head * rows + r, lower, mask=ok)
    tl.store(key + head * rows + r, tl.where(scan != 0, tiles + 1, tl.where(wide, tiles, best)), mask=ok)


@triton.jit
def collect(
    rows_packed, info, codes_packed, bias, bounds, threshold, keys, order, listed, count, rows, padded_dim, tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, RESIDENT: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """Candidates of rows that were sorted by tile, in ascending order of code, from those tiles alone."""
    head = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = i < rows
    key = tl.load(keys + head * rows + i, mask=ok, other=tiles + 1)
    r = tl.load(order + head * rows + i, mask=ok, other=0)
    at = info + head * 5 * rows + r
    f = tl.load(at, mask=ok, other=1.0)
    length = tl.load(at + rows, mask=ok, other=0.0)
    residual = tl.load(at + 2 * rows, mask=ok, other=0.0)
    offset = tl.load(at + 3 * rows, mask=ok, other=0.0)
    least = tl.load(threshold + head * rows + r, mask=ok, other=float("inf"))
    a_start = rows_packed + (head * rows + r) * padded_dim
    resident = tl.zeros([BLOCK_M, BLOCK_D], tl.float16)
    if RESIDENT:
        resident = tl.load(a_start[:, None] + tl.arange(0, BLOCK_D)[None, :], mask=ok[:, None], other=0.0)
    live = key <= tiles
    wide = tl.max((key == tiles).to(tl.int32), 0)
    begin = tl.min(tl.where(wide != 0, 0, key), 0)
    end = tl.max(tl.where(wide != 0, tiles, tl.where(live, key + 1, 0)), 0)
    found = tl.zeros([BLOCK_M], tl.int32)
    column = tl.arange(0, BLOCK_N)
    for tile in range(begin, end):
        if (wide != 0) | (tl.max((key == tile).to(tl.int32), 0) != 0):
            t = tile_scores(
                a_start, codes_packed, bias, f, tile, head * tiles * BLOCK_N, padded_dim, ok, resident,
                BLOCK_N, BLOCK_D, BLOCK_M, RESIDENT,
            )  # fmt: skip
            eps = tile_bound(bounds, head, tile, tiles, f, length, residual, offset)
            hit = live[:, None] & (t + eps[:, None] >= least[:, None]) & (t > float("-inf"))
            hits = hit.to(tl.int32)
            position = found[:, None] + tl.cumsum(hits, 1) - 1
            to = listed + (head * rows + r)[:, None] * CAPACITY + position
            code = tl.broadcast_to((tile * BLOCK_N + column)[None, :], [BLOCK_M, BLOCK_N])
            tl.store(to, code, mask=hit & (position < CAPACITY))
            found += tl.sum(hits, 1)
    tl.store(count + head * rows + r, tl.where(live, found, CAPACITY + 1), mask=ok)


@triton.jit
def pair_value(x_start, x_dim, e_start, e_dim, norm, dim, mask, METRIC: tl.constexpr):
    """The value to minimise of each pair (row, code), in float64 and in the one order that every backend uses.

    Kernels that call this are launched with ``enable_fp_fusion=False``: a fused multiply-add would change last bits.
    """
    total = tl.zeros_like(norm)
    for _ in range(0, dim):
        a = tl.load(x_start, mask=mask, other=0.0).to(tl.float64)
        b = tl.load(e_start, mask=mask, other=0.0).to(tl.float64)
        x_start += x_dim
        e_start += e_dim
        if METRIC == 0:
            difference = a - b
            total += difference * difference
        else:
            total += a * b
    if METRIC == 1:
        total = tl.where(norm > 0, total / tl.where(norm > 0, norm, 1.0), 0.0 * total)
    if METRIC != 0:
        total = -total
    return total


@triton.jit
def decide(
    x, x_head, x_batch, x_row, x_dim, e, e_head, e_code, e_dim, norms, listed, count, indices, score,
    first_row, rows, num_rows, inner, num_codes, dim,
    METRIC: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The best listed candidate of every row whose list is complete; code 0 where the list is empty."""
    head = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = (first_row + r).to(tl.int64)
    ok = (r < rows) & (n < num_rows)
    size = tl.load(count + head * rows + r, mask=ok, other=CAPACITY + 1)
    ok = ok & (size <= CAPACITY)
    x_start = x + head * x_head + n // inner * x_batch + n % inner * x_row
    best = tl.full([BLOCK], float("inf"), tl.float64)
    index = tl.zeros([BLOCK], tl.int64)
    for c in range(0, tl.max(tl.where(ok, tl.maximum(size, 1), 0), 0)):
        mask = ok & (c < tl.maximum(size, 1))
        code = tl.load(listed + (head * rows + r) * CAPACITY + c, mask=mask & (c < size), other=0).to(tl.int64)
        norm = tl.full([BLOCK], 1.0, tl.float64)
        if METRIC == 1:
            norm = tl.load(norms + head * num_codes + code, mask=mask, other=1.0)
        value = pair_value(x_start, x_dim, e + head * e_head + code * e_code, e_dim, norm, dim, mask, METRIC)
        wins = mask & ((value < best) | (size == 0))
        best = tl.where(wins, value, best)
        index = tl.where(wins, code, index)
    tl.store(indices + head * num_rows + n, index, mask=ok)
    best = best if METRIC == 0 else -best
    tl.store(score + head * num_rows + n, best.to(tl.float32), mask=ok)


@triton.jit
def scan(
    x, x_head, x_batch, x_row, x_dim, e, e_head, e_code, e_dim, norms, count, indices, score,
    first_row, rows, num_rows, inner, num_codes, dim, rows_per_program,
    METRIC: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows without a bound or with too many candidates: every code in float64."""
    head = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    for i in range(0, rows_per_program):
        r = tl.program_id(0) * rows_per_program + i
        n = (first_row + r).to(tl.int64)
        here = (r < rows) & (n < num_rows)
        size = tl.load(count + head * rows + r, mask=here, other=0)
        if size > CAPACITY:
            x_start = x + head * x_head + n // inner * x_batch + n % inner * x_row + lane.to(tl.int64) * 0
            best = tl.full([BLOCK], float("inf"), tl.float64)
            index = tl.full([BLOCK], 0, tl.int64)
            for first in range(0, num_codes, BLOCK):
                code = (first + lane).to(tl.int64)
                mask = code < num_codes
                norm = tl.full([BLOCK], 1.0, tl.float64)
                if METRIC == 1:
                    norm = tl.load(norms + head * num_codes + code, mask=mask, other=1.0)
                value = pair_value(x_start, x_dim, e + head * e_head + code * e_code, e_dim, norm, dim, mask, METRIC)
                wins = mask & (value < best)
                best = tl.where(wins, value, best)
                index = tl.where(wins, code, index)
            least = tl.min(best, 0)
            winner = tl.min(tl.where((best == least) & (best < float("inf")), index, 9223372036854775807), 0)
            winner = tl.where(winner == 9223372036854775807, 0, winner)
            # Once more for the winner: its own value, or that of code 0 where nothing can win.
            code = winner + lane.to(tl.int64) * 0
            norm = tl.full([BLOCK], 1.0, tl.float64)
            if METRIC == 1:
                norm = tl.load(norms + head * num_codes + code)
            value = pair_value(x_start, x_dim, e + head * e_head + code * e_code, e_dim, norm, dim, lane == 0, METRIC)
            value = value if METRIC == 0 else -value
            tl.store(indices + head * num_rows + n + lane, code, mask=lane == 0)
            tl.store(score + head * num_rows + n + lane, value.to(tl.float32), mask=lane == 0)
