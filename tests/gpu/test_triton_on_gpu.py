"""``nearest`` of the Triton backend on a GPU: the CPU's indices, no N x K, CUDA graphs, and the bound itself.

Skipped without a CUDA device; tests/gpu_free covers the same kernels in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import gpu_data
import pytest
import torch
from torch import Tensor

import vqkernels
from vqkernels import _triton
from vqkernels._triton import selftest
from vqkernels.testing import assert_nearest, tie_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_triton.unavailable("cuda") is not None, reason=str(_triton.unavailable("cuda"))),
]
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def _ask_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    # By environment, because autograd runs backward passes of CUDA tensors in a thread of its own.
    monkeypatch.setenv("VQKERNELS_BACKEND", "triton")


SHAPES = ((1, 1, 1), (3, 7, 2), (33, 100, 3), (257, 1000, 8), (100, 129, 12), (500, 2049, 32), (63, 500, 100),
          (300, 1025, 256), (65, 300, 768))  # fmt: skip


search = gpu_data.Search("triton")


def data(n: int, k: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, codes = gpu_data.data(n, k, d, dtype)
    return x.to(DEVICE), codes.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_row_equals_the_oracle(shape: tuple[int, int, int], metric: str, dtype: torch.dtype) -> None:
    x, codes = data(*shape, dtype)
    indices, score = search(x, codes, metric)
    assert_nearest(indices.cpu(), x.cpu(), codes.cpu(), metric, score.cpu())


@pytest.mark.parametrize("case", tie_cases(), ids=lambda case: case.name)
def test_lowest_index_wins_on_exact_ties(case: Any) -> None:
    assert search(case.x.to(DEVICE), case.codebook.to(DEVICE), case.metric)[0].tolist() == case.indices.tolist()


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_nan_infinity_and_extreme_ranges(metric: str) -> None:
    x, codes = data(40, 60, 6)
    x[2, 3], x[5, 0], x[7], x[9], x[11] = float("nan"), float("inf"), 0.0, x[9] * 1e30, x[11] * 1e-40
    codes[4, 2], codes[9, 1], codes[11], codes[20:50] = float("nan"), float("inf"), 0.0, codes[3]
    indices, score = search(x, codes, metric)
    assert_nearest(indices.cpu(), x.cpu(), codes.cpu(), metric, score.cpu())


@pytest.mark.parametrize(("n", "k", "d"), [(4096, 16384, 256), (16384, 16384, 8), (50, 65536, 32)])
def test_large_searches_equal_the_cpu_and_themselves(n: int, k: int, d: int) -> None:
    x, codes = data(n, k, d)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = search(x, codes)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < n * k * 4 / 2, f"{peak} bytes: as much as an N x K matrix would take"
    second = search(x, codes)
    expected = vqkernels.nearest(x.cpu(), codes.cpu())
    for i in range(2):
        assert first[i].equal(second[i])
        assert first[i].cpu().equal(expected[i])


@pytest.mark.parametrize("rows", [3, 40, 3000])
@pytest.mark.parametrize("d", [4, 8, 16, 64, 256, 1024])
def test_published_accumulation_constant_holds(d: int, rows: int) -> None:
    before = set(selftest.verdicts())
    search(*data(rows, 100, d))
    found = selftest.verdicts()
    assert len(found) > 0
    for key in set(found) - before:
        print(f"{key[1]}: {found[key].share:.3f} of the published bound")
    assert all(verdict.holds for verdict in found.values()), found


@pytest.mark.parametrize("d", [8, 16, 64, 256, 1024])
def test_the_screens_own_bounds_enclose_worst_case_products(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # One large product and many that an aligned accumulator cuts off, all exact in float16: only A can be wrong.
    from vqkernels._triton import nearest_search

    seen: dict[str, Any] = {}

    class Spy:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                screen[grid](*args, **kwargs)
                seen.update(zip(screen.arg_names, args, strict=False))

            return launch

    screen = nearest_search.screen
    monkeypatch.setattr(nearest_search, "screen", Spy())
    for power in range(8, 14):
        for sign in (1.0, -1.0):
            x = torch.full((200, d), 2.0**-power, device=DEVICE)
            x *= 1 + torch.randint(0, 2, (200, d), device=DEVICE) / 1024
            x[:, 0] = 1.0
            codes = x[:1].clone()
            codes[:, 1:] *= sign
            search(x, codes, "dot")
            # a = 2^14 x and b = 2^14 e: p and q come from the largest element, which is 1.
            best = (x.double() @ codes.double().T)[:, 0] * 2.0**28
            part = seen["part"].double()
            assert (part[0, :, 0].amax(0) <= best).all()
            assert (best <= part[0, :, 1].amax(0)).all()


@pytest.mark.parametrize("n", [1, 5, 64, 1000, 3000])
def test_every_number_of_rows_equals_the_cpu(n: int) -> None:
    x, codes = data(n, 30000, 64)
    found, expected = search(x, codes), vqkernels.nearest(x.cpu(), codes.cpu(), backend="reference")
    assert found[0].cpu().equal(expected[0])
    assert found[1].cpu().equal(expected[1])


def test_row_counts_do_not_compile_kernels_anew() -> None:
    from vqkernels._triton import nearest_search

    _, codes = data(1, 500, 32)
    for n in (100, 101, 1999):
        search(torch.randn(n, 32, device=DEVICE), codes)

    def compiled() -> list[int]:
        caches = (nearest_search.screen.device_caches, nearest_search.resolve.device_caches)
        return [len(cache[torch.cuda.current_device()][0]) for cache in caches]

    before = compiled()
    for n in (102, 160, 777, 1024):
        search(torch.randn(n, 32, device=DEVICE), codes)
    assert compiled() == before


def test_capturing_before_the_first_search_is_a_clear_error() -> None:
    x, codes = data(64, 500, 32)
    known = dict(selftest._verdicts)
    selftest._verdicts.clear()
    try:
        with (
            pytest.raises(RuntimeError, match="so run it once before the capture"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            search(x, codes)
    finally:
        selftest._verdicts.update(known)
    torch.cuda.synchronize()


def test_cuda_graph_replays_the_search_on_new_values() -> None:
    x, codes = data(64, 500, 32)
    search(x, codes)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices, score = search(x, codes)
    x.copy_(torch.randn_like(x))
    codes.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert_nearest(indices.cpu(), x.cpu(), codes.cpu(), "l2", score.cpu())
