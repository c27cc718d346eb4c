"""What single PTX instructions give on the machine, and exact numbers to compare with.

Floats are handled as their bits; a format is its bits of exponent and mantissa. Their values are Fractions, rounded
here once, by definition and not by any float arithmetic of the host.
"""

from __future__ import annotations

import ctypes
import itertools
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache

import numpy as np
from ptx_machine import Module

Bits = Sequence[int]
BLOCK = 128
REGISTERS = {1: "%p", 16: "%h", 32: "%r", 64: "%rd"}


def width(type_: str) -> int:
    """Bits of a type, of its register if that is wider: there are none of 8."""
    return (
        1 if type_ == "pred" else max(16, 32 if type_.endswith("x2") or type_ == "tf32" else int(type_.strip("bfsu")))
    )


@cache
def _module(line: str, out: int, *inputs: int) -> Module:
    """A kernel that puts values of the given widths in %a, %b, ..., runs ``line``, and writes %d."""
    declared, loads = [], []
    for name, bits in zip("abce", inputs, strict=False):
        declared.append(f".reg .{'pred' if bits == 1 else f'b{bits}'} %{name};")
        loads += [f"ld.param.u64 %at, [{name}];", "add.s64 %at, %at, %offset;"]
        if bits == 1:
            loads += ["ld.global.u32 %word, [%at];", f"setp.ne.u32 %{name}, %word, 0;"]
        else:
            loads.append(f"ld.global.b{bits} %{name}, [%at];")
    store = f"st.global.b{out} [%at], %d;" if out > 1 else "selp.u32 %word, 1, 0, %d; st.global.u32 [%at], %word;"
    parameters = ", ".join(f".param .u64 {name}" for name in ("out", *"abce"[: len(inputs)]))
    return Module(f"""
        .version 8.6
        .target sm_90a
        .address_size 64
        .visible .entry k({parameters}) {{
            .reg .b64 %at; .reg .b64 %offset; .reg .b32 %word; .reg .b32 %i; .reg .b32 %j;
            .reg .{"pred" if out == 1 else f"b{out}"} %d;
            .reg .pred %p<4>; .reg .b16 %h<4>; .reg .b32 %r<4>; .reg .b64 %rd<4>;
            {" ".join(declared)}
            mov.u32 %i, %ctaid.x; mov.u32 %j, %tid.x;
            mad.lo.u32 %i, %i, {BLOCK}, %j;
            mul.wide.u32 %offset, %i, 8;
            {" ".join(loads)}
            {line}
            ld.param.u64 %at, [out]; add.s64 %at, %at, %offset;
            {store}
            ret;
        }}""")


