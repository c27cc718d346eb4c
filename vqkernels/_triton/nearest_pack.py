# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
"""Triton kernels that bring codes and rows into screen units: scaled float16 operands, and what the error bound needs.

Called by ``ops/nearest/triton.py``. A row is a = 2^p (x - c), a code b = 2^q (e - c) (c: the mean code for "l2", else
0; "cosine": b = 2^14 e / |e|), p per row and q per head, so that the largest element lies in [2^14, 2^15). The score to
maximise is t = a.b - f |b|^2 / 2 with f = 2^(p-q) ("l2") or t = a.b. METRIC is 0 for "l2", 1 for "cosine", 2 for "dot".
FOLDED: the contraction has three dims to spare, which hold the bias, f 2^18 on the row's side and 2^-18 |b|^2 / 2 in
three float16 on the code's. docs/gpu.md has the bound.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Marks of a code that the screen leaves out, in place of its largest element.
NEVER_WINS = tl.constexpr(-1.0)
NEEDS_SCAN = tl.constexpr(-2.0)
# Dims that hold the bias, and the exponent that keeps both sides of its products in float16's range.
BIAS_DIMS = tl.constexpr(3)
BIAS_EXPONENT = tl.constexpr(18)


@triton.jit
def finite(value):
    """False for NaN and infinities."""
    return tl.abs(value) < float("inf")


@triton.jit
def power(exponent):
    """2^exponent in float32, exact; int32 exponents in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_codes", "every", "sampled"])
