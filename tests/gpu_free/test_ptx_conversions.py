"""cvt of the PTX machine: every type into every other, against exact numbers."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from ptx_truth import (
    EDGES,
    F32,
    F64,
    FORMATS,
    NAN,
    TF32,
    Format,
    canonical_nan,
    check,
    evaluate,
    floats,
    flushed,
    infinity,
    integers,
    rounded,
    sign,
    signed,
    value,
    width,
)

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
DIRECTIONS = ("rn", "rz", "rm", "rp")


def limits(t: str) -> tuple[int, int]:
    bits = int(t[1:])
    return (0, 2**bits - 1) if t[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def number(bits: int, t: str) -> int:
    """What a register holds as an integer of type t: its low bits."""
    size = int(t[1:])
    return signed(bits, size) if t[0] == "s" else bits & (2**size - 1)


def in_register(x: int, t: str, register: str) -> int:
    """x wrapped to type t, extended to a register."""
    return number(x, t) & (2 ** width(register) - 1)


def to_integer(x: Fraction, mode: str) -> int:
    match mode:
        case "rzi":
            return math.trunc(x)
        case "rmi":
            return math.floor(x)
        case "rpi":
            return math.ceil(x)
    return round(x)  # to even


@pytest.mark.parametrize("source", INTEGERS)
def test_integers_to_integers(source: str) -> None:
    for to, register in itertools.product(INTEGERS, ("u16", "u32", "u64")):
        if width(register) < int(to[1:]):
            continue
        inputs = (f"b{width(source)}", integers(width(source), 60))

        def wrapped(a: int, to: str = to, register: str = register) -> int:
            return in_register(number(a, source), to, register)

        def clamped(a: int, to: str = to, register: str = register) -> int:
            low, high = limits(to)
            return in_register(max(low, min(high, number(a, source))), to, register)

        check(f"cvt.{to}.{source} %d, %a;", register, wrapped, inputs)
        check(f"cvt.sat.{to}.{source} %d, %a;", register, clamped, inputs)


@pytest.mark.parametrize("source", INTEGERS)
def test_integers_to_floats(source: str) -> None:
    inputs = (f"b{width(source)}", integers(width(source), 60))
    for (to, f), mode in itertools.product(FORMATS.items(), DIRECTIONS):

        def truth(a: int, f: Format = f, mode: str = mode) -> int:
            return rounded(Fraction(number(a, source)), f, mode)

        def saturated(a: int, f: Format = f) -> int:
            return rounded(Fraction(max(0, min(1, number(a, source)))), f)

        check(f"cvt.{mode}.{to}.{source} %d, %a;", to, truth, inputs)
        check(f"cvt.{mode}.sat.{to}.{source} %d, %a;", to, saturated, inputs)


def around(f: Format) -> list[int]:
    """Floats, also near the limits of the integers and near halves."""
    exact = [
        Fraction(2) ** k + d for k in (7, 8, 15, 16, 31, 32, 63, 64) for d in (-1, Fraction(-1, 2), 0, Fraction(1, 2))
    ]
    halves = [Fraction(k, 4) for k in range(14)]
    found = [rounded(x, f, mode) for x in exact + halves for mode in ("rz", "rp")]
    return floats(f, 60)[: EDGES + 20] + [x | s << sum(f) for x in found for s in (0, 1)]


@pytest.mark.parametrize("source", FORMATS)
def test_floats_to_integers(source: str) -> None:
    f = FORMATS[source]
    for to, mode in itertools.product(INTEGERS, ("rni", "rzi", "rmi", "rpi")):
        low, high = limits(to)

        def truth(a: int, to: str = to, mode: str = mode, low: int = low, high: int = high) -> int:
            x = value(a, f)
            if x == NAN:
                result = 0 if f != F64 and int(to[1:]) < 64 else 1 << (int(to[1:]) - 1)
            elif x in (math.inf, -math.inf):
                result = high if x > 0 else low
            else:
                result = max(low, min(high, to_integer(Fraction(x), mode)))
            return in_register(result, to, to)

        check(f"cvt.{mode}.{to}.{source} %d, %a;", to, truth, (source, around(f)))
    if f == F32:
        found = evaluate("cvt.rpi.ftz.s32.f32 %d, %a;", "s32", (source, [1, 0x7FFFFF, 0x800000]))
        assert found == [0, 0, 1]


def converted(a: int, f: Format, g: Format, mode: str) -> int:
    """From format f to g. NaNs become canonical, but those from f64 to f32, and from f32 to f64, keep their payload."""
    x, negative = value(a, f), bool(sign(a, f))
    if x != NAN:
        return (
            infinity(g) | negative << sum(g) if x in (math.inf, -math.inf) else rounded(Fraction(x), g, mode, negative)
        )
    if {f, g} == {F32, F64}:
        payload = a & ((1 << f[1]) - 1) | 1 << (f[1] - 1)
        return infinity(g) | negative << sum(g) | (payload >> 29 if g == F32 else payload << 29)
    return 0x7FFFFFFFE0000000 if g == F64 else canonical_nan(g)


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("to", FORMATS)
def test_floats_to_floats(source: str, to: str) -> None:
    f, g = FORMATS[source], FORMATS[to]
    column = (source, [*floats(f, 300), *around(f)])
    exact = f[0] <= g[0] and f[1] <= g[1]
    if source == to:
        numbers = (source, [x for x in column[1] if value(x, f) != NAN])
        for mode in ("rni", "rzi", "rmi", "rpi"):

            def integral(a: int, mode: str = mode) -> int:
                x = value(a, f)
                return (
                    a
                    if x in (math.inf, -math.inf)
                    else rounded(Fraction(to_integer(Fraction(x), mode)), f, "rn", bool(sign(a, f)))
                )

            check(f"cvt.{mode}.{to}.{source} %d, %a;", to, integral, numbers)
        check(f"cvt.{to}.{source} %d, %a;", to, lambda a: a, numbers)
    elif exact:
        check(f"cvt.{to}.{source} %d, %a;", to, lambda a: converted(a, f, g, "rn"), column)
    else:
        for mode in DIRECTIONS:
            check(f"cvt.{mode}.{to}.{source} %d, %a;", to, lambda a, m=mode: converted(a, f, g, m), column)

    def saturated(a: int) -> int:
        x = value(a, f)
        return 0 if x == NAN or x <= 0 else rounded(Fraction(min(Fraction(1), x) if x != math.inf else 1), g)

    check(f"cvt.{'' if exact else 'rn.'}sat.{to}.{source} %d, %a;", to, saturated, column)


def test_flushing() -> None:
    single, double = floats(F32, 200), floats(F64, 200)
    check("cvt.ftz.f64.f32 %d, %a;", "f64", lambda a: converted(flushed(a), F32, F64, "rn"), ("f32", single))
    tiny = [*double, *(rounded(Fraction(k, 8) * Fraction(2) ** -126, F64) for k in range(1, 12))]
    check("cvt.rn.ftz.f32.f64 %d, %a;", "f32", lambda a: flushed(converted(a, F64, F32, "rn")), ("f64", tiny))


@pytest.mark.parametrize("to", ["f16", "bf16"])
def test_pairs_of_halves(to: str) -> None:
    g = FORMATS[to]
    columns = ("f32", floats(F32, 300)), ("f32", floats(F32, 300, 1))
    for mode in ("rn", "rz"):

        def pair(a: int, b: int, mode: str = mode) -> int:
            return converted(a, F32, g, mode) << 16 | converted(b, F32, g, mode)

        def relu(a: int, b: int, mode: str = mode) -> int:
            bits = pair(a, b, mode)
            return bits & ~(0xFFFF0000 * (bits >> 31) | 0xFFFF * (bits >> 15 & 1))

        check(f"cvt.{mode}.{to}x2.f32 %d, %a, %b;", f"{to}x2", pair, *columns)
        check(f"cvt.{mode}.relu.{to}x2.f32 %d, %a, %b;", f"{to}x2", relu, *columns)


def test_tf32() -> None:
    column = ("f32", [*floats(F32, 200), *(0x3F800000 + k * 0x800 for k in range(12))])
    for mode in ("rna", "rn", "rz"):
        truth = lambda a, m=mode: 0x7FFFFFFF if value(a, F32) == NAN else converted(a, F32, TF32, m) << 13  # noqa: E731
        check(f"cvt.{mode}.tf32.f32 %d, %a;", "tf32", truth, column)


def test_constants_of_ptxas() -> None:
    """What NVIDIA's assembler folds these into; the manual is silent or easily misread there."""
    for line, type_, expected in (
        ("cvt.f64.f16 %d, %a;", "f64", 0x7FFFFFFFE0000000),
        ("cvt.rn.f16.f32 %d, 0fFFC00000;", "f16", 0x7FFF),
        ("cvt.rn.f32.f64 %d, 0dFFF8000030000000;", "f32", 0xFFC00001),
        ("cvt.f64.f32 %d, 0fFFC00001;", "f64", 0xFFF8000020000000),
        ("cvt.sat.s8.u32 %d, 300;", "u32", 127),
        ("cvt.s8.s32 %d, 200;", "u64", 0xFFFFFFFFFFFFFFC8),
        ("cvt.rmi.f32.f32 %d, 0fBE000000;", "f32", 0xBF800000),
        ("cvt.rpi.f32.f32 %d, 0fBE000000;", "f32", 0x80000000),
        ("cvt.sat.f32.f32 %d, 0f80000000;", "f32", 0),
        ("mul24.hi.s32 %d, 0x7fffffff, 0x12345678;", "s32", 0xFFFFFFCB),
        ("div.s32 %d, 7, 0;", "s32", 0xFFFFFFFF),
        ("rem.s32 %d, 7, 0;", "s32", 0xFFFFFFFF),
        ("bfe.s32 %d, 0x80000000, 28, 8;", "s32", 0xFFFFFFF8),
        ("mov.f32 %d, 1.1;", "f32", 0x3F8CCCCD),
    ):
        assert evaluate(line, type_, ("b16", [0xFE01])) == [expected], line
