"""Matrix instructions of the PTX machine.

What decides is a compiler whose output works on GPUs: Triton's matrix products run here with its own layouts, swizzles,
descriptors and fences. Sums of small integers are exact, so results must be equal. Then the same kernels with one line
broken, and what Triton never emits.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ptx_machine import Module, PtxError, set_seed

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SEEDS = range(4)
DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "i8": torch.int8,
    "i32": torch.int32,
}
SUMS = {"fp16": tl.float16, "fp32": tl.float32, "fp64": tl.float64, "i32": tl.int32}


@pytest.fixture(autouse=True)
def in_turns() -> Iterator[None]:
    yield
    set_seed(0)


@triton.jit
def matmul(
    a,
    b,
    c,
    K,
    a_stride,
    b_stride,
    M_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    A_TURNED: tl.constexpr,
    B_TURNED: tl.constexpr,
    TWICE: tl.constexpr,
    SUM: tl.constexpr,
):
    """c = a @ b, or 2a @ b: then a passes through registers."""
    m = tl.program_id(0) * M_BLOCK + tl.arange(0, M_BLOCK)[:, None]
    n = tl.arange(0, N_BLOCK)[None, :]
    sums = tl.zeros((M_BLOCK, N_BLOCK), SUM)
    for start in range(0, K, K_BLOCK):
        k = start + tl.arange(0, K_BLOCK)
        x = tl.load(a + (k[None, :] * a_stride + m if A_TURNED else m * a_stride + k[None, :]))
        y = tl.load(b + (n * b_stride + k[:, None] if B_TURNED else k[:, None] * b_stride + n))
        if TWICE:
            x += x
        sums = tl.dot(x, y, sums, out_dtype=SUM)
    tl.store(c + m * N_BLOCK + n, sums)


class Product:
    """``matmul`` compiled for a GPU, and matrices for it: two blocks of rows, three steps along k."""

    def __init__(
        self,
        target: int,
        dtype: str,
        sums: str,
        shape: tuple[int, int, int],
        warps: int = 4,
        stages: int = 2,
        turned: tuple[bool, bool] = (False, False),
        twice: bool = False,
    ) -> None:
        m, n, k = shape
        constants = (m, n, k, *turned, twice, SUMS[sums])
        names = matmul.arg_names
        kinds = (f"*{dtype}", f"*{dtype}", f"*{sums}", *["i32"] * 3, *["constexpr"] * len(constants))
        source = ASTSource(
            matmul,
            dict(zip(names, kinds, strict=True)),
            {(i + 6,): value for i, value in enumerate(constants)},
            {(i,): [["tt.divisibility", 16]] for i in range(6)},
        )
        options = {"num_warps": warps, "num_stages": stages}
        made: Any = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
        self.text: str = made.asm["ptx"]
        self.shared: int = made.metadata.shared
        self.threads = 32 * warps
        draw = torch.Generator().manual_seed(0)
        a = torch.randint(-3, 4, (2 * m, 3 * k), generator=draw)
        b = torch.randint(-3, 4, (3 * k, n), generator=draw)
        self.expected = a.double() @ b.double() * (2 if twice else 1)
        self.a = (a.T if turned[0] else a).to(DTYPES[dtype]).contiguous()
        self.b = (b.T if turned[1] else b).to(DTYPES[dtype]).contiguous()
        self.depth, self.dtype = 3 * k, DTYPES[sums]

    def right(self, text: str, seed: int) -> bool:
        """Whether this text, which may not be the compiler's any more, computes the product."""
        set_seed(seed)
        module = Module(text)
        (kernel,) = module.kernels()
        c = torch.full(self.expected.shape, 99, dtype=self.dtype)
        arguments = [self.a, self.b, c, self.depth, self.a.stride(0), self.b.stride(0)]
        arguments += [0] * (len(module.parameters(kernel)) - len(arguments))  # scratch memory that it does not use
        module.launch(kernel, 2, self.threads, *arguments, shared=self.shared)
        return torch.equal(c.double(), self.expected)


