# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
"""``residual_nearest`` on Triton kernels: a few rows in one launch per level and one more, many by ``nearest``'s own.

Called by ``dispatch``. There is no barrier of the whole grid, so a launch is one: that of level q + 1 first picks
the winners of level q, each program for its own row. After a screened level one kernel subtracts and adds up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels import _triton
from vqkernels._triton.nearest_search import pair_value
from vqkernels.ops.nearest import triton as nearest

# Up to so many products per level, every pair in float64 takes less than the launches of a screened search.
FEW_WORK = 2**24
# What one program merges, and the codes of one program.
MOST_TILES = 1024
FEW_CODES = 32


@triton.jit(do_not_specialize=["at", "num_rows", "inner", "num_codes", "less_tiles"])
def _few(
    source, s_head, s_batch, s_row, s_dim, less, l_head, l_code, l_dim, e, e_head, e_code, e_dim, residual, values,
    v_head, v_batch, v_row, v_dim, less_value, less_index, found_value, found_index, indices, score, at, num_rows,
    inner, num_codes, dim, less_tiles,
    MERGE: tl.constexpr, SCORE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row and one tile of codes: pick the row's winner of the level before (MERGE), take it off, compare (SCORE).

    MERGE is 0 at the first level, 1 where the sums begin, else 2. The program of the first tile writes what is left of
    the row, the sums, and index and score of the level before.
    """
    n = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    start = source + head * s_head + n // inner * s_batch + n % inner * s_row
    row = head * num_rows + n
    if MERGE:
        split = tl.arange(0, SPLITS)
        mask = split < less_tiles
        value = tl.load(less_value + row * less_tiles + split, mask=mask, other=float("inf"))
        index = tl.load(less_index + row * less_tiles + split, mask=mask, other=2147483647)
        least = tl.min(value, 0)
        winner = tl.min(tl.where((value == least) & (value < float("inf")), index, 2147483647), 0)
        none = winner == 2147483647
        winner = tl.where(none, 0, winner).to(tl.int64)
        less_start = less + head * l_head + winner * l_code
        if tile == 0:
            if none:  # code 0, and what its distance is
                zero = lane.to(tl.int64) * 0
                norm = tl.zeros([BLOCK], tl.float64)
                total = pair_value(start + zero, s_dim, less_start + zero, l_dim, norm, dim, lane == 0, METRIC=0)
                least = tl.sum(tl.where(lane == 0, total, 0.0), 0)
            tl.store(indices + at + row, winner)
            tl.store(score + at + row, least.to(tl.float32))
            for first in range(0, dim, BLOCK):
                d = (first + lane).to(tl.int64)
                ok = d < dim
                chosen = tl.load(less_start + d * l_dim, mask=ok, other=0.0).to(tl.float32)
                to = values + head * v_head + n // inner * v_batch + n % inner * v_row + d * v_dim
                total = tl.zeros([BLOCK], tl.float32)
                if MERGE == 2:
                    total = tl.load(to, mask=ok, other=0.0)
                tl.store(to, total + chosen, mask=ok)
                if SCORE:
                    old = tl.load(start + d * s_dim, mask=ok, other=0.0).to(tl.float32)
                    tl.store(residual + row * dim + d, old - chosen, mask=ok)
    if SCORE:
        code = tile * BLOCK + lane
        ok = code < num_codes
        e_start = e + head * e_head + code.to(tl.int64) * e_code
        total = tl.zeros([BLOCK], tl.float64)
        for _ in range(0, dim):
            a = tl.load(start).to(tl.float32)
            start += s_dim
            if MERGE:
                a -= tl.load(less_start).to(tl.float32)
                less_start += l_dim
            difference = a.to(tl.float64) - tl.load(e_start, mask=ok, other=0.0).to(tl.float64)
            e_start += e_dim
            total += difference * difference
        total = tl.where(ok & (total < float("inf")), total, float("inf"))  # NaN and infinity do not win
        best = tl.min(total, 0)
        best_index = tl.min(tl.where((total == best) & (total < float("inf")), code, 2147483647), 0)
        place = row * tl.num_programs(1) + tile
        tl.store(found_value + place, best)
        tl.store(found_index + place, best_index)


