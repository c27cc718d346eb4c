"""Fragments of matrices in a warp's registers, as the PTX manual lays them out; sums; what the manual calls undefined.

Which of a lane's registers has which element is also settled by Triton's products, for the shapes that it uses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from ptx_machine import Module, PtxError, set_seed
from ptx_text import DTYPES


@pytest.fixture(autouse=True, params=(0, 1, 2))
def seed(request: pytest.FixtureRequest) -> Iterator[None]:
    set_seed(request.param)
    yield
    set_seed(0)


def kernel(body: str, target: str = "sm_90a", shared: int = 2048) -> Module:
    """A kernel ``k(in, out)``; each lane's ``%in`` and ``%out`` are 256 bytes for it."""
    return Module(f"""
        .version 8.0
        .target {target}
        .address_size 64
        .visible .entry k(.param .u64 in, .param .u64 out)
        {{
            .reg .pred %p<4>;
            .reg .b32 %r<64>;
            .reg .b64 %rd<64>;
            .reg .b64 %in, %out;
            .shared .align 1024 .b8 bytes[{shared}];
            ld.param.u64 %in, [in];
            ld.param.u64 %out, [out];
            mov.u32 %r60, %tid.x;
            mad.wide.u32 %in, %r60, 256, %in;
            mad.wide.u32 %out, %r60, 256, %out;
            mov.u32 %r61, bytes;
            {body}
            ret;
        }}
    """)


def names(prefix: str, first: int, count: int) -> str:
    return "{" + ", ".join(f"%{prefix}{first + i}" for i in range(count)) + "}"


def moves(what: str, prefix: str, first: int, count: int, address: str, offset: int = 0) -> str:
    """Loads or stores of registers from an address on."""
    size = 8 if prefix == "rd" else 4
    lines = []
    for i in range(count):
        place, register = f"[{address} + {offset + i * size}]", f"%{prefix}{first + i}"
        pair = f"{register}, {place}" if what == "ld" else f"{place}, {register}"
        lines.append(f"{what}.global.b{8 * size} {pair};")
    return "\n".join(lines)


