"""Floats of the PTX machine, against exact fractions that are rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
from ptx_truth import (
    BF16,
    EDGES,
    F16,
    F32,
    F64,
    FORMATS,
    NAN,
    Format,
    Value,
    canonical_nan,
    check,
    evaluate,
    floats,
    flushed,
    infinity,
    integers,
    pairs,
    rounded,
    sign,
    signed,
    value,
)

DIRECTIONS = ("rn", "rz", "rm", "rp")
INFINITE = (math.inf, -math.inf)


def is_nan(bits: int, f: Format) -> bool:
    return bits & canonical_nan(f) > infinity(f)


def plus(a: Value, b: Value) -> Value:
    if NAN in (a, b) or (a in INFINITE and b in INFINITE and a != b):
        return NAN
    return a if a in INFINITE else b if b in INFINITE else Fraction(a) + Fraction(b)


def times(a: Value, b: Value) -> Value:
    if NAN in (a, b) or (a in INFINITE and b == 0) or (b in INFINITE and a == 0):
        return NAN
    if a in INFINITE or b in INFINITE:
        return math.inf if (a > 0) == (b > 0) else -math.inf
    return Fraction(a) * Fraction(b)


def over(a: Value, b: Value) -> Value:
    if NAN in (a, b) or (a in INFINITE and b in INFINITE) or (a == 0 and b == 0):
        return NAN
    if b in INFINITE:
        return Fraction(0)
    return math.inf if a in INFINITE or b == 0 else Fraction(a) / Fraction(b)


def bits_of(x: Value, f: Format, mode: str, negative: bool) -> int:
    """``negative``: of zeros, infinities."""
    if x == NAN:
        return canonical_nan(f)
    if x in INFINITE:
        return infinity(f) | negative << sum(f)
    return rounded(Fraction(x), f, mode, negative)


def sum_of(a: int, b: int, f: Format, mode: str) -> int:
    x = plus(value(a, f), value(b, f))
    # Zeros of one sign keep it; other zeros are negative only when rounding down.
    both = value(a, f) == value(b, f) == 0 and sign(a, f) == sign(b, f)
    negative = bool(sign(a, f)) if both else x == -math.inf or (x == 0 and mode == "rm")
    return bits_of(x, f, mode, negative)


def product_of(a: int, b: int, f: Format, mode: str) -> int:
    return bits_of(times(value(a, f), value(b, f)), f, mode, sign(a, f) != sign(b, f))


def quotient_of(a: int, b: int, f: Format, mode: str) -> int:
    return bits_of(over(value(a, f), value(b, f)), f, mode, sign(a, f) != sign(b, f))


def fma_of(a: int, b: int, c: int, f: Format, mode: str) -> int:
    product, third = times(value(a, f), value(b, f)), value(c, f)
    x = plus(product, third)
    negative_product = sign(a, f) != sign(b, f)
    both = product == third == 0 and negative_product == sign(c, f)
    negative = negative_product if both else x == -math.inf or (x == 0 and mode == "rm")
    return bits_of(x, f, mode, negative)


def difference_of(a: int, b: int, f: Format, mode: str) -> int:
    return sum_of(a, b if is_nan(b, f) else b ^ 1 << sum(f), f, mode)


def root_of(a: int, f: Format, mode: str) -> int:
    x = value(a, f)
    if x == NAN or x < 0:
        return canonical_nan(f)
    if x in INFINITE or x == 0:
        return a
    # An integer root of some 100 bits; its last bit says that more follow.
    shift = 120 - (x.numerator.bit_length() - x.denominator.bit_length()) // 2
    scaled = x * Fraction(4) ** shift
    root = math.isqrt(scaled.numerator // scaled.denominator)
    exact = Fraction(root) ** 2 == scaled
    return rounded((Fraction(root) + (0 if exact else Fraction(1, 2))) / Fraction(2) ** shift, f, mode)


def check_floats(line: str, f: Format, truth: Callable[..., int], *columns: list[int]) -> None:
    """NaNs of double precision keep payloads, which the manual does not define: any NaN passes there."""
    type_ = next(name for name, of in FORMATS.items() if of == f)
    if f != F64:
        check(line, type_, truth, *((type_, column) for column in columns))
        return
    found = evaluate(line, type_, *((type_, column) for column in columns))
    for got, row in zip(found, zip(*columns, strict=True), strict=True):
        expected = truth(*row)
        same = got == expected or (is_nan(got, f) and is_nan(expected, f))
        assert same, f"{line} of {[hex(x) for x in row]}: {got:#x}, not {expected:#x}"


def two(f: Format, n: int = 120) -> tuple[list[int], list[int]]:
    return pairs(floats(f, 150), floats(f, 150, 1), n, EDGES)


def three(f: Format) -> tuple[list[int], list[int], list[int]]:
    a, b = two(f)
    return a, b, [floats(f, 150, 2)[k * 7 % 150] for k in range(len(a))]


def cancelling(f: Format) -> tuple[list[int], list[int], list[int]]:
    """Products that nearly cancel against the third: two roundings would show."""
    a, b = floats(f, 150)[EDGES:99], floats(f, 150, 5)[EDGES:99]
    return a, b, [product_of(x, y, f, "rz") ^ 1 << sum(f) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("mode", DIRECTIONS)
@pytest.mark.parametrize("t", ["f32", "f64"])
def test_arithmetic_rounds_once(t: str, mode: str) -> None:
    f = FORMATS[t]
    for op, truth in (("add", sum_of), ("sub", difference_of), ("mul", product_of), ("div", quotient_of)):
        check_floats(f"{op}.{mode}.{t} %d, %a, %b;", f, lambda a, b, g=truth: g(a, b, f, mode), *two(f))
    for columns in (three(f), cancelling(f)):
        check_floats(f"fma.{mode}.{t} %d, %a, %b, %c;", f, lambda a, b, c: fma_of(a, b, c, f, mode), *columns)
    one = rounded(Fraction(1), f)
    column = floats(f, 300)
    check_floats(f"rcp.{mode}.{t} %d, %a;", f, lambda a: quotient_of(one, a, f, mode), column)
    check_floats(f"sqrt.{mode}.{t} %d, %a;", f, lambda a: root_of(a, f, mode), column)


def test_products_and_sums_that_are_apart_are_not_fused() -> None:
    for t, f in (("f32", F32), ("f64", F64)):
        for suffix in (f".{t}", f".rn.{t}"):
            line = f"mul{suffix} %d, %a, %b; add{suffix} %d, %d, %c;"
            apart = lambda a, b, c, f=f: sum_of(product_of(a, b, f, "rn"), c, f, "rn")  # noqa: E731
            check_floats(line, f, apart, *cancelling(f))


@pytest.mark.parametrize("mode", DIRECTIONS)
def test_ftz_and_sat(mode: str) -> None:
    def saturated(bits: int) -> int:
        x = value(bits, F32)
        return 0 if x == NAN or x <= 0 else min(bits, 0x3F800000)

    def ftz(truth: Callable[..., int]) -> Callable[..., int]:
        return lambda *row: flushed(truth(*(flushed(x) for x in row)))

    for op, of in (("add", sum_of), ("mul", product_of)):
        truth = lambda a, b, g=of: g(a, b, F32, mode)  # noqa: E731
        check(f"{op}.{mode}.ftz.f32 %d, %a, %b;", "f32", ftz(truth), *(("f32", c) for c in two(F32)))
        both = lambda *row, g=truth: saturated(g(*row))  # noqa: E731
        check(f"{op}.{mode}.sat.f32 %d, %a, %b;", "f32", both, *(("f32", c) for c in two(F32)))
    truth = lambda a, b, c: saturated(ftz(lambda *row: fma_of(*row, F32, mode))(a, b, c))  # noqa: E731
    check(f"fma.{mode}.ftz.sat.f32 %d, %a, %b, %c;", "f32", truth, *(("f32", c) for c in three(F32)))


def extreme(a: int, b: int, f: Format, lower: bool, nan: bool) -> int:
    if is_nan(a, f) or is_nan(b, f):
        return canonical_nan(f) if nan or (is_nan(a, f) and is_nan(b, f)) else b if is_nan(a, f) else a
    key = lambda x: (value(x, f), -sign(x, f))  # noqa: E731  -0 is less than +0
    return min(a, b, key=key) if lower else max(a, b, key=key)


@pytest.mark.parametrize("t", ["f16", "bf16", "f32", "f64"])
def test_minimum_and_maximum(t: str) -> None:
    f = FORMATS[t]
    for op, lower in (("min", True), ("max", False)):
        check_floats(f"{op}.{t} %d, %a, %b;", f, lambda a, b, low=lower: extreme(a, b, f, low, False), *two(f))
        if f != F64:
            check_floats(f"{op}.NaN.{t} %d, %a, %b;", f, lambda a, b, low=lower: extreme(a, b, f, low, True), *two(f))
    if f == F32:
        top = 1 << 31

        def xorsign(a: int, b: int) -> int:
            result = extreme(a & ~top, b & ~top, f, True, False)
            return result if is_nan(result, f) else result | ((a ^ b) & top)

        check_floats("min.xorsign.abs.f32 %d, %a, %b;", f, xorsign, *two(f))
        small = lambda a, b: flushed(extreme(flushed(a), flushed(b), f, True, False))  # noqa: E731
        check_floats("min.ftz.f32 %d, %a, %b;", f, small, *two(f))


@pytest.mark.parametrize("t", ["f16", "bf16", "f32", "f64"])
def test_signs(t: str) -> None:
    f = FORMATS[t]
    top = 1 << sum(f)
    check_floats(f"neg.{t} %d, %a;", f, lambda a: a ^ top, floats(f, 100))
    check_floats(f"abs.{t} %d, %a;", f, lambda a: a & ~top, floats(f, 100))
    if f in (F32, F64):
        check_floats(f"copysign.{t} %d, %a, %b;", f, lambda a, b: b & ~top | a & top, *two(f))


@pytest.mark.parametrize("t", ["f16", "bf16"])
def test_half_precision_rounds_once(t: str) -> None:
    f = F16 if t == "f16" else BF16
    half = lambda truth: lambda *row: truth(*row, f, "rn")  # noqa: E731
    for op, truth in (("add", sum_of), ("sub", difference_of), ("mul", product_of)):
        check_floats(f"{op}.rn.{t} %d, %a, %b;", f, half(truth), *two(f))
        upper, lower = two(f), two(f)[::-1]
        packed = [[h << 16 | low for h, low in zip(x, y, strict=True)] for x, y in zip(upper, lower, strict=True)]
        twice = lambda a, b, g=truth: g(a >> 16, b >> 16, f, "rn") << 16 | g(a & 0xFFFF, b & 0xFFFF, f, "rn")  # noqa: E731
        check(f"{op}.{t}x2 %d, %a, %b;", f"{t}x2", twice, *((f"{t}x2", column) for column in packed))
    for columns in (three(f), cancelling(f)):
        check_floats(f"fma.rn.{t} %d, %a, %b, %c;", f, half(fma_of), *columns)

    def relu(a: int, b: int, c: int) -> int:
        bits = fma_of(a, b, c, f, "rn")
        return 0 if bits >> 15 else bits

    check_floats(f"fma.rn.relu.{t} %d, %a, %b, %c;", f, relu, *three(f))


def near(x: float, f: Format = F32) -> int:
    """The nearest of a format."""
    if math.isnan(x):
        return canonical_nan(f)
    return bits_of(x if math.isinf(x) else Fraction(x), f, "rn", math.copysign(1, x) < 0)


def test_approximations() -> None:
    """What a GPU gives is near these; here they are the nearest float."""

    def power(x: float) -> float:
        return 2.0**x if x < 1000 else math.inf

    def logarithm(x: float) -> float:
        return math.log2(x) if x > 0 else -math.inf if x == 0 else math.nan

    def root(x: float) -> float:
        return math.sqrt(x) if x >= 0 else math.nan

    def inverse_root(x: float) -> float:
        return math.copysign(math.inf, x) if x == 0 else 1 / math.sqrt(x) if x > 0 else math.nan

    def inverse(x: float) -> float:
        return math.copysign(math.inf, x) if x == 0 else 1 / x

    def apply(g: Callable[[float], float], bits: int) -> int:
        x = value(bits, F32)
        if x == NAN:
            return canonical_nan(F32)
        return near(g(math.copysign(0.0, -sign(bits, F32)) if x == 0 else float(x)))

    column = [x for x in floats(F32, 300) if (x & 0x7FFFFFFF) < 0x7F800000]
    for op, g in {"ex2": power, "lg2": logarithm, "sqrt": root, "rsqrt": inverse_root, "rcp": inverse}.items():
        for ftz, edge in (("", lambda x: x), (".ftz", flushed)):
            truth = lambda a, g=g, e=edge: e(apply(g, e(a)))  # noqa: E731
            found = evaluate(f"{op}.approx{ftz}.f32 %d, %a;", "f32", ("f32", column))
            for got, bits in zip(found, column, strict=True):
                # The host's own functions may be off by one where Python's is not.
                assert abs(got - truth(bits)) <= 1, f"{op}{ftz} of {bits:#x}: {got:#x}, not {truth(bits):#x}"
    # 2^x of halves is exact where x is an integer; bf16 flushes what is below 2^-126.
    for t, op in (("f16", "ex2.approx.f16"), ("bf16", "ex2.approx.ftz.bf16")):
        f = FORMATS[t]
        whole = [rounded(Fraction(k), f) for k in range(-150, 140)]
        powers = lambda a, f=f: rounded(Fraction(2) ** int(value(a, f)), f)  # noqa: E731
        truth = (lambda a, g=powers: flushed(g(a), BF16)) if f == BF16 else powers
        check_floats(f"{op} %d, %a;", f, truth, whole)
        check_floats(f"tanh.approx.{t} %d, %a;", f, lambda a, f=f: near(math.tanh(float(value(a, f))), f), whole)
    for how in ("approx", "full"):
        check_floats(f"div.{how}.f32 %d, %a, %b;", F32, lambda a, b: quotient_of(a, b, F32, "rn"), *two(F32))


COMPARISONS: dict[str, Callable[[Value, Value], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@pytest.mark.parametrize("t", ["f16", "bf16", "f32", "f64"])
def test_comparisons_with_nan(t: str) -> None:
    f = FORMATS[t]
    columns = [(t, column) for column in two(f)]
    for name, of in COMPARISONS.items():
        for suffix in ("", "u"):

            def truth(a: int, b: int, of: Callable[[Value, Value], bool] = of, unordered: bool = suffix == "u") -> int:
                return unordered if is_nan(a, f) or is_nan(b, f) else of(value(a, f), value(b, f))

            check(f"setp.{'neu' if name + suffix == 'neu' else name + suffix}.{t} %d, %a, %b;", "pred", truth, *columns)
    check(f"setp.nan.{t} %d, %a, %b;", "pred", lambda a, b: is_nan(a, f) or is_nan(b, f), *columns)
    check(f"setp.num.{t} %d, %a, %b;", "pred", lambda a, b: not (is_nan(a, f) or is_nan(b, f)), *columns)


def test_comparisons_flush() -> None:
    values = [("f32", [1, 0x80000001, 0x7FFFFF, 0x800000]), ("f32", [0, 0, 0, 0])]
    assert evaluate("setp.eq.ftz.f32 %d, %a, %b;", "pred", *values) == [1, 1, 1, 0]
    assert evaluate("setp.eq.f32 %d, %a, %b;", "pred", *values) == [0, 0, 0, 0]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_comparisons_of_integers(bits: int) -> None:
    a, b = pairs(integers(bits, 60), integers(bits, 60, 1), 100)
    columns = (f"u{bits}", a), (f"u{bits}", b)
    for name, of in COMPARISONS.items():
        check(f"setp.{name}.u{bits} %d, %a, %b;", "pred", lambda x, y, of=of: of(x, y), *columns)
        by_sign = lambda x, y, of=of: of(signed(x, bits), signed(y, bits))  # noqa: E731
        check(f"setp.{name}.s{bits} %d, %a, %b;", "pred", by_sign, *columns)
        check(f"set.{name}.u32.s{bits} %d, %a, %b;", "u32", lambda x, y, t=by_sign: 0xFFFFFFFF * t(x, y), *columns)
        check(f"set.{name}.f32.s{bits} %d, %a, %b;", "f32", lambda x, y, t=by_sign: 0x3F800000 * t(x, y), *columns)
    for name, as_name in UNSIGNED.items():
        check(f"setp.{name}.u{bits} %d, %a, %b;", "pred", COMPARISONS[as_name], *columns)


def test_comparisons_are_combined() -> None:
    rows = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    columns = [(t, [row[k] for row in rows]) for k, t in enumerate(("u32", "u32", "pred"))]
    for name, of in {"and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y}.items():
        check(f"setp.eq.{name}.u32 %d, %a, %b, %c;", "pred", lambda a, b, c, of=of: of(a == b, c), *columns)
        check(f"setp.eq.{name}.u32 %d, %a, %b, !%c;", "pred", lambda a, b, c, of=of: of(a == b, not c), *columns)
        check(f"setp.eq.{name}.u32 _|%d, %a, %b, %c;", "pred", lambda a, b, c, of=of: of(a != b, c), *columns)
        line = f"set.eq.{name}.u32.u32 %d, %a, %b, %c;"
        check(line, "u32", lambda a, b, c, of=of: 0xFFFFFFFF * of(a == b, c), *columns)
    check("setp.lt.u32 %p0|%d, %a, %b; and.pred %d, %d, %c;", "pred", lambda a, b, c: a >= b and c, *columns)


def test_kinds_of_floats() -> None:
    for f, t in ((F32, "f32"), (F64, "f64")):
        kinds: dict[str, Callable[[int], bool]] = {
            "finite": lambda m, f=f: m < infinity(f),
            "infinite": lambda m, f=f: m == infinity(f),
            "number": lambda m, f=f: m <= infinity(f),
            "notanumber": lambda m, f=f: m > infinity(f),
            "normal": lambda m, f=f: m == 0 or 1 << f[1] <= m < infinity(f),  # zeros are
            "subnormal": lambda m, f=f: 0 < m < 1 << f[1],
        }
        for kind, of in kinds.items():
            check(
                f"testp.{kind}.{t} %d, %a;", "pred", lambda a, of=of, f=f: of(a & canonical_nan(f)), (t, floats(f, 60))
            )