# What the compiler must have used, for each product: else it shows nothing.
PRODUCTS: tuple[tuple[str, Callable[[], Product]], ...] = (
    # wgmma: swizzles of 32, 64 and 128 bytes, both majors, A in registers, groups of two times four warps.
    (r"wgmma\S*m64n64k16.f32.f16.f16", lambda: Product(90, "fp16", "fp32", (64, 64, 32), stages=3)),
    (r"wgmma\S*m64n16k16.f32.f16.f16", lambda: Product(90, "fp16", "fp32", (64, 16, 16), turned=(True, False))),
    (
        r"wgmma\S*m64n128k16.f32.bf16.bf16",
        lambda: Product(90, "bf16", "fp32", (128, 128, 64), warps=8, turned=(True, True)),
    ),
    (
        r"wgmma\S*m64n32k16.f32.bf16.bf16 {[^}]*}, {",
        lambda: Product(90, "bf16", "fp32", (128, 32, 64), turned=(False, True), twice=True),
    ),
    (r"wgmma\S*m64n64k8.f32.tf32.tf32", lambda: Product(90, "fp32", "fp32", (64, 64, 32), stages=1)),
    (r"wgmma\S*m64n64k32.s32.s8.s8", lambda: Product(90, "i8", "i32", (64, 64, 64), turned=(False, True))),
    # mma.sync with ldmatrix, both ways.
    (
        r"ldmatrix\S*x4.trans(.|\n)*mma.sync\S*m16n8k16\S*f32.f16.f16.f32",
        lambda: Product(80, "fp16", "fp32", (64, 64, 32), stages=3),
    ),
    (
        r"mma.sync\S*m16n8k16\S*f32.bf16.bf16.f32",
        lambda: Product(80, "bf16", "fp32", (32, 64, 64), turned=(True, True), stages=1),
    ),
    (r"stmatrix\S*x4", lambda: Product(90, "fp16", "fp32", (16, 16, 32))),
)


@pytest.mark.parametrize(("pattern", "product"), PRODUCTS, ids=[pattern for pattern, _ in PRODUCTS])
def test_what_triton_compiled_computes_the_product(pattern: str, product: Callable[[], Product]) -> None:
    made = product()
    assert re.search(pattern, made.text)
    assert [seed for seed in SEEDS if not made.right(made.text, seed)] == []


# ---- one line broken ----


@functools.cache
def pipelined() -> Product:
    return Product(90, "fp16", "fp32", (64, 64, 32), stages=3)


def broken(pattern: str, replacement: str) -> list[str]:
    """What comes of the pipelined product with the pattern replaced: a complaint, or "wrong", or "right", per seed."""
    made = pipelined()
    text, count = re.subn(pattern, replacement, made.text)
    assert count
    found = []
    for seed in SEEDS:
        try:
            found.append("right" if made.right(text, seed) else "wrong")
        except PtxError as error:
            found.append(str(error))
    return found


def test_a_missing_proxy_fence_is_noticed() -> None:
    assert all("no fence.proxy.async since" in found for found in broken(r"fence\.proxy\.async[^;]*;", ""))


def test_a_missing_wgmma_fence_is_noticed() -> None:
    assert all("no wgmma.fence before it" in found for found in broken(r"wgmma\.fence\.sync\.aligned;", ""))


def test_results_that_nobody_waits_for_are_noticed() -> None:
    found = broken(r"wgmma\.wait_group\.sync\.aligned 0;", "")
    assert any(each != "right" for each in found[1:])  # in turns, products are computed at once


