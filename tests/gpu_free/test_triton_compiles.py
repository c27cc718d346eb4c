"""Every Triton kernel that the backend launches, compiled for GPUs that are not here; and what kernels must not do.

What is asserted is what a compiler can know: it compiles, it fits in shared memory, it does not spill registers, it
uses the tensor cores, and float64 sums are not fused. Speed is not among them.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from launches import PACKAGE, Launch, compiled, defined, is_kernel, machine_loops, recorded, resources
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vqkernels import _triton
from vqkernels._triton import interpreted, selftest, soft_scores
from vqkernels.ops.codebook_sum import triton as codebook_sum
from vqkernels.ops.ema_update import triton as ema_update
from vqkernels.ops.lookup import triton as lookup
from vqkernels.ops.nearest import triton as nearest
from vqkernels.ops.quantize_grad import triton as quantize_grad
from vqkernels.ops.quantize_output import triton as quantize_output
from vqkernels.ops.residual_nearest import triton as residual_nearest
from vqkernels.ops.soft_assign import triton as soft_assign
from vqkernels.ops.soft_assign_grad import triton as soft_assign_grad

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
# N, K, D, metric, dtype of x, dtype of the codebook: one per shipped configuration and per kind of operand.
SEARCHES = (
    (70000, 500, 3, "l2", torch.float32, torch.float32),
    (5000, 20000, 8, "cosine", torch.bfloat16, torch.float32),
    (70000, 500, 32, "l2", torch.float16, torch.float16),
    (5000, 20000, 64, "dot", torch.float32, torch.float32),
    (70000, 500, 100, "l2", torch.bfloat16, torch.bfloat16),
    (70000, 500, 256, "l2", torch.float32, torch.float32),
    # A few rows: 64, then 16 in a tile, with lists of one, a few and very many splits.
    (1000, 500, 256, "l2", torch.float32, torch.float32),
    (50, 300000, 256, "cosine", torch.bfloat16, torch.float32),
    (8, 3000, 256, "l2", torch.float32, torch.float32),
    (1, 1, 1, "l2", torch.float32, torch.float32),
)
# D, dtype: every width of a gradient's sums, dims that no vector of loads fits, 16-bit operands.
SOFTMAXES = (
    (7, torch.float32),
    (8, torch.float32),
    (32, torch.float32),
    (64, torch.float32),
    (101, torch.float32),
    (256, torch.float32),
    (256, torch.bfloat16),
)
F64_SUM = {"decide", "scan", "resolve", "code_stats", "_few"}


@functools.cache
def launches() -> tuple[Launch, ...]:
    measured: list[selftest.Probe] = []

    def holds(device: torch.device, *probes: selftest.Probe) -> bool:
        measured.extend(probes)
        return True

    with recorded() as found, pytest.MonkeyPatch.context() as patch:
        patch.setattr(selftest, "holds", holds)  # nothing runs here, so there is nothing to judge
        for n, k, d, metric, x_dtype, e_dtype in SEARCHES:
            x, codes = torch.zeros(1, 1, 1, d, dtype=x_dtype), torch.zeros(1, 1, d, dtype=e_dtype)
            nearest.run(x.expand(1, 1, n, d), codes.expand(1, k, d), metric, "exact")
        for probe in dict.fromkeys(measured):
            selftest._measure(torch.device("cpu"), probe)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for d in (7, 256) if dtype == torch.float32 else (256,):
                all_levels(d, dtype)
                other_ops(torch.zeros(2, 3, 50, d, dtype=dtype), torch.zeros(2, 100, d, dtype=dtype))
    return tuple(found)


def all_levels(d: int, dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        return
    for n, k in ((1, 2048), (16, 300), (5000, 1024)):
        x, codes = torch.zeros(1, 1, 1, d, dtype=dtype).expand(1, 1, n, d), torch.zeros(1, 1, d).expand(1, k, d)
        residual_nearest.run(x, [codes] * 3, n > 1)


@functools.cache
def softmax_launches(name: str) -> tuple[Launch, ...]:
    """Their tiles and precision go by the kind of GPU."""
    with recorded() as found, pytest.MonkeyPatch.context() as patch:
        target = TARGETS[name][0]
        if target.backend == "hip":
            patch.setattr(torch.version, "hip", "7.0")
        else:
            patch.setattr(soft_scores, "capability", lambda device: target.arch // 10)
        for d, dtype in SOFTMAXES:
            x, codes = torch.zeros(2, 50, d, dtype=dtype), torch.zeros(2, 100, d, dtype=dtype)
            weight, entropy = torch.zeros(x.shape[:2]), torch.zeros(2)
            soft_assign.run(x, codes, weight, True, 0.1)
            soft_assign_grad.run(x, codes, weight, entropy, weight[:, :1].expand(2, 100), None, None, True, 0.1)
            soft_assign_grad.run(x, codes, weight, None, None, x, codes, False, 0.1)
    return tuple(found)


def other_ops(z: torch.Tensor, codes: torch.Tensor) -> None:
    indices = torch.zeros(z.shape[:3], dtype=torch.int64)
    commitment, state, counts = torch.ones(()), torch.zeros(codes.shape), torch.zeros(codes.shape[:2])
    for channel_first in (False, True) if z.dtype == torch.float32 else (False,):
        lookup.run(codes, indices, channel_first, torch.float32)
        for gradient in ("straight_through", "rotation", "none"):
            quantize_grad.run(z, z, codes, indices, commitment, gradient, channel_first)
        for distance in (None, torch.zeros(z.shape[:3])):
            quantize_output.run(z, codes, indices, distance, True, channel_first)
        ema_update.run(counts, state, state, counts, state, 0.99, 1e-5, channel_first)
    codebook_sum.run(z, indices, codes.shape[1])
    # Rows for several chunks, and keys beyond 16 bits.
    many = torch.zeros(1, 1, 300, z.shape[-1], dtype=z.dtype)
    codebook_sum.run(many, torch.zeros(1, 1, 300, dtype=torch.int64), 2**15)


def test_every_kernel_of_the_package_is_launched() -> None:
    assert {launch.fn.__name__ for launch in (*launches(), *softmax_launches("sm_90"))} == defined()


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_kernels_compile_and_fit(name: str) -> None:
    assert not interpreted()
    target, shared = TARGETS[name]
    uses = 0
    old = target.backend == "hip" and _triton.version() < nearest.OLDEST_FOR_AMD
    for launch in (*launches(), *softmax_launches(name)):
        if old and launch.fn.__name__ == "collect":
            continue
        binary = compiled(launch, target)
        assert binary.metadata.shared <= shared, f"{launch}: {binary.metadata.shared} bytes of shared memory"
        if target.backend == "hip":
            spills = re.findall(r"vgpr_spill_count:\s*(\d+)", binary.asm["amdgcn"])
            assert spills, launch
            assert set(spills) == {"0"}, f"{launch}: {spills} registers spilled"
            continue
        used = resources(binary)
        # A frame of 16 bytes is no spilled tile: sm_100 (8) and with Triton 3.6 sm_80 have one in the smallest kernels.
        assert used["STACK"] <= 16, f"{launch}: {used}"
        assert used["LOCAL"] == 0, f"{launch}: {used}"
        check_ptx(launch, binary.asm["ptx"])
        uses += bool(re.search(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", binary.asm["ptx"]))
        assert launch not in softmax_launches(name) or products(launch, binary.asm["ptx"])
    assert target.backend == "hip" or uses >= len(SEARCHES)


def products(launch: Launch, ptx: str) -> bool:
    """Whether they are made by tensor cores in TF32."""
    kinds = re.findall(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*", ptx)
    return bool(kinds) and all("tf32" in kind for kind in kinds)


def test_sums_over_lanes_are_launched_without_fusion() -> None:
    # A lane's own product, fused into the sum of another lane's, leaves lanes that should agree with different last
    # bits, and either may be stored. Sums of integers alone may be fused.
    every = (*launches(), *softmax_launches("sm_80"), *softmax_launches("sm_90"))
    sums = {launch for launch in every if "tl.sum(" in launch.fn.src and launch.fn.__name__ != "collect"}
    assert {launch.fn.__name__ for launch in sums} >= {
        "_output",
        "_finish",
        "_backward",
        "_update",
        "code_centre",
        "_usage",
    }
    assert not [launch for launch in sums if dict(launch.options).get("enable_fp_fusion") is not False]


def test_a_triton_too_old_for_amd_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    x, codes = torch.zeros(1, 1, 1, 4), torch.zeros(1, 2, 4)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(_triton, "version", lambda: (3, 6))
    assert nearest.supports(x, codes, "l2", "exact") == "Triton 3.6 cannot translate the search for AMD GPUs; 3.7 can"
    monkeypatch.setattr(_triton, "version", lambda: (3, 7))
    assert nearest.supports(x, codes, "l2", "exact") is None


def check_ptx(launch: Launch, ptx: str) -> None:
    assert not re.search(r"\b(atom|red)\.\S*f(16|32|64)", ptx), launch
    if launch.fn.__name__ in F64_SUM:
        # Without .rn ptxas would be free to fuse; div and sqrt must be the correctly rounded ones.
        assert "fma.rn.f64" not in ptx, launch
        assert not re.search(r"(add|sub|mul|div|sqrt)\.f64|(div|sqrt)\.approx\S*\.f64", ptx), launch


def loops(ptx: str) -> list[str]:
    """The text between every backward branch and its target."""
    labels = {m.group(1): m.start() for m in re.finditer(r"^(\$L__BB\d+_\d+):", ptx, re.M)}
    jumps = re.finditer(r"bra(?:\.uni)?\s+(\$L__BB\d+_\d+)", ptx)
    return [ptx[labels[m.group(1)] : m.start()] for m in jumps if labels[m.group(1)] < m.start()]


def test_lanes_of_the_screen_talk_after_the_last_tile_only() -> None:
    screens = [s for s in launches() if s.fn.__name__ == "screen" and dict(s.constants)["BLOCK_M"] == 128]
    assert len(screens) >= 5
    for launch in screens:
        ptx = compiled(launch, TARGETS["sm_90"][0]).asm["ptx"]
        assert "shfl.sync.bfly" in ptx
        assert not [body for body in loops(ptx) if "shfl.sync.bfly" in body], launch
        assert any("wgmma" in body for body in loops(ptx)), launch


@pytest.mark.parametrize(
    ("n", "k", "d", "most"),
    [(65536, 16384, 8, 2.9), (65536, 4096, 32, 4.3), (48000, 1024, 128, 7.4), (65536, 16384, 256, 10.5)],
    ids=["LlamaGen", "VAR", "EnCodec", "VQGAN"],
)
def test_pairs_of_the_screen_cost_what_was_counted(
    n: int, k: int, d: int, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # docs/gpu.md: instructions of a thread per pair of row and code on sm_90, of which an SM issues 128 a clock.
    monkeypatch.setattr(selftest, "holds", lambda *args: True)
    with recorded() as found:
        nearest.run(torch.zeros(1, 1, 1, d).expand(1, 1, n, d), torch.zeros(1, 1, d).expand(1, k, d), "l2", "exact")
    (launch,) = (s for s in found if s.fn.__name__ == "screen")
    shape, options = dict(launch.constants), dict(launch.options)
    products = [body for body in machine_loops(compiled(launch, TARGETS["sm_90"][0])) if "HGMMA" in body]
    tile = max(products, key=len)
    assert "FMNMX" in tile, "the loop over tiles"
    panels = 1 if shape["RESIDENT"] else -(-d // shape["BLOCK_D"])
    assert len(products) == (1 if panels == 1 else 2)
    instructions = len(tile) + (panels - 1) * len(min(products, key=len))
    pairs = shape["BLOCK_M"] * shape["BLOCK_N"] / (32 * options["num_warps"])
    assert instructions / pairs <= most


@pytest.mark.parametrize(("d", "forward", "backward"), [(8, 75, 160), (32, 73, 177), (256, 240, 1140)])
def test_pairs_of_a_softmax_cost_what_was_counted(
    d: int, forward: float, backward: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # benchmarks/NOTES.md: both calls of a training step on sm_90; a gradient is launched once per 128 dims.
    monkeypatch.setattr(soft_scores, "capability", lambda device: 9)
    x, codes, weight = torch.zeros(1, 64, d), torch.zeros(1, 64, d), torch.zeros(1, 64)
    with recorded() as found:
        soft_assign.run(x, codes, weight, True, 0.1)
        soft_assign_grad.run(x, codes, weight, weight[:, 0], weight, None, None, True, 0.1)
    costs = []
    for launch in found:
        shape, options = dict(launch.constants), dict(launch.options)
        tiles, dims = sorted(machine_loops(compiled(launch, TARGETS["sm_90"][0])), key=len, reverse=True)[:2]
        instructions = len(tiles) + (-(-d // shape["BLOCK_D"]) - 1) * len(dims)
        pairs = shape["BLOCK_M"] * shape["BLOCK_N"] / (32 * options["num_warps"])
        costs.append(instructions / pairs * (-(-d // shape["PART"]) if "PART" in shape else 1))
    assert len(costs) == 5
    assert sum(costs[:2]) <= forward
    assert sum(costs[2:]) <= backward


class Operators(TorchDispatchMode):
    """Names of torch's own operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