@triton.jit(do_not_specialize=["at", "num_rows", "inner"])
def _subtract(
    source, s_head, s_batch, s_row, s_dim, e, e_head, e_code, e_dim, found_index, found_score, residual, values, v_head,
    v_batch, v_row, v_dim, indices, score, at, num_rows, inner, dim,
    BEGIN: tl.constexpr, LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows after a level: what is left of them, the sums, and the level's results to their places."""
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_D).to(tl.int64)
    live = n < num_rows
    row = head * num_rows + n
    index = tl.load(found_index + row, mask=live, other=0)
    tl.store(indices + at + row, index, mask=live)
    tl.store(score + at + row, tl.load(found_score + row, mask=live, other=0.0), mask=live)
    s_start = source + head * s_head + n // inner * s_batch + n % inner * s_row
    v_start = values + head * v_head + n // inner * v_batch + n % inner * v_row
    e_start = e + head * e_head + index * e_code
    for first in range(0, dim, BLOCK_D):
        d = first + lane
        mask = live[:, None] & (d < dim)[None, :]
        chosen = tl.load(e_start[:, None] + (d * e_dim)[None, :], mask=mask, other=0.0).to(tl.float32)
        to = v_start[:, None] + (d * v_dim)[None, :]
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if BEGIN == 0:
            total = tl.load(to, mask=mask, other=0.0)
        tl.store(to, total + chosen, mask=mask)
        if LAST == 0:
            old = tl.load(s_start[:, None] + (d * s_dim)[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(residual + (row * dim)[:, None] + d[None, :], old - chosen, mask=mask)


def supports(x: Tensor, codebooks: Sequence[Tensor], channel_first: bool) -> str | None:
    """Every shape and stride; float32, float16 and bfloat16 on either side; sizes that 32-bit indices reach."""
    for level, codebook in enumerate(codebooks):
        if (reason := nearest.supports(x, codebook, "l2", "exact")) is not None:
            return f"level {level}: {reason}"
    return None


def _few_rows(x: Tensor, codebooks: Sequence[Tensor]) -> bool:
    most = max(codebook.shape[1] for codebook in codebooks)
    return x.numel() * most <= FEW_WORK and most <= MOST_TILES * FEW_CODES


def describe(x: Tensor, codebooks: Sequence[Tensor], channel_first: bool) -> str:
    """What :func:`vqkernels.explain` adds to "chosen"."""
    if _few_rows(x, codebooks):
        return "float64, no screen, one launch per level"
    return nearest.describe(x, codebooks[0], "l2", "exact")


def run(x: Tensor, codebooks: Sequence[Tensor], channel_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See the contract in the package docstring."""
    (h, b, s, d), levels = x.shape, len(codebooks)
    indices = torch.empty((levels, h, b, s), dtype=torch.int64, device=x.device)
    score = torch.empty((levels, h, b, s), dtype=torch.float32, device=x.device)
    values = torch.empty((h, b, d, s) if channel_first else (h, b, s, d), dtype=torch.float32, device=x.device)
    if indices.numel() > 0:
        rows = values.transpose(2, 3) if channel_first else values
        with _triton.on_device(x):
            (_run_few if _few_rows(x, codebooks) else _run_many)(x, codebooks, indices, rows, score)
    return indices, values, score


def _run_few(x: Tensor, codebooks: Sequence[Tensor], indices: Tensor, values: Tensor, score: Tensor) -> None:
    (h, b, s, d), levels, device = x.shape, len(codebooks), x.device
    tiles = [_triton.ceil_div(codebook.shape[1], FEW_CODES) for codebook in codebooks]
    # Two of each, taken in turns: programs of a row read what the launch before has left while one of them writes.
    residuals = [torch.empty(x.shape, dtype=torch.float32, device=device) for _ in range(2)]
    found_value = [torch.empty(h * b * s * max(tiles), dtype=torch.float64, device=device) for _ in range(2)]
    found_index = [torch.empty(h * b * s * max(tiles), dtype=torch.int32, device=device) for _ in range(2)]
    for level in range(levels + 1):
        here, before = min(level, levels - 1), max(level - 1, 0)
        source = x if level <= 1 else residuals[level % 2]
        codes, less = codebooks[here], codebooks[before]
        splits = _triton.power_of_two(tiles[before]) if level > 0 else 1
        _few[(b * s, tiles[here] if level < levels else 1, h)](
            source, *_triton.strides(source), less, *_triton.strides(less), codes, *_triton.strides(codes),
            residuals[(level + 1) % 2], values, *_triton.strides(values),
            found_value[(level + 1) % 2], found_index[(level + 1) % 2], found_value[level % 2], found_index[level % 2],
            indices, score, before * h * b * s, b * s, s, codes.shape[1], d, tiles[before],
            MERGE=min(level, 2), SCORE=level < levels, SPLITS=splits, BLOCK=FEW_CODES,
            num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip


def _run_many(x: Tensor, codebooks: Sequence[Tensor], indices: Tensor, values: Tensor, score: Tensor) -> None:
    (h, b, s, d), device = x.shape, x.device
    residual = torch.empty(x.shape, dtype=torch.float32, device=device)
    # One level's results; kernels are specialised by the alignment of pointers, which a level's own place may not have.
    found_index = torch.empty((h, b, s), dtype=torch.int64, device=device)
    found_score = torch.empty((h, b, s), dtype=torch.float32, device=device)
    block_d = min(128, _triton.power_of_two(d))
    block_m = max(1, 1024 // block_d)
    for level, codes in enumerate(codebooks):
        source = residual if level > 0 else x
        nearest._run_into(source, codes, "l2", "exact", found_index, found_score)
        _subtract[(_triton.ceil_div(b * s, block_m), h)](
            source, *_triton.strides(source), codes, *_triton.strides(codes), found_index, found_score, residual,
            values, *_triton.strides(values), indices, score, level * h * b * s, b * s, s, d,
            BEGIN=level == 0, LAST=level == len(codebooks) - 1, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
