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
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, RESIDENT: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """t (BLOCK_M, BLOCK_N) of one tile of codes, rows at the pointers ``a_start``. FOLDED: products have the bias."""
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
    if FOLDED:
        return acc
    return acc + f[:, None] * tl.load(bias + code)[None, :]


@triton.jit
def probe(
    rows_packed, codes_packed, bias, f, scores, padded_dim,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, RESIDENT: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """All scores of one tile of rows and one of codes, for the self-test."""
    r = tl.arange(0, BLOCK_M)
    a_start = rows_packed + r * padded_dim
    resident = tl.zeros([BLOCK_M, BLOCK_D], tl.float16)
    if RESIDENT:
        resident = tl.load(a_start[:, None] + tl.arange(0, BLOCK_D)[None, :])
    t = tile_scores(
        a_start, codes_packed, bias, tl.load(f + r), 0, 0, padded_dim, r < BLOCK_M, resident,
        BLOCK_N, BLOCK_D, BLOCK_M, RESIDENT, FOLDED,
    )  # fmt: skip
    tl.store(scores + r[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], t)


@triton.jit
def tile_bound(bounds, head, tile, tiles, f, length, residual, offset):
    """|computed t - t| of every code of a tile, per row."""
    at = bounds + (head * tiles + tile) * 3
    eps = residual * tl.load(at) + length * tl.load(at + 1) + f * tl.load(at + 2) + offset
    return eps * 1.000004


@triton.jit(do_not_specialize=["rows", "tiles", "tiles_per_split"])
def screen(
    rows_packed, info, codes_packed, bias, bounds, part, rows, padded_dim, tiles, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, RESIDENT: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """Per row over one split of the tiles: best lower bound, best two upper bounds by tile, and the best one's tile.

    The accumulators of tensor cores give each of four neighbouring threads two of every eight columns, so the scores
    are viewed as (rows, 8ths, thread, 2) and the running state is kept per thread: lanes talk once, at the end.
    """
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
    lower = tl.full([BLOCK_M, 4], float("-inf"), tl.float32)
    upper = tl.full([BLOCK_M, 4], float("-inf"), tl.float32)
    second = tl.full([BLOCK_M, 4], float("-inf"), tl.float32)
    best = tl.zeros([BLOCK_M, 4], tl.int32)
    begin = split * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, tiles)
    for tile in range(begin, end):
        t = tile_scores(
            a_start, codes_packed, bias, f, tile, head * tiles * BLOCK_N, padded_dim, ok, resident,
            BLOCK_N, BLOCK_D, BLOCK_M, RESIDENT, FOLDED,
        )  # fmt: skip
        most = tl.max(tl.max(tl.reshape(t, [BLOCK_M, BLOCK_N // 8, 4, 2]), 3), 1)
        eps = tile_bound(bounds, head, tile, tiles, f, length, residual, offset)[:, None]
        lower = tl.maximum(lower, most - eps)
        high = most + eps
        best = tl.where(high > upper, tile, best)
        second = tl.maximum(second, tl.minimum(upper, high))
        upper = tl.maximum(upper, high)
    top = tl.max(upper, 1)
    winner = tl.max(tl.where(upper == top[:, None], best, -1), 1)
    # The best upper bound of any other tile: a thread whose best is the winner's offers its second.
    other = tl.max(tl.where(best == winner[:, None], second, upper), 1)
    out = part + ((head * tl.num_programs(1) + split) * 4) * rows + r
    tl.store(out, tl.max(lower, 1), mask=ok)
    tl.store(out + rows, top, mask=ok)
    tl.store(out + 2 * rows, other, mask=ok)
    tl.store(out + 3 * rows, winner.to(tl.float32, bitcast=True), mask=ok)


@triton.jit
def merged(partials, info, head, r, ok, rows, tiles, splits, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """Per row the threshold and the key: the tile of its candidates, ``tiles`` if several, ``tiles + 1`` to scan."""
    split = tl.arange(0, SPLITS)
    mask = (split < splits)[:, None] & ok[None, :]
    at = partials + ((head * splits + split) * 4 * rows)[:, None] + r[None, :]
    lower = tl.max(tl.load(at, mask=mask, other=float("-inf")), 0)
    upper = tl.load(at + rows, mask=mask, other=float("-inf"))
    second = tl.load(at + 2 * rows, mask=mask, other=float("-inf"))
    best = tl.load(at + 3 * rows, mask=mask, other=0.0).to(tl.int32, bitcast=True)
    # Splits share no tile, so the best tile of another split is always another tile.
    winner = tl.max(tl.where(upper == tl.max(upper, 0)[None, :], best, -1), 0)
    other = tl.max(tl.where(best == winner[None, :], second, upper), 0)
    scan = tl.load(info + head * 5 * rows + 4 * rows + r, mask=ok, other=1.0)
    wide = (other >= lower) & (other > float("-inf"))
    return lower, tl.where(scan != 0, tiles + 1, tl.where(wide, tiles, winner))


@triton.jit(do_not_specialize=["rows", "tiles", "splits"])
def merge(part, info, threshold, key, rows, tiles, splits, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Splits to one threshold and one key per row."""
    head = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = r < rows
    lower, found = merged(part, info, head, r, ok, rows, tiles, splits, BLOCK, SPLITS)
    tl.store(threshold + head * rows + r, lower, mask=ok)
    tl.store(key + head * rows + r, found, mask=ok)


@triton.jit(do_not_specialize=["rows", "tiles", "tiles_per_split", "splits"])
def collect(
    rows_packed, info, codes_packed, bias, bounds, part, threshold, keys, order, listed, count, rows, padded_dim, tiles,
    tiles_per_split, splits,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, RESIDENT: tl.constexpr,
    FOLDED: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Candidates of one split of the codes, in ascending order of code, from the tiles alone that can hold any.

    Rows come sorted by tile (SPLITS = 0); a few rows come as they are, and the splits are merged here.
    """
    split = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = i < rows
    if SPLITS == 0:
        key = tl.load(keys + head * rows + i, mask=ok, other=tiles + 1)
        r = tl.load(order + head * rows + i, mask=ok, other=0)
        least = tl.load(threshold + head * rows + r, mask=ok, other=float("inf"))
    else:
        r = i
        least, key = merged(part, info, head, r, ok, rows, tiles, splits, BLOCK_M, SPLITS)
    at = info + head * 5 * rows + r
    f = tl.load(at, mask=ok, other=1.0)
    length = tl.load(at + rows, mask=ok, other=0.0)
    residual = tl.load(at + 2 * rows, mask=ok, other=0.0)
    offset = tl.load(at + 3 * rows, mask=ok, other=0.0)
    a_start = rows_packed + (head * rows + r) * padded_dim
    live = ok & (key <= tiles)
    wide = tl.max((live & (key == tiles)).to(tl.int32), 0)
    begin = tl.min(tl.where(wide != 0, 0, tl.where(live, key, tiles)), 0)
    end = tl.max(tl.where(wide != 0, tiles, tl.where(live, key + 1, 0)), 0)
    begin = tl.maximum(begin, split * tiles_per_split)
    end = tl.minimum(end, (split + 1) * tiles_per_split)
    resident = tl.zeros([BLOCK_M, BLOCK_D], tl.float16)
    if RESIDENT:
        mask = (ok & (begin + key * 0 < end))[:, None]  # not of two scalars: Triton 3.9 interprets these as an int32
        resident = tl.load(a_start[:, None] + tl.arange(0, BLOCK_D)[None, :], mask=mask, other=0.0)
    found = tl.zeros([BLOCK_M], tl.int32)
    column = tl.arange(0, BLOCK_N)
    place = (head * splits + split) * rows + r
    for tile in range(begin, end):
        if (wide != 0) | (tl.max((key == tile).to(tl.int32), 0) != 0):
            t = tile_scores(
                a_start, codes_packed, bias, f, tile, head * tiles * BLOCK_N, padded_dim, ok, resident,
                BLOCK_N, BLOCK_D, BLOCK_M, RESIDENT, FOLDED,
            )  # fmt: skip
            eps = tile_bound(bounds, head, tile, tiles, f, length, residual, offset)
            hit = live[:, None] & (t + eps[:, None] >= least[:, None]) & (t > float("-inf"))
            hits = hit.to(tl.int32)
            position = found[:, None] + tl.cumsum(hits, 1) - 1
            to = listed + place[:, None] * CAPACITY + position
            code = tl.broadcast_to((tile * BLOCK_N + column)[None, :], [BLOCK_M, BLOCK_N])
            tl.store(to, code, mask=hit & (position < CAPACITY))
            found += tl.sum(hits, 1)
    tl.store(count + place, tl.where(live, found, CAPACITY + 1), mask=ok)


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


@triton.jit(do_not_specialize=["first_row", "rows", "num_rows", "inner", "num_codes", "dim", "splits"])
def decide(
    x, x_head, x_batch, x_row, x_dim, e, e_head, e_code, e_dim, norms, listed, count, indices, score,
    first_row, rows, num_rows, inner, num_codes, dim, splits,
    METRIC: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The best listed candidate of every row whose lists are complete; code 0 where they are empty."""
    head = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = (first_row + r).to(tl.int64)
    ok = (r < rows) & (n < num_rows)
    total = tl.zeros([BLOCK], tl.int32)
    for split in range(0, splits):
        size = tl.load(count + (head * splits + split) * rows + r, mask=ok, other=CAPACITY + 1)
        total += size
        ok = ok & (size <= CAPACITY)
    x_start = x + head * x_head + n // inner * x_batch + n % inner * x_row
    best = tl.full([BLOCK], float("inf"), tl.float64)
    index = tl.zeros([BLOCK], tl.int64)
    for split in range(0, splits):
        place = (head * splits + split) * rows + r
        size = tl.load(count + place, mask=ok, other=0)
        tries = tl.where(ok, tl.maximum(size, ((total == 0) & (split == 0)).to(tl.int32)), 0)
        for c in range(0, tl.max(tries, 0)):
            mask = c < tries
            code = tl.load(listed + place * CAPACITY + c, mask=mask & (c < size), other=0).to(tl.int64)
            norm = tl.full([BLOCK], 1.0, tl.float64)
            if METRIC == 1:
                norm = tl.load(norms + head * num_codes + code, mask=mask, other=1.0)
            value = pair_value(x_start, x_dim, e + head * e_head + code * e_code, e_dim, norm, dim, mask, METRIC)
            wins = mask & ((value < best) | (total == 0))
            best = tl.where(wins, value, best)
            index = tl.where(wins, code, index)
    tl.store(indices + head * num_rows + n, index, mask=ok)
    best = best if METRIC == 0 else -best
    tl.store(score + head * num_rows + n, best.to(tl.float32), mask=ok)


@triton.jit
def scan_row(
    x_start, x_dim, e, e_head, e_code, e_dim, norms, head, lane, num_codes, dim,
    METRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row against every code in float64: the winner's number and value (code 0's if nothing can win)."""
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
    code = winner + lane.to(tl.int64) * 0
    norm = tl.full([BLOCK], 1.0, tl.float64)
    if METRIC == 1:
        norm = tl.load(norms + head * num_codes + code)
    return code, pair_value(x_start, x_dim, e + head * e_head + code * e_code, e_dim, norm, dim, lane == 0, METRIC)


@triton.jit(
    do_not_specialize=["first_row", "rows", "num_rows", "inner", "num_codes", "dim", "splits", "rows_per_program"]
)
def scan(
    x, x_head, x_batch, x_row, x_dim, e, e_head, e_code, e_dim, norms, count, indices, score,
    first_row, rows, num_rows, inner, num_codes, dim, splits, rows_per_program,
    METRIC: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows without a bound or with too many candidates: every code in float64."""
    head = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    for i in range(0, rows_per_program):
        r = tl.program_id(0) * rows_per_program + i
        n = (first_row + r).to(tl.int64)
        here = (r < rows) & (n < num_rows)
        size = 0
        for split in range(0, splits):
            size = tl.maximum(size, tl.load(count + (head * splits + split) * rows + r, mask=here, other=0))
        if size > CAPACITY:
            x_start = x + head * x_head + n // inner * x_batch + n % inner * x_row + lane.to(tl.int64) * 0
            code, value = scan_row(
                x_start, x_dim, e, e_head, e_code, e_dim, norms, head, lane, num_codes, dim, METRIC, BLOCK
            )
            value = value if METRIC == 0 else -value
            tl.store(indices + head * num_rows + n + lane, code, mask=lane == 0)
            tl.store(score + head * num_rows + n + lane, value.to(tl.float32), mask=lane == 0)


@triton.jit(do_not_specialize=["first_row", "rows", "num_rows", "inner", "num_codes", "dim", "splits"])
def resolve(
    x, x_head, x_batch, x_row, x_dim, e, e_head, e_code, e_dim, norms, listed, count, indices, score,
    first_row, rows, num_rows, inner, num_codes, dim, splits,
    METRIC: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One of a few rows: its candidates of all splits side by side (BLOCK covers them), or the scan."""
    head = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0)
    n = (first_row + r).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    split, c = lane // CAPACITY, lane % CAPACITY
    place = (head * splits + split) * rows + r
    size = tl.load(count + place, mask=split < splits, other=0)
    x_start = x + head * x_head + n // inner * x_batch + n % inner * x_row + lane.to(tl.int64) * 0
    longest = tl.max(size, 0)
    if longest > CAPACITY:
        code, value = scan_row(
            x_start, x_dim, e, e_head, e_code, e_dim, norms, head, lane, num_codes, dim, METRIC, BLOCK
        )
        value = value if METRIC == 0 else -value
        tl.store(indices + head * num_rows + n + lane, code, mask=lane == 0)
        tl.store(score + head * num_rows + n + lane, value.to(tl.float32), mask=lane == 0)
    else:
        none = lane + longest == 0  # lane 0, which stands for code 0, where no candidate is listed
        mask = (c < size) | none
        code = tl.load(listed + place * CAPACITY + c, mask=c < size, other=0).to(tl.int64)
        norm = tl.full([BLOCK], 1.0, tl.float64)
        if METRIC == 1:
            norm = tl.load(norms + head * num_codes + code, mask=mask, other=1.0)
        value = pair_value(x_start, x_dim, e + head * e_head + code * e_code, e_dim, norm, dim, mask, METRIC)
        value = tl.where(mask, value, float("inf"))
        least = tl.min(value, 0)
        winner = tl.min(tl.where(mask & (value == least), code, 9223372036854775807), 0)
        chosen = (mask & (code == winner)) | none  # one lane: a code is listed once
        value = value if METRIC == 0 else -value
        tl.store(indices + head * num_rows + n + lane * 0, code, mask=chosen)
        tl.store(score + head * num_rows + n + lane * 0, value.to(tl.float32), mask=chosen)
