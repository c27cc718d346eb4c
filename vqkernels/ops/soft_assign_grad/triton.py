# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
"""``soft_assign_grad`` on Triton kernels: what each row needs of all codes, then a pass by rows and one by codes.

Called by ``dispatch``. Scores are made anew in each pass, and for each 128 dims, and never kept. No atomics: splits of
the codes and chunks of the rows, which depend on the sizes alone, have sums of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels import _triton
from vqkernels._triton import soft_scores
from vqkernels._triton.soft_scores import LEAST, above, tile_says, tile_scores

# Dims of the sums that a program holds in registers. Scores are made again for each such part: twice, that was counted
# to cost less than the reference's passes over a block of scores; four times, more (benchmarks/NOTES.md).
PART, MOST_DIMS = 128, 256
# Elements that the sums of all chunks may hold together, if there are several.
CHUNK_ELEMENTS = 2**24


@triton.jit
def _tile(
    x_start, x_dim, codes, c_code, c_dim, offset, usage, g_start, g_dim, values, v_code, v_dim, best, factors, mean,
    entropy, row_ok, code, num_codes, dim, scale, factor,
    SOFT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of score / temperature, (BLOCK_M, BLOCK_N); 0 where no code is and for rows that do not count."""
    score = tile_scores(
        x_start, x_dim, codes, c_code, c_dim, offset, row_ok, code, num_codes, dim, scale, factor,
        PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    said = tile_says(
        x_start, g_start, g_dim, values, v_code, v_dim, usage, row_ok, code, num_codes, dim,
        SOFT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    d = score - best[:, None]
    d = tl.where(d < LEAST, LEAST, d)
    return tl.exp(d) * factors[:, None] * (said - entropy * d - mean[:, None])


@triton.jit(do_not_specialize=["num_rows", "num_codes", "each"])
def _row_means(
    x, x_head, x_row, x_dim, codes, c_head, c_code, c_dim, offset, weight, usage, entropy,
    g, g_head, g_row, g_dim, values, v_head, v_code, v_dim, top, total, means, num_rows, num_codes, dim,
    each, scale, factor,
    SOFT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_M rows and a split of the codes: largest score, sum of e = exp(score - largest), and of e a."""
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = head * num_rows + n
    ok = (n < num_rows) & (tl.load(weight + at, mask=n < num_rows, other=0.0) != 0)
    said_of_entropy = tl.load(entropy + head)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    inner = tl.zeros([BLOCK_M], tl.float32)
    begin = tl.program_id(2) * each
    for first in range(begin, tl.minimum(begin + each, num_codes), BLOCK_N):
        code = first + tl.arange(0, BLOCK_N).to(tl.int64)
        score = tile_scores(
            x + head * x_head + n * x_row, x_dim, codes + head * c_head, c_code, c_dim, offset + head * num_codes, ok,
            code, num_codes, dim, scale, factor, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        said = tile_says(
            x, g + head * g_head + n * g_row, g_dim, values + head * v_head, v_code, v_dim, usage + head * num_codes,
            ok, code, num_codes, dim, SOFT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        best, shift, d = above(best, z, score)
        e = tl.exp(d)
        # a holds score - largest, which the new largest one moves.
        inner = tl.exp(shift) * (inner - said_of_entropy * shift * z) + tl.sum(e * (said - said_of_entropy * d), 1)
        z = tl.exp(shift) * z + tl.sum(e, 1)
    to = tl.program_id(2).to(tl.int64) * tl.num_programs(1) * num_rows + at
    tl.store(top + to, best, mask=n < num_rows)
    tl.store(total + to, z, mask=n < num_rows)
    tl.store(means + to, inner, mask=n < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_codes", "each"])
def _row_gradients(
    x, x_head, x_row, x_dim, codes, c_head, c_code, c_dim, offset, weight, usage, entropy,
    g, g_head, g_row, g_dim, values, v_head, v_code, v_dim, top, factors, means, dx, num_rows, num_codes, dim,
    parts, each, scale, factor,
    SOFT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """PART dims of dx of BLOCK_M rows from a split of the codes."""
    split, part = tl.program_id(2) // parts, tl.program_id(2) % parts
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = head * num_rows + n
    ok = (n < num_rows) & (tl.load(weight + at, mask=n < num_rows, other=0.0) != 0)
    best = tl.load(top + at, mask=ok, other=0.0)
    share = tl.load(factors + at, mask=ok, other=0.0)
    mean = tl.load(means + at, mask=ok, other=0.0)
    said_of_entropy = tl.load(entropy + head)
    out = part * PART + tl.arange(0, PART).to(tl.int64)
    total = tl.zeros([BLOCK_M, PART], tl.float32)
    begin = split * each
    for first in range(begin, tl.minimum(begin + each, num_codes), BLOCK_N):
        code = first + tl.arange(0, BLOCK_N).to(tl.int64)
        t = _tile(
            x + head * x_head + n * x_row, x_dim, codes + head * c_head, c_code, c_dim, offset + head * num_codes,
            usage + head * num_codes, g + head * g_head + n * g_row, g_dim, values + head * v_head, v_code, v_dim,
            best, share, mean, said_of_entropy, ok, code, num_codes, dim, scale, factor,
            SOFT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        c = codes + head * c_head + (code * c_code)[:, None] + (out * c_dim)[None, :]
        c = tl.load(c, mask=(code < num_codes)[:, None] & (out < dim)[None, :], other=0.0).to(tl.float32)
        # Tensor cores cut sums off toward zero, which would add up over many tiles: here each tile's is rounded.
        total += tl.dot(t, c, input_precision=PRECISION) * (scale * factor)
    to = dx + ((split.to(tl.int64) * tl.num_programs(1) * num_rows + at) * dim)[:, None] + out[None, :]
    tl.store(to, total.to(dx.dtype.element_ty), mask=(n < num_rows)[:, None] & (out < dim)[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_codes", "chunk"])
def _code_gradients(
    x, x_head, x_row, x_dim, codes, c_head, c_code, c_dim, offset, weight, usage, entropy,
    g, g_head, g_row, g_dim, values, v_head, v_code, v_dim, top, factors, means, partial, num_rows, num_codes, dim,
    parts, chunk, scale, factor, own,
    SOFT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """PART dims of dcodes of BLOCK_N codes from one chunk of rows; ``own`` is 1 if squared, else 0."""
    which, part = (tl.program_id(2) // parts).to(tl.int64), tl.program_id(2) % parts
    head = tl.program_id(1).to(tl.int64)
    code = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    out = part * PART + tl.arange(0, PART).to(tl.int64)
    stop = tl.minimum((which + 1) * chunk, num_rows)
    said_of_entropy = tl.load(entropy + head)
    total = tl.zeros([BLOCK_N, PART], tl.float32)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for first in range(which * chunk, stop, BLOCK_M):
        n = first + tl.arange(0, BLOCK_M)
        at = head * num_rows + n
        ok = (n < stop) & (tl.load(weight + at, mask=n < stop, other=0.0) != 0)
        x_start = x + head * x_head + n * x_row
        t = _tile(
            x_start, x_dim, codes + head * c_head, c_code, c_dim, offset + head * num_codes, usage + head * num_codes,
            g + head * g_head + n * g_row, g_dim, values + head * v_head, v_code, v_dim,
            tl.load(top + at, mask=ok, other=0.0), tl.load(factors + at, mask=ok, other=0.0),
            tl.load(means + at, mask=ok, other=0.0), said_of_entropy, ok, code, num_codes, dim, scale, factor,
            SOFT, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        rows = tl.load(x_start[:, None] + (out * x_dim)[None, :], mask=ok[:, None] & (out < dim)[None, :], other=0.0)
        total += tl.dot(tl.trans(t), rows.to(tl.float32), input_precision=PRECISION) * (scale * factor)
        sums += tl.sum(t, 0)
    inside = (code < num_codes)[:, None] & (out < dim)[None, :]
    c = tl.load(codes + head * c_head + (code * c_code)[:, None] + (out * c_dim)[None, :], mask=inside, other=0.0)
    value = total - (sums * (scale * factor * own))[:, None] * c.to(tl.float32)
    to = partial + ((which * tl.num_programs(1) + head) * num_codes + code) * dim
    tl.store(to[:, None] + out[None, :], value, mask=inside)


def supports(
    x: Tensor,
    codes: Tensor,
    weight: Tensor,
    grad_entropy: Tensor | None,
    grad_usage: Tensor | None,
    grad_soft: Tensor | None,
    values: Tensor | None,
    squared: bool,
    temperature: float,
) -> str | None:
    """Up to 256 dims, any strides; float32, float16 and bfloat16, mixed at will."""
    if x.shape[2] > MOST_DIMS:
        return f"x has {x.shape[2]} dims: beyond {MOST_DIMS} scores are made too often to beat the reference"
    soft = {} if grad_soft is None or values is None else {"grad_soft": grad_soft, "values": values}
    return _triton.unsupported_dtype(_triton.SCREEN_DTYPES, x=x, codes=codes, **soft)


def run(
    x: Tensor,
    codes: Tensor,
    weight: Tensor,
    grad_entropy: Tensor | None,
    grad_usage: Tensor | None,
    grad_soft: Tensor | None,
    values: Tensor | None,
    squared: bool,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Three launches; torch adds up the splits of the codes and the chunks of rows, where there are several."""
    h, n, d = x.shape
    k = codes.shape[1]
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device), codes.new_zeros(codes.shape, dtype=torch.float32)
    x, codes, weight = soft_scores.dense(x), soft_scores.dense(codes), weight.to(torch.float32).contiguous()
    entropy = codes.new_zeros(h, dtype=torch.float32) if grad_entropy is None else grad_entropy.float().contiguous()
    usage = codes.new_zeros((h, k), dtype=torch.float32) if grad_usage is None else grad_usage.float().contiguous()
    offset = codes.float().square().sum(-1) if squared else codes.new_zeros((h, k), dtype=torch.float32)
    soft = grad_soft is not None and values is not None
    g, v = map(soft_scores.dense, (grad_soft, values) if grad_soft is not None and values is not None else (x, codes))
    machine = soft_scores.machine(x.device, d, soft)
    splits, each = soft_scores.splits(h, n, k, (machine.scores, machine.dx))
    chunks, chunk = soft_scores.chunks(h, n, k, machine.dcodes, max(1, CHUNK_ELEMENTS // (h * k * d)))
    stats = [torch.empty((splits, h, n), dtype=torch.float32, device=x.device) for _ in range(3)]
    partial = torch.empty((chunks, *codes.shape), dtype=torch.float32, device=x.device)
    kind = x.dtype if splits == 1 else torch.float32
    dx = torch.empty((splits, *x.shape), dtype=kind, device=x.device)
    given = (
        x, *_triton.strides(x), codes, *_triton.strides(codes), offset.contiguous(), weight, usage, entropy,
        g, *_triton.strides(g), v, *_triton.strides(v),
    )  # fmt: skip
    part = min(PART, max(16, _triton.power_of_two(d)))
    parts = _triton.ceil_div(d, part)
    options = {"SOFT": soft, "PRECISION": machine.precision, "enable_fp_fusion": False}
    numbers = (2.0 if squared else 1.0, 1.0 / temperature)
    with _triton.on_device(x):
        tile = machine.scores
        _row_means[(_triton.ceil_div(n, tile.rows), h, splits)](
            *given, *stats, n, k, d, each, *numbers, **options, **tile.options(d)
        )
        top, total, inner = soft_scores.merged(stats, entropy[:, None])
        of_rows = (top, weight / total, inner / total)
        tile = machine.dx
        _row_gradients[(_triton.ceil_div(n, tile.rows), h, splits * parts)](
            *given, *of_rows, dx, n, k, d, parts, each, *numbers, **options, **tile.options(d), PART=part
        )
        tile = machine.dcodes
        _code_gradients[(_triton.ceil_div(k, tile.codes), h, chunks * parts)](
            *given, *of_rows, partial, n, k, d, parts, chunk, *numbers, float(squared), **options, **tile.options(d),
            PART=part,
        )  # fmt: skip
    dx = dx[0] if splits == 1 else dx.sum(0).to(x.dtype)
    return dx, partial[0] if chunks == 1 else partial.sum(0)
