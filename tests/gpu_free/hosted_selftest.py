"""The self-test of the CUDA screens on the host: it passes there, planted mistakes fail it, a failure costs no answer.

Run by test_cuda_host.py, and by `make asan` with a library that ASan and UBSan watch.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cuda_host import ROOT, SEEDS, set_seed
from gpu_data import Search, data

from vqkernels import _cuda, _cuda_nearest, _cuda_selftest
from vqkernels._cuda_nearest import DIRECT, SM80, SM90, Device

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _hosted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert _cuda.hosted(), "VQKERNELS_CUDA_LIBRARY must name libvqk_cuda_host.so"
    set_seed(SEEDS[1])  # in the order of 0, a wait that is missing goes unnoticed
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(_cuda_selftest, "CHECKED", 300)
    _cuda_selftest.forget()
    yield
    _cuda_selftest.forget()


def holds(screen: int, dim: int) -> bool:
    return _cuda_selftest.holds(CPU, screen, dim, _cuda_nearest._small_search, DIRECT, "screen", "using another")


@pytest.mark.parametrize("screen", [SM80, SM90], ids=["sm80", "sm90"])
@pytest.mark.parametrize("dim", [5, 8, 20, 64, 96, 128])
def test_screens_pass(screen: int, dim: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert holds(screen, dim)
    (verdict,) = _cuda_selftest.verdicts().values()
    # The vectors must come close to what they are there to find.
    assert 0.002 < verdict.share < 1


@pytest.mark.parametrize("screen", [SM80, SM90], ids=["sm80", "sm90"])
@pytest.mark.parametrize("layout", _cuda_selftest.LAYOUTS, ids=str)
def test_every_layout_multiplies(layout: tuple[int, int], screen: int) -> None:
    from benchmarks import gpu_blocks

    assert gpu_blocks.check(CPU, screen, *layout) is None


@pytest.mark.parametrize("screen", [SM80, SM90], ids=["sm80", "sm90"])
def test_sums_that_are_cut_off_too_early_fail(screen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    products = _cuda_selftest.products

    def cut_off(*args: Any, **kwargs: Any) -> Any:
        found = products(*args, **kwargs)
        return found._replace(sums=found.sums * np.float32(1.0005))

    monkeypatch.setattr(_cuda_selftest, "products", cut_off)
    with pytest.warns(RuntimeWarning, match=r"fails its self-test.*times what is allowed.*using another"):
        assert not holds(screen, 64)
    assert not holds(screen, 64), "one verdict per process, without another warning"


def test_a_search_that_is_wrong_fails() -> None:
    def wrong(x: torch.Tensor, codebook: torch.Tensor, screen: int) -> tuple[torch.Tensor, torch.Tensor]:
        indices, score = _cuda_nearest._small_search(x, codebook, screen)
        return (indices if screen == DIRECT else indices.roll(8, -1)), score

    with pytest.warns(RuntimeWarning, match="of 300 rows of a small search of 8 dims are wrong"):
        assert not _cuda_selftest.holds(CPU, SM90, 8, wrong, DIRECT, "screen", "using another")


@pytest.mark.parametrize("broken", [(SM90,), (SM90, SM80), (SM80,), ()], ids=str)
def test_screens_that_failed_are_not_used(broken: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda_nearest, "trusted", lambda device, screen, dim, ask: screen not in broken)
    monkeypatch.setattr(_cuda_nearest, "DIRECT_WORK", 0)
    monkeypatch.setattr(_cuda_nearest, "HOSTED", Device((9, 0), 3))
    x, codes = data(5000 if SM80 in broken and SM90 in broken else 100, 20, 6)
    chosen, _ = _cuda_nearest._plan(x[None, None], codes[None], ask=True)
    assert chosen.screen == next(s for s in (SM90, SM80, DIRECT) if s not in broken)
    Search("native").check(x, codes)


def descriptor(kind: int, stride: int) -> int:
    return kind << 62 | stride << 32 | 1 << 16


# (width, panels), what is planted, what must be named.
@pytest.mark.parametrize(
    ("layout", "planted", "named"),
    [
        ((16, 1), {"bits": descriptor(3, 32)}, r"^the STRIDE .* is wrong: right with stride 16 instead of 32\."),
        ((32, 1), {"bits": descriptor(3, 32)}, r"^the SWIZZLE .* is wrong: right with kind 2 instead of 3\."),
        ((16, 1), {"bits": descriptor(2, 16)}, r"^the SWIZZLE .* is wrong: right with kind 3 instead of 2\."),
        ((32, 1), {"advance": 1}, r"^ADVANCING THE DESCRIPTOR .* wrong: right with advance 2 instead of 1\."),
        ((32, 1), {"advance": 4}, r"^ADVANCING THE DESCRIPTOR .* wrong: right with advance 2 instead of 4\."),
    ],
    ids=lambda x: str(x)[:20],
)
def test_the_diagnosis_names_the_block(layout: tuple[int, int], planted: dict[str, int], named: str) -> None:
    from benchmarks import gpu_blocks

    assert gpu_blocks.check(CPU, SM90, *layout) is None
    found = gpu_blocks.check(CPU, SM90, *layout, **planted)
    assert found is not None
    assert re.search(named, found.what), found.what


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda p: p._replace(late=True), "MBARRIER"),
        (lambda p: p._replace(copied=p.sent[:-1] + b"?") if p.copied else p, r"BULK COPY: byte \d+ of"),
        (lambda p: p._replace(sums=p.sums * np.nan), "SCALE-D"),
        (lambda p: p._replace(sums=np.roll(p.sums, 8, 0)), r"rows .*FRAGMENT LAYOUT"),
        (lambda p: p._replace(sums=p.sums[:, ::-1]), r"columns .*FRAGMENT LAYOUT"),
        (lambda p: p._replace(sums=np.where(np.abs(p.sums) > 200, p.sums + 1, p.sums)), "ACCUMULATION"),
    ],
    ids=["late", "copied", "scale", "rows", "columns", "sums"],
)
def test_the_diagnosis_knows_what_came_back(spoil: Any, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu_blocks

    products = _cuda_selftest.products
    monkeypatch.setattr(_cuda_selftest, "products", lambda *args, **kwargs: spoil(products(*args, **kwargs)))
    monkeypatch.setattr(gpu_blocks, "_alternatives", lambda *args: None)
    found = gpu_blocks.check(CPU, SM90, 16, 1)
    assert found is not None
    assert re.search(named, found.what), found.what


def test_the_step_of_the_driver_passes_and_tells_crashes_from_mistakes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import gpu_blocks

    monkeypatch.setattr(_cuda_selftest, "LAYOUTS", ((16, 1), (32, 1)))
    monkeypatch.setattr(gpu_blocks, "_alternatives", lambda *args: None)
    assert gpu_blocks.main(["--device", "cpu", "--dims", "5"]) == 0
    assert capsys.readouterr().out.endswith("every screen multiplies and searches as it should\n")
    check = gpu_blocks.check

    def wrong(device: torch.device, screen: int, width: int, panels: int) -> Any:
        return check(device, screen, width, panels, **({"advance": 1} if width == 32 else {}))

    monkeypatch.setattr(gpu_blocks, "check", wrong)
    assert gpu_blocks.main(["--device", "cpu", "--dims", "5"]) == 1
    assert capsys.readouterr().out.endswith("SCREENS FAILED: wgmma wrong\n")

    def crashes(device: torch.device, screen: int, *layout: int) -> Any:
        if screen == SM90:
            raise RuntimeError("an illegal instruction was encountered")
        return check(device, screen, *layout)

    monkeypatch.setattr(gpu_blocks, "check", crashes)
    assert gpu_blocks.main(["--device", "cpu", "--dims", "5"]) == 1
    assert capsys.readouterr().out.endswith("SCREENS FAILED: wgmma crashed\n")


def test_a_screen_can_be_ruled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda_nearest, "DIRECT_WORK", 0)
    x, codes = torch.zeros(1, 1, 100, 6), torch.zeros(1, 200, 6)
    for name, screen in (("wgmma", SM90), ("auto", SM90), ("mma", SM80), ("float64", DIRECT)):
        monkeypatch.setenv("VQKERNELS_CUDA_SCREEN", name)
        assert _cuda_nearest._plan(x, codes, ask=False)[0].screen == screen
        line = _cuda_nearest.describe(x, codes)
        assert line.startswith(_cuda_nearest.SCREENS[screen])
        assert ("(the wgmma screen failed its self-test or is ruled out)" in line) == (screen != SM90)
    monkeypatch.delenv("VQKERNELS_CUDA_SCREEN")
    monkeypatch.setattr(_cuda_nearest, "has_wgmma", lambda: False)
    assert _cuda_nearest._plan(x, codes, ask=False)[0].screen == SM80, "built for sm_90 without the a"
    monkeypatch.setenv("VQKERNELS_CUDA_SCREEN", "hopper")
    with pytest.raises(ValueError, match="VQKERNELS_CUDA_SCREEN is 'hopper'"):
        _cuda_nearest._plan(x, codes, ask=False)
