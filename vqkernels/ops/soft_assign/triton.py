# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
"""``soft_assign`` on Triton kernels: the softmax of every row in one pass over the codes, then a pass by codes.

Called by ``dispatch``. Scores are made twice and never kept. No atomics: chunks of rows, which depend on the sizes
alone, have sums of their own for each code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels import _triton
from vqkernels._triton import soft_scores
from vqkernels._triton.soft_scores import above, tile_scores

# Up to here three TF32 products per score, made twice, were counted to cost less than the reference's one in float32
# and its passes over a block of scores (benchmarks/NOTES.md).
MOST_DIMS = 512


@triton.jit(do_not_specialize=["num_rows", "num_codes", "each"])
def _row_softmax(
    x, x_head, x_row, x_dim, codes, c_head, c_code, c_dim, offset, weight, top, total, moments, num_rows, num_codes,
    dim, each, scale, factor,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_M rows and a split of the codes: largest score, sum of e = exp(score - largest), of e log e."""
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = head * num_rows + n
    ok = (n < num_rows) & (tl.load(weight + at, mask=n < num_rows, other=0.0) != 0)
    x_start = x + head * x_head + n * x_row
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    moment = tl.zeros([BLOCK_M], tl.float32)
    begin = tl.program_id(2) * each
    for first in range(begin, tl.minimum(begin + each, num_codes), BLOCK_N):
        code = first + tl.arange(0, BLOCK_N).to(tl.int64)
        score = tile_scores(
            x_start, x_dim, codes + head * c_head, c_code, c_dim, offset + head * num_codes, ok, code, num_codes, dim,
            scale, factor, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        best, shift, d = above(best, z, score)
        e = tl.exp(d)
        moment = tl.exp(shift) * (moment + z * shift) + tl.sum(e * d, 1)
        z = tl.exp(shift) * z + tl.sum(e, 1)
    to = tl.program_id(2).to(tl.int64) * tl.num_programs(1) * num_rows + at
    tl.store(top + to, best, mask=n < num_rows)
    tl.store(total + to, z, mask=n < num_rows)
    tl.store(moments + to, moment, mask=n < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_codes", "chunk"])
def _usage(
    x, x_head, x_row, x_dim, codes, c_head, c_code, c_dim, offset, weight, top, total, partial, num_rows, num_codes,
    dim, chunk, scale, factor,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The weighted sum of p of BLOCK_N codes over one chunk of rows, in ascending order of blocks of rows."""
    head = tl.program_id(1).to(tl.int64)
    code = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(2).to(tl.int64) * chunk
    stop = tl.minimum(begin + chunk, num_rows)
    usage = tl.zeros([BLOCK_N], tl.float32)
    for first in range(begin, stop, BLOCK_M):
        n = first + tl.arange(0, BLOCK_M)
        at = head * num_rows + n
        w = tl.load(weight + at, mask=n < stop, other=0.0)
        score = tile_scores(
            x + head * x_head + n * x_row, x_dim, codes + head * c_head, c_code, c_dim, offset + head * num_codes,
            (n < stop) & (w != 0), code, num_codes, dim, scale, factor, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        best = tl.load(top + at, mask=n < stop, other=0.0)
        z = tl.load(total + at, mask=n < stop, other=1.0)
        usage += tl.sum(tl.exp(score - best[:, None]) * (w / z)[:, None], 0)
    to = partial + (tl.program_id(2) * tl.num_programs(1) + head) * num_codes + code
    tl.store(to, usage, mask=code < num_codes)


def supports(x: Tensor, codes: Tensor, weight: Tensor, squared: bool, temperature: float) -> str | None:
    """Up to 512 dims, any strides; float32, float16 and bfloat16, mixed at will."""
    if x.shape[2] > MOST_DIMS:
        return f"x has {x.shape[2]} dims: beyond {MOST_DIMS} scores that are made twice cost more than the reference"
    return _triton.unsupported_dtype(_triton.SCREEN_DTYPES, x=x, codes=codes)


def run(x: Tensor, codes: Tensor, weight: Tensor, squared: bool, temperature: float) -> tuple[Tensor, Tensor]:
    """Two launches; torch adds up rows' entropies, the splits of the codes and the chunks of rows."""
    h, n, d = x.shape
    k = codes.shape[1]
    if n == 0 or h == 0:
        return codes.new_zeros((h,), dtype=torch.float32), codes.new_zeros((h, k), dtype=torch.float32)
    x, codes, weight = soft_scores.dense(x), soft_scores.dense(codes), weight.to(torch.float32).contiguous()
    offset = codes.float().square().sum(-1) if squared else codes.new_zeros((h, k), dtype=torch.float32)
    precision, tile, _, _ = soft_scores.machine(x.device, d)
    splits, each = soft_scores.splits(h, n, k, (tile,))
    chunks, chunk = soft_scores.chunks(h, n, k, tile)
    stats = [torch.empty((splits, h, n), dtype=torch.float32, device=x.device) for _ in range(3)]
    partial = torch.empty((chunks, h, k), dtype=torch.float32, device=x.device)
    given = (x, *_triton.strides(x), codes, *_triton.strides(codes), offset.contiguous(), weight)
    options = {"PRECISION": precision, "enable_fp_fusion": False, **tile.options(d)}
    numbers = (2.0 if squared else 1.0, 1.0 / temperature)
    with _triton.on_device(x):
        _row_softmax[(_triton.ceil_div(n, tile.rows), h, splits)](*given, *stats, n, k, d, each, *numbers, **options)
        top, total, moment = soft_scores.merged(stats, -1.0)
        _usage[(_triton.ceil_div(k, tile.codes), h, chunks)](
            *given, top, total, partial, n, k, d, chunk, *numbers, **options
        )
        own = total.log() - moment / total
    return (weight.double() * own).sum(1).float(), partial[0] if chunks == 1 else partial.sum(0)
