"""The self-test of the accumulation constants on Triton's kernels: it passes, and a planted violation is handled.

Run by test_triton_interpreter.py in Triton's interpreter, and by test_ptx_triton.py as compiled.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import vqkernels
from vqkernels import tuned
from vqkernels._triton import nearest_pack, nearest_search, selftest
from vqkernels.ops.nearest import METRICS
from vqkernels.ops.nearest import triton as backend
from vqkernels.testing import assert_nearest

PROBE = selftest.Probe(16, 16, 32, True, False, 4, 1)
CPU = torch.device("cpu")
SAID = "vqkernels: the tensor cores of"  # an older Triton's interpreter has warnings of its own


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tuned, "HEURISTIC", {2**31: tuned.Config(16, 16, 32, 4, 1)})
    monkeypatch.setattr(backend, "COLLECT_ROWS", 16)
    selftest._verdicts.clear()
    yield
    selftest._verdicts.clear()


@pytest.mark.parametrize("dim", [16, 32, 128])
@pytest.mark.parametrize("resident", [True, False])
def test_float32_sums_stay_below_the_published_bound(dim: int, resident: bool) -> None:
    probe = selftest.Probe(32, 16, dim, resident, False, 4, 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", SAID, RuntimeWarning)
        assert selftest.holds(CPU, probe)
    # The vectors must come close to what they are there to find.
    assert 0.002 < selftest.verdicts()[CPU, probe].share < 1.0


def test_one_verdict_per_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[selftest.Probe] = []
    measure = selftest._measure
    monkeypatch.setattr(selftest, "_measure", lambda device, probe: measured.append(probe) or measure(device, probe))
    x, codes = torch.randn(9, 20), torch.randn(30, 20)
    for _ in range(2):
        vqkernels.nearest(x, codes, backend="triton")
    assert len(measured) == 2  # the screen's product and the collection's
    vqkernels.nearest(torch.randn(9, 70), torch.randn(30, 70), backend="triton")
    assert len(measured) == 4  # several steps of the contraction


def cut_off(kernel: Any) -> Any:
    """The probe of a chip that keeps 12 bits of what it adds."""

    class Spy:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                kernel[grid](*args, **kwargs)
                scores = args[4]
                scores.copy_(torch.trunc(scores / 2.0**17) * 2.0**17)

            return launch

    return Spy()


@pytest.mark.parametrize("metric", METRICS)
def test_a_chip_that_adds_worse_gets_no_screen_and_exact_answers(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest_search, "probe", cut_off(nearest_search.probe))
    for name in ("screen", "merge", "collect", "decide", "resolve"):
        monkeypatch.setattr(nearest_search, name, None)
    monkeypatch.setattr(nearest_pack, "pack_rows", None)
    x, codes = torch.randn(20, 12), torch.randn(40, 12)
    with pytest.warns(RuntimeWarning, match="the float16 screen is turned off there, results stay exact"):
        indices, score = vqkernels.nearest(x, codes, metric=metric, backend="triton")
    assert_nearest(indices, x, codes, metric, score)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", SAID, RuntimeWarning)  # once
        vqkernels.nearest(x, codes, metric=metric, backend="triton")
    text = vqkernels.explain("nearest", x, codes, backend="triton")
    assert "float64 scan: the self-test of the tensor cores failed" in text
    assert "SELF-TEST FAILED, float64 scan instead of the screen: Probe(block_m=16" in str(vqkernels.info())


def test_explain_and_info_say_that_it_passed() -> None:
    x, codes = torch.randn(5, 12), torch.randn(7, 12)
    assert "self-test before the first search" in vqkernels.explain("nearest", x, codes, backend="triton")
    assert "self-test not run in this process" in str(vqkernels.info())
    vqkernels.nearest(x, codes, backend="triton")
    assert "self-test passed" in vqkernels.explain("nearest", x, codes, backend="triton")
    assert "self-test passed (2 configurations" in str(vqkernels.info())


def test_a_capture_before_the_first_search_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="so run it once before the capture"):
        selftest.holds(torch.device("cuda"), PROBE)
    assert selftest.verdicts() == {}