def test_copies_that_nobody_waits_for_are_noticed() -> None:
    found = broken(r"cp\.async\.wait_group\s+2;", "")
    assert any(each != "right" for each in found[1:])  # in turns, copies are done at once
    # Waiting for one group fewer than needed, too.
    found = broken(r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 3;")
    assert any(each != "right" for each in found[1:])


def test_a_barrier_too_few_is_noticed() -> None:
    """Others' copies have not arrived, or their wgmma still reads what the next copies overwrite."""
    assert any(each != "right" for each in broken(r"bar\.sync\s+0;", ""))


# Triton's constant part of the descriptors: of A, rows of 64 bytes in atoms of 512; of B, rows of 128 bytes.
A_DESCRIPTOR, B_DESCRIPTOR = 2 << 62 | 512 >> 4 << 32, 1 << 62 | 1024 >> 4 << 32


def with_descriptors(change: Callable[[int], int], which: int) -> list[str]:
    """The product with ``change`` made to the descriptors that belong to ``which``."""
    made = pipelined()
    constants = re.findall(r"(?:or|add)\.[bs]64 \s*%rd\d+, %rd\d+, (-?\d+);", made.text)
    of_it = {c for c in constants if abs((int(c) & (1 << 64) - 1) - which) < 1 << 14}
    assert len(of_it) == 2  # two steps of 16 along k
    pattern = "|".join(rf"(?<= ){re.escape(c)}(?=;)" for c in of_it)
    text = re.sub(pattern, lambda found: str(change(int(found[0]) & (1 << 64) - 1)), made.text)
    outcomes = []
    for seed in SEEDS:
        try:
            outcomes.append("right" if made.right(text, seed) else "wrong")
        except PtxError as error:
            outcomes.append(str(error))
    return outcomes


@pytest.mark.parametrize("which", [A_DESCRIPTOR, B_DESCRIPTOR])
def test_other_descriptors_are_wrong(which: int) -> None:
    assert set(with_descriptors(lambda bits: bits, which)) == {"right"}
    for mode in range(4):  # another swizzle, or none
        if mode != which >> 62:
            changed = with_descriptors(lambda bits, mode=mode: bits & (1 << 62) - 1 | mode << 62, which)
            assert "right" not in changed
    assert "right" not in with_descriptors(lambda bits: bits + (8 << 32), which)  # another stride
    assert "right" not in with_descriptors(lambda bits: bits + 1, which)  # 16 bytes further
    assert all("base offset" in found for found in with_descriptors(lambda bits: bits + (1 << 49), which))
    assert all("reserved bits" in found for found in with_descriptors(lambda bits: bits + (1 << 46), which))
    # In the second row of the swizzle's pattern.
    assert all("is the first" in found for found in with_descriptors(lambda bits: bits + 8, which))
    assert all("beyond the block's" in found for found in with_descriptors(lambda bits: bits + 0x3000, which))


# ---- by hand ----


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
    """Row and column of each lane's elements of A; of B, column and row: the manual's formulas for groupID and so on."""
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
    operands = [names(prefix, 0, counts[0]), names(prefix, counts[0], counts[1]), names(prefix, sum(counts[:2]), counts[2])]
    results = names(prefix, 40, counts[2])
    body += f"mma.sync.aligned.{shape}.row.col.{types} {results}, {', '.join(operands)};"
    body += moves("st", prefix, 40, counts[2], "%out")
    out = torch.zeros(32, 256, dtype=torch.uint8)
    kernel(body).launch("k", 1, 32, data, out)
    result = torch.empty_like(c)
    result[of_sums] = out[:, : counts[2] * size].contiguous().view(c.dtype)
    return result


@pytest.mark.parametrize(("shape", "types", "dtype", "sums"), MMA)
def test_shapes_that_triton_does_not_use(shape: str, types: str, dtype: str, sums: str) -> None:
    height, width, depth = (int(size) for size in re.findall(r"\d+", shape))
    a = torch.randint(-3, 4, (height, depth)).to(DTYPES[dtype])
    b = torch.randint(-3, 4, (width, depth)).to(DTYPES[dtype])
    c = torch.randint(-99, 99, (height, width)).to(DTYPES[sums])
    assert torch.equal(run_mma(shape, types, a, b, c).double(), a.double() @ b.double().T + c.double())


@pytest.mark.parametrize(("addend", "total"), [(2.0**-25, 1.0), (2.0**-24 + 2.0**-23, 1.0 + 2.0**-23), (-(2.0**-26), 1 - 2.0**-24)])
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
    own = "{ .reg .b64 to; mul.wide.u32 to, %r60, -240; add.u64 %rd0, %out, to; }"  # rows are 16 bytes apart
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
        {own.replace("mul.wide.u32 to, %r60, -240; add.u64 %rd0, %out, to;", "mul.wide.u32 to, %r60, 240; sub.u64 %rd0, %out, to;")}
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
WGMMA = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r0, %r1, %r2, %r3}, %rd0, %rd1, 1, 1, 1, 0, 0;"
DESCRIPTORS = f"cvt.u64.u32 %rd0, %r61; shr.u64 %rd0, %rd0, 4; or.b64 %rd0, %rd0, {8 << 16 | 16 << 32}; mov.b64 %rd1, %rd0;"


@pytest.mark.parametrize(
    ("body", "threads", "complaint"),
    [
        (f"setp.lt.u32 %p0, %r60, 16; @%p0 {LDMATRIX}", 32, "not all 32 lanes"),
        (f"setp.lt.u32 %p0, %r60, 16; @%p0 ret; {LDMATRIX}", 32, "not all 32 lanes"),
        (f"add.u32 %r61, %r61, 8; {LDMATRIX}", 32, "not aligned to 16"),
        (f"{DESCRIPTORS} wgmma.fence.sync.aligned; {WGMMA}", 96, "fewer than four warps"),
        (f"{DESCRIPTORS} and.b32 %r1, %r60, 1; cvt.u64.u32 %rd2, %r1; add.u64 %rd1, %rd1, %rd2;"
         f" wgmma.fence.sync.aligned; {WGMMA}", 128, "not the same in all lanes"),
        (f"{DESCRIPTORS} shr.u32 %r1, %r60, 5; cvt.u64.u32 %rd2, %r1; add.u64 %rd1, %rd1, %rd2;"
         f" wgmma.fence.sync.aligned; {WGMMA}", 128, "with other descriptors"),
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
        "mma.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%r0, %r1, %r2, %r3}, {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%r0, %r1, %r2, %r3};",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r0, %r1, %r2, %r3}, {%r0, %r1}, {%r4, %r5}, {%r0, %r1, %r2, %r3};",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r0, %r1}, [%r61];",
        WGMMA.replace("m64n8k16", "m64n12k16"),
        WGMMA.replace(", 0, 0;", ";"),
    ],
)
def test_forms_that_do_not_exist_are_refused(text: str) -> None:
    out = torch.zeros(32, 64, dtype=torch.int32)
    with pytest.raises(PtxError, match="not known"):
        kernel(text).launch("k", 1, 32, out, out)