def code_centre(
    e, e_head, e_code, e_dim, centre, num_codes, every, sampled, dim,
    HALF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean of every ``every``-th code. Any centre is right, this one makes the numbers small.

    With 16-bit codes and rows (HALF) products are exact, except in dims that lie far from 0: there it pays to shift.
    """
    head = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    square = tl.zeros([BLOCK_D], tl.float32)
    count = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, sampled, BLOCK_N):
        code = (first + tl.arange(0, BLOCK_N)) * every
        at = e + head * e_head + code.to(tl.int64)[:, None] * e_code + d.to(tl.int64)[None, :] * e_dim
        value = tl.load(at, mask=(code < num_codes)[:, None] & (d < dim)[None, :], other=float("nan")).to(tl.float32)
        known = finite(value)
        value = tl.where(known, value, 0.0)
        total += tl.sum(value, 0)
        square += tl.sum(value * value, 0)
        count += tl.sum(known.to(tl.float32), 0)
    mean = total / tl.maximum(count, 1.0)
    if HALF:
        # |mean| > 2 standard deviations, i.e. 5/4 mean^2 > mean of squares; / 4 apart, so that neither overflows first.
        mean = tl.where(mean * mean > 0.8 * (square / tl.maximum(count, 1.0)), mean, 0.0)
    tl.store(centre + head * dim + d, tl.where(finite(mean), mean, 0.0), mask=d < dim)


@triton.jit(do_not_specialize=["num_codes"])
def code_stats(
    e, e_head, e_code, e_dim, centre, largest, norms, tops, num_codes, dim,
    METRIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Per code: the largest |e - c| or a mark, and for "cosine" |e| in float64, summed in the contract's order.

    Per program, in ``tops``: the largest of all, infinity if one of its codes needs a scan.
    """
    head = tl.program_id(1).to(tl.int64)
    code = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = code < num_codes
    start = e + head * e_head + code.to(tl.int64) * e_code
    most = tl.zeros([BLOCK_N], tl.float32)
    nan = tl.zeros([BLOCK_N], tl.int32)
    wild = tl.zeros([BLOCK_N], tl.int32)
    for first in range(0, dim, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = ok[:, None] & (d < dim)[None, :]
        value = tl.load(start[:, None] + d.to(tl.int64)[None, :] * e_dim, mask=mask, other=0.0).to(tl.float32)
        shifted = value
        if METRIC == 0:
            shifted = value - tl.load(centre + head * dim + d, mask=d < dim, other=0.0)[None, :]
        shifted = tl.where(mask, shifted, 0.0)
        # An infinity is no winner but for "dot"; a finite value whose difference overflows may be one.
        if METRIC == 2:
            judged = (tl.abs(value) == float("inf")).to(tl.int32)
        else:
            judged = ((shifted == shifted) & (finite(shifted) == 0) & finite(value)).to(tl.int32)
        wild = wild | tl.max(judged, 1)
        nan = nan | tl.max(((finite(value) == 0) & (judged == 0)).to(tl.int32), 1)
        most = tl.maximum(most, tl.max(tl.where(finite(shifted), tl.abs(shifted), 0.0), 1))
    most = tl.where(wild != 0, NEEDS_SCAN, most)
    most = tl.where(nan != 0, NEVER_WINS, most)
    tl.store(largest + head * num_codes + code, most, mask=ok)
    top = tl.max(tl.where(most == NEEDS_SCAN, float("inf"), tl.maximum(most, 0.0)), 0)
    tl.store(tops + head * tl.num_programs(0) + tl.program_id(0), top)
    if METRIC == 1:
        total = tl.zeros([BLOCK_N], tl.float64)
        for _ in range(0, dim):
            value = tl.load(start, mask=ok, other=0.0).to(tl.float64)
            total += value * value
            start += e_dim
        tl.store(norms + head * num_codes + code, tl.sqrt(total), mask=ok)


@triton.jit(do_not_specialize=["num_codes", "blocks", "tiles"])
def pack_codes(
    e, e_head, e_code, e_dim, centre, largest, norms, tops, exponent, head_scan, packed, bias, bounds, num_codes,
    blocks, dim, padded_dim, tiles, accumulation, keep,
    METRIC: tl.constexpr, SPLIT: tl.constexpr, FOLDED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of codes: float16 operands, bias -|b|^2 / 2, and the tile's (reach, spread, offset).

    Every program finds the head's q again from ``tops``, the first one writes it down for the rows: one launch less.
    """
    head = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    code = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mark = tl.load(largest + head * num_codes + code, mask=code < num_codes, other=-1.0)
    usable = mark >= 0.0
    start = e + head * e_head + code.to(tl.int64) * e_code
    out = packed + (head * tiles * BLOCK_N + code) * padded_dim
    top = tl.zeros([BLOCK], tl.float32)
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.load(tops + head * blocks + block, mask=block < blocks, other=0.0))
    most = tl.max(top, 0)
    q = most.to(tl.int32) * 0 + 14
    if METRIC != 1:
        # most in [2^order, 2^(order + 1)); nothing but zeros fits any q.
        order = ((most.to(tl.int32, bitcast=True) >> 23) & 255) - 127
        q = tl.where(most == 0, 15, tl.minimum(tl.maximum(14 - order, -120), 100))
    if tile == 0:
        scan = (most == float("inf")) | ((most > 0) & (most < 8.6736174e-19))  # 2^-60
        tl.store(exponent + head, q)
        tl.store(head_scan + head, scan.to(tl.int32))
    scale = power(q)
    inverse = tl.zeros([BLOCK_N], tl.float64)
    if METRIC == 1:
        norm = tl.load(norms + head * num_codes + code, mask=usable, other=0.0)
        inverse = tl.where(norm > 0, 16384.0 / tl.where(norm > 0, norm, 1.0), 0.0)
    square = tl.zeros([BLOCK_N], tl.float32)
    error = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, padded_dim, BLOCK_D):
        j = first + tl.arange(0, BLOCK_D)
        if SPLIT:
            d = j % dim
            part = j // dim
        else:
            d = j
            part = j // padded_dim
        inside = (j < 3 * dim) if SPLIT else (j < dim)
        mask = usable[:, None] & inside[None, :]
        value = tl.load(start[:, None] + d.to(tl.int64)[None, :] * e_dim, mask=mask, other=0.0).to(tl.float32)
        if METRIC == 1:
            value = (value.to(tl.float64) * inverse[:, None]).to(tl.float32)
        elif METRIC == 2:
            value = value * scale
        else:
            value = (value - tl.load(centre + head * dim + d, mask=inside, other=0.0)[None, :]) * scale
        value = tl.where(mask, value, 0.0)
        high = value.to(tl.float16)
        rest = value - high.to(tl.float32)
        operand = high
        if SPLIT:  # codes are [e1 e1 e2], rows [x1 x2 x1]
            low = rest.to(tl.float16)
            rest = rest - low.to(tl.float32)
            operand = tl.where((part == 2)[None, :], low, high)
        if FOLDED:  # the bias is stored by other threads of the program: not twice
            last = 3 * dim if SPLIT else dim
            tl.store(out[:, None] + j[None, :], operand, mask=((j < last) | (j >= last + BIAS_DIMS))[None, :])
        else:
            tl.store(out[:, None] + j[None, :], operand)
        counted = (part == 0)[None, :]
        square += tl.sum(tl.where(counted, value * value, 0.0), 1)
        error += tl.sum(tl.where(counted, rest * rest, 0.0), 1)
    sums = 1.1920929e-07 * (dim + 32)  # 2^-23: rounding of the float32 sums of squares
    floor = 4.7019774e-38 * (dim + 32)  # 2^-124: squares that underflow
    decision = 1.7763568e-15 * (dim + 4)  # 2^-49: rounding of the float64 decision
    reach = tl.sqrt(square * (1 + sums) + floor) * 1.000004
    # 2^-22 |b|: rounding of e - c and of the conversion to float32.
    residual = tl.sqrt(error * (1 + sums) + floor) * 1.000004 + 2.3841858e-07 * reach
    half = square / 2 if METRIC == 0 else square * 0
    spread = keep * residual + (accumulation + decision) * (reach + residual) * 1.02 + 4.7683716e-07 * reach
    if SPLIT:  # x2.e2 is left out: |x2| <= 2^-11 |x|, |e2| <= 2^-11 |e|, plus float16's subnormal steps
        spread += 4.7683716e-07 * reach + 9.3132257e-10
    if FOLDED:
        # Products that fold the bias in add up to (1 + 2^-10) of it; 2^-25 of their unit, 2^18, is lost to float16's
        # subnormal steps. Its 24 bits in three times 11; a code that cannot win is minus infinity.
        offset = half * (accumulation * 1.002 + sums + 4.7683716e-07 + decision) + 0.0078125
        last = 3 * dim if SPLIT else dim
        rest = half * 3.8146973e-06  # 2^-18
        for k in tl.static_range(BIAS_DIMS):
            piece = rest.to(tl.float16)
            rest = rest - piece.to(tl.float32)
            tl.store(out + last + k, tl.where(usable, -piece, float("-inf") if k == 0 else 0.0))
    else:
        offset = half * (accumulation + sums + 4.7683716e-07 + decision) + 7.8886091e-31
        tl.store(bias + head * tiles * BLOCK_N + code, tl.where(usable, -half, float("-inf")))
    at = bounds + (head * tiles + tile) * 3
    tl.store(at, tl.max(tl.where(usable, reach, 0.0), 0))
    tl.store(at + 1, tl.max(tl.where(usable, spread, 0.0), 0) * 1.000004)
    tl.store(at + 2, tl.max(tl.where(usable, offset, 0.0), 0) * 1.000004)


@triton.jit(do_not_specialize=["first_row", "rows", "num_rows", "inner"])
def pack_rows(
    x, x_head, x_batch, x_row, x_dim, centre, exponent, head_scan, packed, info, first_row, rows, num_rows, inner, dim,
    padded_dim, keep,
    METRIC: tl.constexpr, SPLIT: tl.constexpr, FOLDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows [first_row, first_row + rows): operands, and f, |a|, |a - a^|, an offset, 1 where no bound holds."""
    head = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (first_row + r).to(tl.int64)
    ok = (r < rows) & (n < num_rows)
    start = x + head * x_head + n // inner * x_batch + n % inner * x_row
    most = tl.zeros([BLOCK_M], tl.float32)
    bad = tl.zeros([BLOCK_M], tl.int32)
    for first in range(0, dim, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = ok[:, None] & (d < dim)[None, :]
        value = tl.load(start[:, None] + d.to(tl.int64)[None, :] * x_dim, mask=mask, other=0.0).to(tl.float32)
        if METRIC == 0:
            value = value - tl.load(centre + head * dim + d, mask=d < dim, other=0.0)[None, :]
        value = tl.where(mask, value, 0.0)
        bad = bad | tl.max((finite(value) == 0).to(tl.int32), 1)
        most = tl.maximum(most, tl.max(tl.where(finite(value), tl.abs(value), 0.0), 1))
    q = tl.load(exponent + head)
    order = ((most.to(tl.int32, bitcast=True) >> 23) & 255) - 127  # most in [2^order, 2^(order + 1))
    p = 14 - order
    # The exponent of the largest code is 14 - q: a row that dwarfs every code has no usable f.
    unsafe = (bad != 0) | ((most > 0) & (order < -100))
    if METRIC == 0:
        if FOLDED:  # f 2^18 is a float16, 2^-24 to 2^15
            unsafe = unsafe | (order - (14 - q) > 42)
            p = tl.minimum(p, q + 15 - BIAS_EXPONENT)
        else:
            unsafe = unsafe | (order - (14 - q) > 60)
            p = tl.minimum(p, q + 40)
    unsafe = unsafe | (tl.load(head_scan + head) != 0)
    p = tl.minimum(tl.maximum(p, -120), 120)
    p = tl.where(unsafe, 0, p)
    scale = power(p)
    f = tl.full([BLOCK_M], 1.0, tl.float32)
    if METRIC == 0:
        f = tl.where(unsafe, 1.0, power(tl.where(unsafe, 0, p - q)))
    square = tl.zeros([BLOCK_M], tl.float32)
    error = tl.zeros([BLOCK_M], tl.float32)
    out = packed + (head * rows + r) * padded_dim
    for first in range(0, padded_dim, BLOCK_D):
        j = first + tl.arange(0, BLOCK_D)
        if SPLIT:
            d = j % dim
            part = j // dim
        else:
            d = j
            part = j // padded_dim
        inside = (j < 3 * dim) if SPLIT else (j < dim)
        mask = (ok & (unsafe == 0))[:, None] & inside[None, :]
        value = tl.load(start[:, None] + d.to(tl.int64)[None, :] * x_dim, mask=mask, other=0.0).to(tl.float32)
        if METRIC == 0:
            value = value - tl.load(centre + head * dim + d, mask=inside, other=0.0)[None, :]
        value = tl.where(mask, value * scale[:, None], 0.0)
        high = value.to(tl.float16)
        rest = value - high.to(tl.float32)
        operand = high
        if SPLIT:
            low = rest.to(tl.float16)
            rest = rest - low.to(tl.float32)
            operand = tl.where((part == 1)[None, :], low, high)
        if FOLDED:
            last = 3 * dim if SPLIT else dim
            factor = tl.where(unsafe, 1.0, f * 262144.0) if METRIC == 0 else f  # 2^18
            operand = tl.where(((j >= last) & (j < last + BIAS_DIMS))[None, :], factor.to(tl.float16)[:, None], operand)
        tl.store(out[:, None] + j[None, :], operand, mask=(r < rows)[:, None])
        counted = (part == 0)[None, :]
        square += tl.sum(tl.where(counted, value * value, 0.0), 1)
        error += tl.sum(tl.where(counted, rest * rest, 0.0), 1)
    sums = 1.1920929e-07 * (dim + 32)
    floor = 4.7019774e-38 * (dim + 32)
    length = tl.sqrt(square * (1 + sums) + floor) * 1.000004
    residual = tl.sqrt(error * (1 + sums) + floor) * 1.000004 + 2.3841858e-07 * length
    at = info + head * 5 * rows + r
    tl.store(at, f, mask=r < rows)
    tl.store(at + rows, (length + residual) * 1.000004, mask=r < rows)
    tl.store(at + 2 * rows, keep * residual, mask=r < rows)
    offset = 1.7763568e-15 * (dim + 4) * length * (length / f) if METRIC == 0 else length * 0
    tl.store(at + 3 * rows, offset, mask=r < rows)
    tl.store(at + 4 * rows, (unsafe | (ok == 0)).to(tl.float32), mask=r < rows)
