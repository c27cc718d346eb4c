"""The building blocks of the CUDA screens on a GPU: a failure says which one is wrong, and what would be right.

Skipped without a CUDA device; tests/gpu_free/hosted_selftest.py shows on the host that planted mistakes are named.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vqkernels import _cuda, _cuda_nearest, _cuda_selftest
from vqkernels._cuda_nearest import SM80, SM90

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_cuda.unavailable() is not None, reason=str(_cuda.unavailable())),
]


@pytest.fixture(params=[SM80, SM90], ids=["sm80", "sm90"])
def screen(request: pytest.FixtureRequest) -> int:
    if request.param == SM90 and (torch.cuda.get_device_capability() != (9, 0) or not _cuda_nearest.has_wgmma()):
        pytest.skip("wgmma is Hopper's")
    return int(request.param)


@pytest.mark.parametrize("layout", _cuda_selftest.LAYOUTS, ids=str)
def test_products_of_known_integers(layout: tuple[int, int], screen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    from benchmarks import gpu_blocks

    assert gpu_blocks.check(torch.device("cuda", 0), screen, *layout) is None


@pytest.mark.parametrize("dim", [3, 9, 30, 64, 96, 200, 400])
def test_the_self_test_passes(dim: int, screen: int) -> None:
    device = torch.device("cuda", 0)
    assert _cuda_nearest.trusted(device, screen, dim)
    assert _cuda_selftest.known(device, screen, dim)


def test_a_capture_without_a_verdict_asks_for_a_call_before() -> None:
    x, codes = torch.randn(2000, 44, device="cuda"), torch.randn(500, 44, device="cuda")
    _cuda_selftest.forget()
    from vqkernels.ops.nearest import nearest

    def search() -> torch.Tensor:
        return nearest(x[None, None], codes[None], "l2", "exact", "native")[0]

    with (
        pytest.raises(RuntimeError, match="run it once before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        search()
    torch.cuda.synchronize()
    expected = search()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = search()
    graph.replay()
    assert found.equal(expected)