FEW = ["code_centre", "code_stats", "pack_codes", "pack_rows", "screen", "collect", "resolve"]
MANY = [*FEW[:5], "merge", "collect", "decide", "scan"]


@pytest.mark.parametrize(
    ("n", "metric", "kernels"),
    [(64, "l2", FEW), (64, "cosine", FEW[1:]), (1, "dot", FEW[1:]), (5000, "l2", MANY)],
)
def test_launches_of_a_search_are_counted(
    n: int, metric: str, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "holds", lambda *args: True)
    x, codes = torch.zeros(1, 1, n, 20), torch.zeros(1, 300, 20)
    with recorded() as found, Operators() as operators:
        nearest.run(x, codes, metric, "exact")
    assert [launch.fn.__name__ for launch in found] == kernels
    # Nothing of torch's own runs on the device but the sort; memory is allocated, not filled.
    assert set(operators.names) - {"empty", "fill_"} == ({"sort"} if "merge" in kernels else set())


@pytest.mark.parametrize("levels", [1, 8])
def test_launches_of_a_residual_search_are_counted(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "holds", lambda *args: True)
    codebooks = [torch.zeros(1, 2048, 256)] * levels
    for n, kernels in (
        (16, ["_few"] * (levels + 1)),
        (64, [*FEW, "_subtract"] * levels),
        (5000, [*MANY, "_subtract"] * levels),
    ):
        launched: list[str] = []
        monkeypatch.setattr(JITFunction, "run", lambda self, *a, log=launched, **k: log.append(self.fn.__name__))
        x = torch.zeros(1, 1, 1, 256).expand(1, 1, n, 256)
        with Operators() as operators:
            residual_nearest.run(x, codebooks, False)
        assert launched == kernels
        assert set(operators.names) - {"empty", "fill_"} == ({"sort"} if n == 5000 else set())