def lane_words(values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Bytes of [lane, element]: elements of a matrix at these places of each lane."""
    return values[rows, columns].contiguous().view(torch.uint8).reshape(32, -1)


def fragment_places(height: int, depth: int, each: int, turned: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each lane's elements of A; of B, column and row: as in the manual."""
    lane = torch.arange(32)[:, None]
    i = torch.arange(height * depth // 32)[None, :]
    blocks = 1 if turned or height == 8 else 2
    row = lane // 4 + i // each % blocks * 8
    column = lane % 4 * each + i % each + i // (each * blocks) * 4 * each
    return row.expand(32, i.shape[1]), column


MMA = [
    ("m16n8k8", "f32.f16.f16.f32", "fp16", "fp32"),
    ("m16n8k8", "f32.bf16.bf16.f32", "bf16", "fp32"),
    ("m16n8k8", "f16.f16.f16.f16", "fp16", "fp16"),
    ("m16n8k4", "f32.tf32.tf32.f32", "fp32", "fp32"),
    ("m16n8k16", "f16.f16.f16.f16", "fp16", "fp16"),
    ("m16n8k8", "f32.tf32.tf32.f32", "fp32", "fp32"),
    ("m8n8k4", "f64.f64.f64.f64", "fp64", "fp64"),
    ("m8n8k16", "s32.s8.s8.s32", "i8", "i32"),
    ("m16n8k16", "s32.s8.s8.s32", "i8", "i32"),
    ("m16n8k32", "s32.s8.s8.s32", "i8", "i32"),
    ("m16n8k4", "f64.f64.f64.f64", "fp64", "fp64"),
    ("m16n8k8", "f64.f64.f64.f64", "fp64", "fp64"),
    ("m16n8k16", "f64.f64.f64.f64", "fp64", "fp64"),
]


def run_mma(shape: str, types: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a @ b.T + c by one mma.sync."""
    height, width, depth = (int(size) for size in re.findall(r"\d+", shape))
    wide = a.dtype == torch.float64
    each = 1 if wide else 4 // a.element_size()
    prefix, size = ("rd", 8) if wide else ("r", 4)
    places = (fragment_places(height, depth, each, False), fragment_places(width, depth, each, True))
    lane, i = torch.arange(32)[:, None], torch.arange(height * width // 32)[None, :]
    of_sums = (lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2)
    parts = [lane_words(a, *places[0]), lane_words(b, *places[1]), lane_words(c, *of_sums)]
    counts = [part.shape[1] // size for part in parts]
    data = torch.zeros(32, 256, dtype=torch.uint8)
    body, first, offset = "", 0, 0
    for part, count in zip(parts, counts, strict=True):
        data[:, offset : offset + part.shape[1]] = part
        body += moves("ld", prefix, first, count, "%in", offset)
        first, offset = first + count, offset + part.shape[1]
    operands = [
        names(prefix, 0, counts[0]),
        names(prefix, counts[0], counts[1]),
        names(prefix, sum(counts[:2]), counts[2]),
    ]
    results = names(prefix, 40, counts[2])
    body += f"mma.sync.aligned.{shape}.row.col.{types} {results}, {', '.join(operands)};"
    body += moves("st", prefix, 40, counts[2], "%out")
    out = torch.zeros(32, 256, dtype=torch.uint8)
    kernel(body).launch("k", 1, 32, data, out)
    result = torch.empty_like(c)
    result[of_sums] = out[:, : counts[2] * size].contiguous().view(c.dtype)
    return result


@pytest.mark.parametrize(("shape", "types", "dtype", "sums"), MMA)
def test_shapes_of_mma(shape: str, types: str, dtype: str, sums: str) -> None:
    height, width, depth = (int(size) for size in re.findall(r"\d+", shape))
    a = torch.randint(-3, 4, (height, depth)).to(DTYPES[dtype])
    b = torch.randint(-3, 4, (width, depth)).to(DTYPES[dtype])
    c = torch.randint(-99, 99, (height, width)).to(DTYPES[sums])
    assert torch.equal(run_mma(shape, types, a, b, c).double(), a.double() @ b.double().T + c.double())


@pytest.mark.parametrize(
    ("addend", "total"), [(2.0**-25, 1.0), (2.0**-24 + 2.0**-23, 1.0 + 2.0**-23), (-(2.0**-26), 1 - 2.0**-24)]
)
def test_sums_of_products_are_cut_off(addend: float, total: float) -> None:
    """Toward zero, as tensor cores do; to the nearest float, 1 - 2^-26 were 1, and 1 + 1.5 * 2^-23 were 1 + 2^-22."""
    a, b, c = torch.zeros(16, 8), torch.zeros(8, 8), torch.ones(16, 8)
    a[:, 3], b[:, 3] = addend * 1024, 1 / 1024
    for sign in (1, -1):
        got = run_mma("m16n8k8", "f32.bf16.bf16.f32", sign * a.bfloat16(), b.bfloat16(), sign * c)
        assert torch.equal(got, torch.full((16, 8), sign * total))


def test_special_values_of_halves() -> None:
    """Subnormal halves count, overflow of half sums is infinite, the sum of infinities a NaN."""
    a, b, c = torch.zeros(16, 8).half(), torch.zeros(8, 8).half(), torch.zeros(16, 8)
    a[0, 0], a[1, 0], a[2, 0], b[:, 0] = 2.0**-24, 60000, float("inf"), 2
    c[2] = -float("inf")
    got = run_mma("m16n8k8", "f32.f16.f16.f32", a, b, c)
    assert (got[0] == 2.0**-23).all()
    assert (got[1] == 120000).all()
    assert got[2].isnan().all()
    got = run_mma("m16n8k8", "f16.f16.f16.f16", a, b, c.half())
    assert (got[0] == 2.0**-23).all()
    assert (got[1] == float("inf")).all()
    assert got[2].isnan().all()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("turned", ["", ".trans"])
def test_ldmatrix_and_stmatrix(count: int, turned: str) -> None:
    """Lane l has elements 2 * (l % 4) and the next of row l / 4, or of the matrix' transposition."""
    matrices = torch.randint(0, 2**15, (count, 8, 8), dtype=torch.int16)
    lane = torch.arange(32)
    turn = matrices.mT if turned else matrices
    fragments = torch.stack([turn[:, lane // 4, lane % 4 * 2], turn[:, lane // 4, lane % 4 * 2 + 1]], 2)
    words = fragments.transpose(0, 1).contiguous().view(torch.int32).reshape(32, count)
    row = f"{{ .reg .b32 row; min.u32 row, %r60, {8 * count - 1}; mad.lo.u32 %r62, row, 16, %r61; }}"
    load = f"""
        {row} mul.wide.u32 %rd0, %r60, 240; sub.u64 %rd0, %in, %rd0;
        setp.lt.u32 %p0, %r60, {8 * count};
        @%p0 ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%rd0];
        @%p0 st.shared.v4.b32 [%r62], {{%r0, %r1, %r2, %r3}};
        bar.warp.sync 0xffffffff;
        ldmatrix.sync.aligned.m8n8.x{count}{turned}.shared.b16 {names("r", 10, count)}, [%r62];
        {moves("st", "r", 10, count, "%out")}
    """
    out = torch.zeros(32, 64, dtype=torch.int32)
    kernel(load).launch("k", 1, 32, matrices, out)
    assert torch.equal(out[:, :count], words)
    store = f"""
        {row} {moves("ld", "r", 10, count, "%in")}
        stmatrix.sync.aligned.m8n8.x{count}{turned}.shared.b16 [%r62], {names("r", 10, count)};
        bar.warp.sync 0xffffffff;
        setp.lt.u32 %p0, %r60, {8 * count};
        @%p0 ld.shared.v4.b32 {{%r0, %r1, %r2, %r3}}, [%r62];
        mul.wide.u32 %rd0, %r60, 240; sub.u64 %rd0, %out, %rd0;
        @%p0 st.global.v4.b32 [%rd0], {{%r0, %r1, %r2, %r3}};
    """
    data = torch.zeros(32, 64, dtype=torch.int32)
    data[:, :count] = words
    back = torch.zeros_like(matrices)
    kernel(store).launch("k", 1, 32, data, back)
    assert torch.equal(back, matrices)


def test_movmatrix_transposes() -> None:
    data, out = torch.zeros(2, 32, 64, dtype=torch.int32)
    matrix = torch.randint(0, 2**15, (8, 8), dtype=torch.int16)
    data[:, 0] = matrix.reshape(32, 2).view(torch.int32).squeeze(1)
    body = "ld.global.b32 %r0, [%in]; movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r0; st.global.b32 [%out], %r1;"
    kernel(body).launch("k", 1, 32, data, out)
    assert torch.equal(out[:, :1].contiguous().view(torch.int16).reshape(8, 8), matrix.T)


# ---- what is undefined ----

LDMATRIX = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%r61];"
FOUR = "{%r0, %r1, %r2, %r3}"
WGMMA = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {FOUR}, %rd0, %rd1, 1, 1, 1, 0, 0;"
DESCRIPTORS = (
    f"cvt.u64.u32 %rd0, %r61; shr.u64 %rd0, %rd0, 4; or.b64 %rd0, %rd0, {8 << 16 | 16 << 32}; mov.b64 %rd1, %rd0;"
)


@pytest.mark.parametrize(
    ("body", "threads", "complaint"),
    [
        (f"setp.lt.u32 %p0, %r60, 16; @%p0 {LDMATRIX}", 32, "not all 32 lanes"),
        (f"setp.lt.u32 %p0, %r60, 16; @%p0 ret; {LDMATRIX}", 32, "not all 32 lanes"),
        (f"add.u32 %r61, %r61, 8; {LDMATRIX}", 32, "not aligned to 16"),
        (f"{DESCRIPTORS} wgmma.fence.sync.aligned; {WGMMA}", 96, "fewer than four warps"),
        (
            f"{DESCRIPTORS} and.b32 %r1, %r60, 1; cvt.u64.u32 %rd2, %r1; add.u64 %rd1, %rd1, %rd2;"
            f" wgmma.fence.sync.aligned; {WGMMA}",
            128,
            "not the same in all lanes",
        ),
        (
            f"{DESCRIPTORS} shr.u32 %r1, %r60, 5; cvt.u64.u32 %rd2, %r1; add.u64 %rd1, %rd1, %rd2;"
            f" wgmma.fence.sync.aligned; {WGMMA}",
            128,
            "with other descriptors",
        ),
    ],
)
def test_undefined_use_is_an_error(body: str, threads: int, complaint: str) -> None:
    out = torch.zeros(128, 64, dtype=torch.int32)
    with pytest.raises(PtxError, match=complaint):
        kernel(body).launch("k", 1, threads, out, out)
    if "wgmma" in body:  # and nothing else is wrong with it
        kernel(f"{DESCRIPTORS} wgmma.fence.sync.aligned; {WGMMA}").launch("k", 1, 128, out, out)


@pytest.mark.parametrize(
    "text",
    [
        f"mma.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {FOUR}, {FOUR}, {{%r4, %r5}}, {FOUR};",
        f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {FOUR}, {{%r0, %r1}}, {{%r4, %r5}}, {FOUR};",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r0, %r1}, [%r61];",
        WGMMA.replace("m64n8k16", "m64n12k16"),
        WGMMA.replace(", 0, 0;", ";"),
    ],
)
def test_forms_that_do_not_exist_are_refused(text: str) -> None:
    out = torch.zeros(32, 64, dtype=torch.int32)
    with pytest.raises(PtxError, match="not known"):
        kernel(text).launch("k", 1, 32, out, out)
