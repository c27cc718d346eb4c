"""``nearest`` on the CUDA library, on a GPU: the CPU's bits from every screen, no N x K, graphs, streams, the bound.

Skipped without a CUDA device; tests/gpu_free runs the same kernels on the host.
"""

from __future__ import annotations

from typing import Any

import gpu_data
import pytest
import torch
from torch import Tensor

import vqkernels
from vqkernels import _cuda, _cuda_nearest
from vqkernels._cuda_nearest import DIRECT, SM80, SM90, Plan
from vqkernels.ops.nearest import METRICS, nearest
from vqkernels.testing import assert_nearest, tie_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_cuda.unavailable() is not None, reason=str(_cuda.unavailable())),
]
SHAPES = ((1, 1, 1), (3, 7, 2), (33, 100, 3), (300, 700, 5), (257, 1000, 8), (100, 129, 12), (300, 700, 24),
          (500, 2049, 32), (63, 500, 100), (300, 1025, 64), (300, 1025, 256), (700, 3000, 190), (65, 300, 500),
          (65, 300, 768))  # fmt: skip


@pytest.fixture(params=["auto", "direct", "sm80", "sm90"])
def screen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every screen that this GPU has, whatever the plan would choose."""
    name = str(request.param)
    if name == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is Hopper's")
    number = {"direct": DIRECT, "sm80": SM80, "sm90": SM90}.get(name)
    if number is not None:

        def plan(heads: int, rows: int, codes: int, dim: int, device: Any) -> Plan:
            if number == DIRECT and heads * rows > _cuda_nearest.DIRECT_ROWS:
                return Plan(SM80, 3, rows, 128)
            return Plan(SM80 if number == SM90 and dim > 512 else number, 2, max(rows, 1), 128)

        monkeypatch.setattr(_cuda_nearest, "plan", plan)
    return name


search = gpu_data.Search("native")


def data(n: int, k: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, codes = gpu_data.data(n, k, d, dtype)
    return x.cuda(), codes.cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_row_equals_the_oracle(shape: tuple[int, int, int], metric: str, dtype: torch.dtype, screen: str) -> None:
    x, codes = data(*shape, dtype)
    indices, score = search(x, codes, metric)
    assert_nearest(indices.cpu(), x.cpu(), codes.cpu(), metric, score.cpu())


@pytest.mark.parametrize("case", tie_cases(), ids=lambda case: case.name)
def test_lowest_index_wins_on_exact_ties(case: Any, screen: str) -> None:
    assert search(case.x.cuda(), case.codebook.cuda(), case.metric)[0].tolist() == case.indices.tolist()


@pytest.mark.parametrize("metric", METRICS)
def test_nan_infinity_and_extreme_ranges(metric: str, screen: str) -> None:
    x, codes = data(40, 60, 6)
    x[2, 3], x[5, 0], x[7], x[9], x[11] = float("nan"), float("inf"), 0.0, x[9] * 1e30, x[11] * 1e-40
    codes[4, 2], codes[9, 1], codes[11], codes[20:50] = float("nan"), float("inf"), 0.0, codes[3]
    indices, score = search(x, codes, metric)
    assert_nearest(indices.cpu(), x.cpu(), codes.cpu(), metric, score.cpu())


def test_heads_and_channel_first_maps_are_read_in_place(screen: str) -> None:
    x = torch.randn(2, 3, 70, 11, device="cuda").transpose(2, 3)  # (H, B, S, D), rows contiguous
    codes = torch.randn(2, 300, 70, device="cuda")
    found = nearest(x, codes, "l2", "exact", "native")
    expected = nearest(x.cpu(), codes.cpu(), "l2", "exact", "native")
    assert found[0].cpu().equal(expected[0])
    assert found[1].cpu().equal(expected[1])


@pytest.mark.parametrize(("n", "k", "d"), [(4096, 16384, 256), (16384, 16384, 8), (50, 65536, 32), (70000, 1024, 128)])
def test_large_searches_equal_the_cpu_and_themselves(n: int, k: int, d: int, screen: str) -> None:
    x, codes = data(n, k, d)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = search(x, codes)
    peak = torch.cuda.max_memory_allocated() - before
    assert n < 1000 or peak < n * k * 4 / 2, f"{peak} bytes: as much as an N x K matrix would take"
    second = search(x, codes)
    expected = vqkernels.nearest(x.cpu(), codes.cpu())
    for i in range(2):
        assert first[i].equal(second[i])
        assert first[i].cpu().equal(expected[i])


@pytest.mark.parametrize("d", [8, 16, 64, 256, 1024])
def test_published_accumulation_constant_holds(d: int, screen: str) -> None:
    # One large product and many that an aligned accumulator cuts off, all exact in float16: were A too small, the
    # certificate would drop the right one of codes whose screened scores differ only by what is cut off.
    for power in range(8, 14):
        for sign in (1.0, -1.0):
            codes = torch.full((40, d), 2.0**-power)
            codes *= 1 + torch.randint(0, 2, (40, d)) / 1024
            codes[:, 0] = 1.0
            codes[:, 1:] *= sign
            x = codes.abs()
            indices, score = search(x.cuda(), codes.cuda(), "dot")
            assert_nearest(indices.cpu(), x, codes, "dot", score.cpu())


def test_cuda_graph_replays_the_search_on_new_values(screen: str) -> None:
    x, codes = data(300, 500, 32)
    search(x, codes)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices, score = search(x, codes)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        codes.mul_(2)
        graph.replay()
        torch.cuda.synchronize()
        assert_nearest(indices.cpu(), x.cpu(), codes.cpu(), "l2", score.cpu())


def test_searches_on_several_streams_do_not_meet(screen: str) -> None:
    cases = [data(2000, 3000, 40 + i) for i in range(4)]
    expected = [search(*case) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    found = []
    for _ in range(5):
        for stream, case in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                found.append(search(*case))
    torch.cuda.synchronize()
    for i, (indices, score) in enumerate(found):
        assert indices.equal(expected[i % 4][0])
        assert score.equal(expected[i % 4][1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_tensor_on_another_device_is_searched_there() -> None:
    x, codes = (t.to("cuda:1") for t in data(300, 500, 32))
    with torch.cuda.device(0):
        indices, score = search(x, codes)
        assert torch.cuda.current_device() == 0
    assert indices.device == x.device
    assert_nearest(indices.cpu(), x.cpu(), codes.cpu(), "l2", score.cpu())


def test_explain_names_the_kernel() -> None:
    x, codes = data(3000, 500, 32)
    with vqkernels.use_backend("native"):
        line = vqkernels.explain("nearest", x, codes)
    assert "screen" in line
    assert "tiles of" in line