def test_launches_of_the_epilogue_are_two() -> None:
    z, codes, indices = torch.zeros(1, 1, 50, 20), torch.zeros(1, 300, 20), torch.zeros(1, 1, 50, dtype=torch.int64)
    with recorded() as found:
        quantize_output.run(z, codes, indices, torch.zeros(1, 1, 50), False, False)
    assert [launch.fn.__name__ for launch in found] == ["_output", "_finish"]


@pytest.mark.parametrize(("n", "k"), [(256, 300), (257, 300), (5000, 40000)])
def test_launches_of_the_codebook_update_are_counted(n: int, k: int) -> None:
    z, indices = torch.zeros(1, 1, n, 20), torch.zeros(1, 1, n, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch, recorded() as found, Operators() as operators:
        patch.setattr(_triton, "check_indices", lambda *args: None)  # for CPU tensors only
        codebook_sum.run(z, indices, k)
    merged = ["_merge_chunks"] if n > 256 else []
    assert [launch.fn.__name__ for launch in found] == ["_row_keys", "_slot_owners", "_chunk_sums", *merged]
    assert set(operators.names) - {"empty", "fill_"} == {"sort"}
    size, state = torch.zeros(1, k), torch.zeros(1, k, 2)
    with recorded() as found, Operators() as operators:
        ema_update.run(size, state, state, size, state, 0.99, 1e-5, False)
    assert [launch.fn.__name__ for launch in found] == ["_sizes", "_update"]
    assert set(operators.names) <= {"empty", "fill_"}


def jit_functions() -> list[Any]:
    found = [
        (path, node)
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and is_kernel(node)
    ]
    assert len(found) >= 10
    return found


@pytest.mark.parametrize(("path", "node"), [pytest.param(p, n, id=f"{p.stem}-{n.name}") for p, n in jit_functions()])
def test_kernel_is_deterministic_and_does_not_recompile_with_sizes(path: Path, node: ast.FunctionDef) -> None:
    source = ast.unparse(node)
    assert "atomic" not in source, "the order of float atomics changes between runs"
    assert "autotune" not in source, "tuning at run time stalls training; ship a configuration"
    constants = {a.arg for a in node.args.args if a.annotation is not None and "constexpr" in ast.unparse(a.annotation)}
    blocks = {c for c in constants if c.startswith("BLOCK")}
    options = {
        "METRIC",
        "MERGE",
        "SCORE",
        "BEGIN",
        "LAST",
        "SOFT",
        "SPLIT",
        "SPLITS",
        "RESIDENT",
        "CAPACITY",
        "CHUNK",
        "DOUBLE",
        "FOLDED",
        "GRADIENT",
        "HALF",
        "MEASURED",
        "NORMALIZE",
        "PART",
        "PRECISION",
    }
    assert constants - blocks <= options
