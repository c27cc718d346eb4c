"""Integers, bits and predicates of the PTX machine, against Python's own unbounded integers."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from ptx_truth import BLOCK, check, evaluate, integers, pairs, signed

Truth = Callable[..., int]


def run(line: str, out: str, truth: Truth, *types: str) -> None:
    """``truth`` gets values as their types say: signed or not."""
    widths = [int(t[1:]) for t in types]
    columns = [integers(w, 250, seed) for seed, w in enumerate(widths)]
    if len(types) > 1:
        columns[:2] = pairs(columns[0], columns[1], 400)
    source = random.Random(2)
    columns = [c if len(c) == len(columns[0]) else [source.choice(c) for _ in columns[0]] for c in columns]

    def of_bits(*row: int) -> int:
        numbers = [signed(x, w) if t[0] == "s" else x for x, w, t in zip(row, widths, types, strict=True)]
        return int(truth(*numbers)) & ((1 << int(out[1:])) - 1)

    check(line, out, of_bits, *zip(types, columns, strict=True))


def divide(a: int, b: int) -> int:
    """Towards zero; of zero what ptxas makes of it."""
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a: int, b: int) -> int:
    return -1 if b == 0 else a - divide(a, b) * b


ALL = ("u16", "s16", "u32", "s32", "u64", "s64")
SAME: dict[str, Truth] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "div": divide,
    "rem": remainder,
    "min": min,
    "max": max,
    "mad.lo": lambda a, b, c: a * b + c,
    "sad": lambda a, b, c: abs(a - b) + c,
}


@pytest.mark.parametrize("op", SAME)
def test_arithmetic(op: str) -> None:
    for t in ALL:
        three = op in ("mad.lo", "sad")
        run(f"{op}.{t} %d, %a, %b{', %c' if three else ''};", t, SAME[op], *[t] * (3 if three else 2))


@pytest.mark.parametrize("t", ALL)
def test_products(t: str) -> None:
    bits = int(t[1:])
    run(f"mul.hi.{t} %d, %a, %b;", t, lambda a, b: a * b >> bits, t, t)
    run(f"mad.hi.{t} %d, %a, %b, %c;", t, lambda a, b, c: (a * b >> bits) + c, t, t, t)
    if bits < 64:
        wide = f"{t[0]}{2 * bits}"
        run(f"mul.wide.{t} %d, %a, %b;", wide, lambda a, b: a * b, t, t)
        run(f"mad.wide.{t} %d, %a, %b, %c;", wide, lambda a, b, c: a * b + c, t, t, wide)
    if bits == 32:
        cut = (lambda x: signed(x, 24)) if t[0] == "s" else (lambda x: x & 0xFFFFFF)
        run(f"mul24.lo.{t} %d, %a, %b;", t, lambda a, b: cut(a) * cut(b), t, t)
        run(f"mul24.hi.{t} %d, %a, %b;", t, lambda a, b: cut(a) * cut(b) >> 16, t, t)


def test_saturation_and_signs() -> None:
    def clamp(x: int) -> int:
        return max(-(2**31), min(2**31 - 1, x))

    run("add.sat.s32 %d, %a, %b;", "s32", lambda a, b: clamp(a + b), "s32", "s32")
    run("sub.sat.s32 %d, %a, %b;", "s32", lambda a, b: clamp(a - b), "s32", "s32")
    for t in ("s16", "s32", "s64"):
        run(f"neg.{t} %d, %a;", t, lambda a: -a, t)
        run(f"abs.{t} %d, %a;", t, abs, t)


@pytest.mark.parametrize("a", ["u", "s"])
@pytest.mark.parametrize("b", ["u", "s"])
def test_dot_products_of_bytes(a: str, b: str) -> None:
    def parts(x: int, kind: str) -> list[int]:
        return [signed(x >> k, 8) if kind == "s" else x >> k & 255 for k in (0, 8, 16, 24)]

    def truth(x: int, y: int, c: int) -> int:
        return c + sum(p * q for p, q in zip(parts(x, a), parts(y, b), strict=True))

    run(f"dp4a.{a}32.{b}32 %d, %a, %b, %c;", "u32", truth, "u32", "u32", "u32")


LOGIC: dict[str, Truth] = {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b}


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic_and_shifts(bits: int) -> None:
    t = f"b{bits}"
    for op, truth in LOGIC.items():
        run(f"{op}.{t} %d, %a, %b;", t, truth, t, t)
    run(f"not.{t} %d, %a;", t, lambda a: ~a, t)
    run(f"cnot.{t} %d, %a;", t, lambda a: a == 0, t)
    run(f"shl.{t} %d, %a, %b;", t, lambda a, n: a << n if n < bits else 0, t, "u32")
    run(f"shr.{t} %d, %a, %b;", t, lambda a, n: a >> n if n < bits else 0, t, "u32")
    run(f"shr.s{bits} %d, %a, %b;", t, lambda a, n: a >> min(n, bits - 1), f"s{bits}", "u32")


def test_logic_of_predicates() -> None:
    yes, other = [0, 0, 1, 1], [0, 1, 0, 1]
    for op, truth in LOGIC.items():
        check(f"{op}.pred %d, %a, %b;", "pred", truth, ("pred", yes), ("pred", other))
    check("not.pred %d, %a;", "pred", lambda a: 1 - a, ("pred", yes))
    check("mov.pred %d, %a;", "pred", lambda a: a, ("pred", yes))


def test_funnel_shifts() -> None:
    both = "b32", "b32", "u32"
    run("shf.l.clamp.b32 %d, %a, %b, %c;", "b32", lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32, *both)
    run("shf.r.clamp.b32 %d, %a, %b, %c;", "b32", lambda a, b, c: (b << 32 | a) >> min(c, 32), *both)
    run("shf.l.wrap.b32 %d, %a, %b, %c;", "b32", lambda a, b, c: (b << 32 | a) << (c & 31) >> 32, *both)
    run("shf.r.wrap.b32 %d, %a, %b, %c;", "b32", lambda a, b, c: (b << 32 | a) >> (c & 31), *both)


@pytest.mark.parametrize("bits", [32, 64])
def test_fields(bits: int) -> None:
    msb = bits - 1

    def extract(is_signed: bool) -> Truth:
        def truth(a: int, b: int, c: int) -> int:
            pos, length = b & 255, c & 255
            fill = a >> min(pos + length - 1, msb) & 1 if is_signed and length else 0
            return sum((a >> (pos + i) & 1 if i < length and pos + i <= msb else fill) << i for i in range(bits))

        return truth

    def insert(a: int, b: int, c: int, e: int) -> int:
        pos, length = c & 255, e & 255
        for i in range(length):
            if pos + i <= msb:
                b = b & ~(1 << (pos + i)) | (a >> i & 1) << (pos + i)
        return b

    u = f"u{bits}"
    rows = integers(bits, 400), [x % 80 for x in integers(32, 400, 1)], [x % 80 for x in integers(32, 400, 2)]
    for kind in "us":
        inputs = zip((u, "u32", "u32"), rows, strict=True)
        check(f"bfe.{kind}{bits} %d, %a, %b, %c;", u, lambda *x, k=kind: extract(k == "s")(*x) % 2**bits, *inputs)
    sources = integers(bits, 400, 3), *rows
    check(f"bfi.b{bits} %d, %a, %b, %c, %e;", u, insert, *zip((u, u, "u32", "u32"), sources, strict=True))


@pytest.mark.parametrize("bits", [32, 64])
def test_counts_of_bits(bits: int) -> None:
    b = f"b{bits}"
    run(f"popc.{b} %d, %a;", "u32", lambda a: a.bit_count(), b)
    run(f"clz.{b} %d, %a;", "u32", lambda a: bits - a.bit_length(), b)
    run(f"brev.{b} %d, %a;", b, lambda a: int(f"{a:0{bits}b}"[::-1], 2), b)
    for t in (f"u{bits}", f"s{bits}"):
        run(f"bfind.{t} %d, %a;", "u32", lambda a: (a if a >= 0 else ~a).bit_length() - 1, t)
        shift = lambda a: bits - n if (n := (a if a >= 0 else ~a).bit_length()) else -1  # noqa: E731
        run(f"bfind.shiftamt.{t} %d, %a;", "u32", shift, t)


def test_masks() -> None:
    run("bmsk.clamp.b32 %d, %a, %b;", "b32", lambda a, b: (1 << min(b, 32)) - 1 << min(a, 32), "u32", "u32")
    run("bmsk.wrap.b32 %d, %a, %b;", "b32", lambda a, b: (1 << b % 32) - 1 << a % 32, "u32", "u32")


# Bytes 3, 2, 1, 0 of the result for the controls 0, 1, 2, 3, as the manual's table lists them.
PERMUTATIONS = {
    "f4e": ("3210", "4321", "5432", "6543"),
    "b4e": ("5670", "6701", "7012", "0123"),
    "rc8": ("0000", "1111", "2222", "3333"),
    "ecl": ("3210", "3211", "3222", "3333"),
    "ecr": ("0000", "1110", "2210", "3210"),
    "rc16": ("1010", "3232", "1010", "3232"),
}


def test_permutations_of_bytes() -> None:
    def pick(a: int, b: int, k: int) -> int:
        return (b << 32 | a) >> 8 * k & 255

    def truth(a: int, b: int, c: int) -> int:
        result = 0
        for k in range(4):
            control = c >> 4 * k & 15
            byte = pick(a, b, control & 7)
            result |= (255 * (byte >> 7) if control & 8 else byte) << 8 * k
        return result

    three = "b32", "b32", "b32"
    run("prmt.b32 %d, %a, %b, %c;", "b32", truth, *three)
    for mode, table in PERMUTATIONS.items():
        by = lambda a, b, c, t=table: int.from_bytes(bytes(pick(a, b, int(k)) for k in t[c & 3]), "big")  # noqa: E731
        run(f"prmt.b32.{mode} %d, %a, %b, %c;", "b32", by, *three)


def test_lookup_of_three() -> None:
    def truth(table: int) -> Truth:
        return lambda a, b, c: sum(
            (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32)
        )

    for table in (0x80, 0xFE, 0x40, 0x1A, 0x96, 0xE8, 0xCA, 0, 255):
        run(f"lop3.b32 %d, %a, %b, %c, {table};", "b32", truth(table), "b32", "b32", "b32")
    found = evaluate(
        "setp.ne.u32 %p0, %c, 0; lop3.or.b32 _|%d, %a, %b, 0, 0xC0, %p0;",
        "pred",
        *(("b32", column) for column in ([1, 1, 0, 0], [1, 2, 1, 2], [0, 0, 0, 5])),
    )
    assert found == [1, 0, 0, 1]
    line = "setp.ne.u32 %p0, %c, 0; lop3.and.b32 %r0|%p1, %a, %b, 0, 0xC0, %p0; selp.b32 %d, %r0, 77, %p1;"
    columns = (("b32", column) for column in ([3, 3, 0, 0], [1, 1, 1, 2], [0, 1, 0, 5]))
    assert evaluate(line, "b32", *columns) == [77, 1, 77, 77]


def test_selection() -> None:
    n = 2 * BLOCK
    yes, no = integers(64, n), integers(64, n, 1)
    condition = [k % 3 & 1 for k in range(n)]
    for t in ("b16", "u32", "s64", "f32", "f64"):
        mask = (1 << int(t[1:])) - 1
        inputs = (t, [x & mask for x in yes]), (t, [x & mask for x in no])
        check(f"selp.{t} %d, %a, %b, %c;", t, lambda a, b, c: a if c else b, *inputs, ("pred", condition))
        by_sign = lambda a, b, c: b if c >> 31 else a  # noqa: E731
        check(f"slct.{t}.s32 %d, %a, %b, %c;", t, by_sign, *inputs, ("s32", integers(32, n, 2)))
    floats = [0, 0x80000000, 0x3F800000, 0xBF800000, 0x7FC00000, 0x80000001, 0xFF800000, 0x7F800000]
    check(
        "slct.f32.f32 %d, 1, 2, %a;",
        "f32",
        lambda c: 2 - (c in (0, 0x80000000, 0x3F800000, 0x7F800000)),
        ("f32", floats),
    )
    flushes = (0, 0x80000000, 0x80000001, 0x3F800000, 0x7F800000)
    check("slct.ftz.f32.f32 %d, 1, 2, %a;", "f32", lambda c: 2 - (c in flushes), ("f32", floats))


def test_packing() -> None:
    words, halves = integers(64, 300), [integers(16, 300, k) for k in range(4)]
    check(
        "mov.b64 {%r0, %r1}, %a; mov.b64 %d, {%r1, %r0};",
        "b64",
        lambda a: a >> 32 | (a & 0xFFFFFFFF) << 32,
        ("b64", words),
    )
    check("mov.b64 {_, %d}, %a;", "b32", lambda a: a >> 32, ("b64", words))
    line = "mov.b64 {%h0, %h1, %h2, %h3}, %a; mov.b32 %d, {%h3, %h1};"
    check(line, "b32", lambda a: a >> 48 | (a >> 16 & 0xFFFF) << 16, ("b64", words))
    inputs = (("b16", column) for column in halves)
    check("mov.b64 %d, {%a, %b, %c, %e};", "b64", lambda *x: sum(v << 16 * k for k, v in enumerate(x)), *inputs)
    check("mov.b32 %d, {%a, 0x1234};", "b32", lambda a: a | 0x12340000, ("b16", halves[0]))