def evaluate(line: str, out: str, *inputs: tuple[str, Bits]) -> list[int]:
    """%d after ``line`` for each row of the inputs %a, %b, %c, %e: types and values."""
    n = len(inputs[0][1])
    padded = -(-n // BLOCK) * BLOCK
    arrays = [np.array([*values, *[values[0]] * (padded - n)], np.uint64) for _, values in inputs]
    result = np.zeros(padded, np.uint64)
    module = _module(line, width(out), *(width(type_) for type_, _ in inputs))
    pointers = [ctypes.c_uint64(array.ctypes.data) for array in (result, *arrays)]
    module.launch("k", padded // BLOCK, BLOCK, *pointers)
    return [int(x) for x in result[:n]]


def check(line: str, out: str, truth: Callable[..., int], *inputs: tuple[str, Bits]) -> None:
    """Every row of ``line`` is ``truth`` of its bits."""
    found = evaluate(line, out, *inputs)
    for got, row in zip(found, zip(*(values for _, values in inputs), strict=True), strict=True):
        expected = truth(*row)
        assert got == expected, f"{line} of {[hex(x) for x in row]}: {got:#x}, not {expected:#x}"


# ---- values ----


def integers(bits: int, n: int, seed: int = 0) -> list[int]:
    """Edges, then random ones, of all magnitudes."""
    top = 1 << bits
    edges = [0, 1, 2, 7, 31, 32, 33, 63, 64, 255, top // 2 - 1, top // 2, top // 2 + 1, top - 2, top - 1]
    source = random.Random(seed)
    few = [source.getrandbits(source.randint(1, bits)) for _ in range(n - len(edges))]
    return [x % top for x in edges] + [x if source.random() < 0.5 else -x % top for x in few]


def pairs(values: Sequence[int], other: Sequence[int], n: int, edges: int = 15) -> tuple[list[int], list[int]]:
    """Edges with edges, all of them if that is no more than ``n``, and ``n`` random rows."""
    source = random.Random(1)
    rows = list(itertools.product(values[:edges], other[:edges]))
    rows = rows if len(rows) <= n else source.sample(rows, n)
    rows += [(source.choice(values), source.choice(other)) for _ in range(n)]
    return [a for a, _ in rows], [b for _, b in rows]


def signed(x: int, bits: int) -> int:
    """As two's complement."""
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


# ---- floats ----

Format = tuple[int, int]
F16, BF16, TF32, F32, F64 = (5, 10), (8, 7), (8, 10), (8, 23), (11, 52)
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}
NAN = "nan"
Value = Fraction | str | float  # a finite number, NAN, or an infinity


def infinity(f: Format) -> int:
    """The bits of +inf."""
    return ((1 << f[0]) - 1) << f[1]


def canonical_nan(f: Format) -> int:
    """All ones but for the sign."""
    return (1 << sum(f)) - 1


def sign(bits: int, f: Format) -> int:
    """1 if the sign bit is set."""
    return bits >> sum(f)


def value(bits: int, f: Format) -> Value:
    """Which number these bits are."""
    exponents, mantissas = f
    negative, magnitude = bits >> sum(f), bits & canonical_nan(f)
    if magnitude >= infinity(f):
        return NAN if magnitude > infinity(f) else float("-inf" if negative else "inf")
    exponent, mantissa = magnitude >> mantissas, magnitude & ((1 << mantissas) - 1)
    if exponent:
        mantissa += 1 << mantissas
    scale = max(exponent, 1) - (1 << (exponents - 1)) + 1 - mantissas
    result = Fraction(mantissa) * Fraction(2) ** scale
    return -result if negative else result


def rounded(x: Fraction, f: Format, mode: str = "rn", negative_zero: bool = False) -> int:
    """The bits of x, rounded once: rn, rz, rm, rp, rna."""
    exponents, mantissas = f
    negative = x < 0 or (x == 0 and negative_zero)
    magnitude = abs(x)
    bits = 0
    if magnitude:
        bias = (1 << (exponents - 1)) - 1
        exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
        if magnitude < Fraction(2) ** exponent:
            exponent -= 1
        exponent = max(exponent, 1 - bias)
        scaled = magnitude / Fraction(2) ** (exponent - mantissas)
        kept = scaled.numerator // scaled.denominator
        lost = scaled - kept
        up = {
            "rn": lost > Fraction(1, 2) or (lost == Fraction(1, 2) and kept % 2 == 1),
            "rna": lost >= Fraction(1, 2),
            "rz": False,
            "rm": negative and lost > 0,
            "rp": not negative and lost > 0,
        }[mode]
        kept += up
        bits = kept + ((exponent + bias - 1) << mantissas)  # kept has the leading one, unless x is subnormal
        if bits >= infinity(f):
            inward = mode == "rz" or (mode == "rm" and not negative) or (mode == "rp" and negative)
            bits = infinity(f) - inward
    return bits | (negative << sum(f))


def flushed(bits: int, f: Format = F32) -> int:
    """Subnormals as zeros of their sign."""
    return bits if (bits & canonical_nan(f)) >> f[1] else bits & (1 << sum(f))


def floats(f: Format, n: int, seed: int = 0) -> list[int]:
    """Bits: 24 edges, then numbers near one another, then any."""
    top = infinity(f)
    one = top // 2 - (top // 2) % (1 << f[1])
    edges = [0, 1, (1 << f[1]) - 1, 1 << f[1], one - 1, one, one + 1, one + (1 << (f[1] - 1)), top - 1, top]
    edges += [top + 1, top + (1 << (f[1] - 1))]
    edges += [x | 1 << sum(f) for x in edges]
    source = random.Random(seed)
    near = [one + source.randint(-(3 << f[1]), 3 << f[1]) | source.getrandbits(1) << sum(f) for _ in range(n // 2)]
    return edges + near + [source.getrandbits(1 + sum(f)) for _ in range(n - n // 2 - len(edges))]


EDGES = 24
