"""The suite on a lent GPU, without one: the build before it, and the plugin that leaves none of its results unread."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_build, gpu_suite  # noqa: E402

TESTS = """
import time, pytest

def test_right():
    pass

def test_wrong():
    assert 1 == 2, "as planted"

@pytest.mark.parametrize("i", range(6))
def test_slow(i):
    time.sleep({sleep})
"""
BROKEN = """
from benchmarks import gpu_suite

failed = False

def pytest_runtest_logreport(report):
    global failed
    failed |= report.failed

gpu_suite.broken = lambda: "an illegal memory access was encountered" if failed else None
"""
TIME_IS_UP = """
import threading

reports = 0

def pytest_runtest_logreport(report):
    global reports
    reports += report.when == "call"
    if report.when == "call" and reports == 2 and not hasattr(CONFIG, "workerinput"):
        threading.Timer(0.5, CONFIG.pluginmanager.getplugin("gpu-suite-progress").stop).start()

def pytest_configure(config):
    global CONFIG
    CONFIG = config
"""
needs_xdist = pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="needs pytest-xdist")
WAYS = [pytest.param([], id="one process"), pytest.param(["-n", "2"], id="workers", marks=needs_xdist)]


def suite(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest with the plugin, on the files in a folder; without SIGINT, as in a shell's background job."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_suite"]
    return subprocess.run([*command, *arguments, "."], cwd=folder, env=environment, capture_output=True, text=True,
                          check=False, timeout=120)  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_suite_whose_time_is_up_tells_what_it_found(tmp_path: Path, way: list[str]) -> None:
    (tmp_path / "test_it.py").write_text(TESTS.format(sleep=60))
    (tmp_path / "conftest.py").write_text(TIME_IS_UP)
    start = time.monotonic()
    done = suite(tmp_path, *way)
    assert time.monotonic() - start < 60, "a test that takes longer is not waited for"
    assert done.returncode == 2
    assert "FAILED test_it.py::test_wrong (call)" in done.stdout
    assert "TIME IS UP: 1 failed, 1 passed" in done.stdout
    assert "as planted" in done.stdout.partition("TIME IS UP")[0], "at once"
    assert "1 failed, 1 passed" in done.stdout.splitlines()[-1]


def test_the_report_comes_before_the_budget_ends() -> None:
    for seconds, wait in ((100.0, 100 - gpu_suite.MARGIN), (3.0, 1.0)):
        progress = gpu_suite.Progress(time.time() + seconds)
        progress.pytest_sessionstart()
        assert progress.timer is not None
        assert progress.timer.interval == pytest.approx(wait, abs=0.9)
        progress.pytest_sessionfinish()
        progress.timer.join(5)
        assert not progress.timer.is_alive(), "a suite in time is left alone"


@needs_xdist
def test_a_process_with_a_broken_context_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS.format(sleep=0))
    (tmp_path / "conftest.py").write_text(BROKEN)
    done = suite(tmp_path, "-n", "1")
    assert "crashed while running 'test_it.py::test_wrong'" in done.stdout
    assert "7 passed" in done.stdout, "by the process that came after"


def test_without_workers_a_broken_context_ends_the_suite(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS.format(sleep=0))
    (tmp_path / "conftest.py").write_text(BROKEN)
    done = suite(tmp_path)
    assert "the device takes no more calls after test_it.py::test_wrong: an illegal memory access" in done.stdout
    assert "1 failed, 1 passed" in done.stdout


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources, and a `pip` that writes what the test says."""
    for name in ("pyproject.toml", "csrc/cuda/a.cu", "vqkernels/a.py", "vqkernels/tuned/b.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(gpu_build, "ROOT", tmp_path)
    for name in ("FOLDER", "OBJECTS", "LOG"):
        monkeypatch.setattr(gpu_build, name, tmp_path / "build" / name.lower())
    monkeypatch.setattr(gpu_build, "state", lambda archs, state=gpu_build.state: state(archs, tmp_path))
    monkeypatch.delenv("VQKERNELS_CUDA_ARCHS", raising=False)
    return tmp_path


def pip(monkeypatch: pytest.MonkeyPatch, status: int = 0, library: bool = True) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def run(command: list[str], **given: Any) -> SimpleNamespace:
        calls.append(given)
        given["stdout"].write("nvcc: a planted mistake\n")
        lib = gpu_build.FOLDER / "vqkernels" / "lib"
        lib.mkdir(parents=True)
        if library:
            (lib / "libvqk_cuda13.so").touch()
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_one_build_per_state_of_the_sources(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pip(monkeypatch)
    for _ in range(2):
        assert gpu_build.build(needs_cuda=True) == 0
        os.utime(tree / "csrc/cuda/a.cu")  # as in a fresh copy of the tree
    assert len(calls) == 1
    for change in ("csrc/cuda/a.cu", "vqkernels/tuned/b.json", "vqkernels/new.py"):
        (tree / change).write_text("changed")
        assert gpu_build.build(needs_cuda=True) == 0
    assert len(calls) == 4
    monkeypatch.setenv("VQKERNELS_CUDA_ARCHS", "80-real")
    assert gpu_build.build(needs_cuda=True) == 0
    assert len(calls) == 5
    # One that came along from a machine without nvcc.
    (gpu_build.FOLDER / "vqkernels/lib/libvqk_cuda13.so").unlink()
    assert gpu_build.build(needs_cuda=False) == 0
    assert len(calls) == 5
    assert gpu_build.build(needs_cuda=True) == 0
    assert len(calls) == 6


def test_a_build_that_fails_says_why(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip(monkeypatch, status=1)
    assert gpu_build.build(needs_cuda=False) == 1
    assert "a planted mistake" in capsys.readouterr().out
    calls = pip(monkeypatch, library=False)
    assert gpu_build.build(needs_cuda=True) == 0, "Triton's kernels are tested all the same"
    out = capsys.readouterr().out
    assert "a planted mistake" in out
    assert "NO CUDA LIBRARY WAS BUILT" in out
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("capability", "archs"), [((9, 0), "90a-real"), ((8, 0), "80-real"), ((8, 9), "80-real"), ((10, 0), "")]
)
def test_only_the_gpu_that_is_there_is_compiled_for(
    capability: tuple[int, int], archs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VQKERNELS_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert gpu_build.architectures() == archs
    monkeypatch.setenv("VQKERNELS_CUDA_ARCHS", "80-real 90-virtual")
    assert gpu_build.architectures() == "80-real 90-virtual"
