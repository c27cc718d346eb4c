"""Matrix instructions of the PTX machine.

What decides is a compiler whose output works on GPUs: Triton's matrix products run here with its own layouts, swizzles,
descriptors and fences. Sums of small integers are exact, so results must be equal. Then the same kernels with one line
broken.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ptx_machine import Module, PtxError, set_races, set_seed
from ptx_text import DTYPES

pytest.importorskip("triton", reason="Triton has no build for this platform")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SEEDS = range(4)
SUMS = {"fp16": tl.float16, "fp32": tl.float32, "fp64": tl.float64, "i32": tl.int32}


@pytest.fixture(autouse=True)
def in_turns() -> Iterator[None]:
    yield
    set_seed(0)
    set_races(False)


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


def outcomes(text: str, product: Product) -> list[str]:
    """What comes of it per seed: a complaint, or "wrong", or "right"."""
    found = []
    for seed in SEEDS:
        try:
            found.append("right" if product.right(text, seed) else "wrong")
        except PtxError as error:
            found.append(str(error))
    return found


def broken(pattern: str, replacement: str, product: Callable[[], Product] = pipelined) -> list[str]:
    """A product, the pipelined one if none is given, with the pattern replaced."""
    made = product()
    text, count = re.subn(pattern, replacement, made.text)
    assert count
    return outcomes(text, made)


def test_a_missing_proxy_fence_is_noticed() -> None:
    # Where ordinary stores fill shared memory. Copies by cp.async pass without: copies.cpp says why.
    found = broken(r"fence\.proxy\.async[^;]*;", "", lambda: Product(90, "fp16", "fp32", (64, 64, 32), stages=1))
    assert all("no fence.proxy.async since" in complaint for complaint in found)


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
    constants = re.findall(r"(?:or|add)\.[bs]64 \s*%rd\d+, %rd\d+, (-?\d+);", pipelined().text)
    of_it = {c for c in constants if abs((int(c) & (1 << 64) - 1) - which) < 1 << 14}
    assert len(of_it) == 2  # two steps of 16 along k
    pattern = "|".join(rf"(?<= ){re.escape(c)}(?=;)" for c in of_it)
    text = re.sub(pattern, lambda found: str(change(int(found[0]) & (1 << 64) - 1)), pipelined().text)
    return outcomes(text, pipelined())


def with_swizzle(mode: int, bits: int) -> int:
    return bits & (1 << 62) - 1 | mode << 62


@pytest.mark.parametrize("which", [A_DESCRIPTOR, B_DESCRIPTOR])
def test_other_descriptors_are_wrong(which: int) -> None:
    assert set(with_descriptors(lambda bits: bits, which)) == {"right"}
    for mode in range(4):  # another swizzle, or none
        if mode != which >> 62:
            changed = with_descriptors(functools.partial(with_swizzle, mode), which)
            assert "right" not in changed
    assert "right" not in with_descriptors(lambda bits: bits + (8 << 32), which)  # another stride
    assert "right" not in with_descriptors(lambda bits: bits + 1, which)  # 16 bytes further
    assert all("base offset" in found for found in with_descriptors(lambda bits: bits + (1 << 49), which))
    assert all("reserved bits" in found for found in with_descriptors(lambda bits: bits + (1 << 46), which))
    # In the second row of the swizzle's pattern.
    assert all("is the first" in found for found in with_descriptors(lambda bits: bits + 8, which))
    assert all("beyond the block's" in found for found in with_descriptors(lambda bits: bits + 0x3000, which))


@pytest.mark.parametrize("product", [product for _, product in PRODUCTS], ids=[pattern for pattern, _ in PRODUCTS])
def test_a_missing_barrier_is_an_error_in_every_order(product: Callable[[], Product]) -> None:
    """Or in none, where the compiler was more careful than it had to be."""
    made = product()
    set_races(True)
    assert set(outcomes(made.text, made)) == {"right"}
    barriers = list(re.finditer(r"bar\.sync\s+0;", made.text))
    needed = 0
    for barrier in barriers:
        found = outcomes(made.text[: barrier.start()] + made.text[barrier.end() :], made)
        complaints = [outcome not in ("right", "wrong") for outcome in found]
        assert all(complaints) or set(found) == {"right"}
        needed += all(complaints)
    assert needed >= len(barriers) - 2 > 0
