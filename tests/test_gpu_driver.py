"""The driver behind `make gpu`, without a GPU: budgets, failures, what is written, and toy measurements."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vqkernels
from vqkernels import tuned

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu, gpu_peers, gpu_report, gpu_smoke, gpu_stages, gpu_timing  # noqa: E402

CPU = torch.device("cpu")
PEAKS = {"fp16": 1e12, "tf32": 1e12, "fp32": 1e12, "bytes": 1e11}


def step(name: str, seconds: float, *command: str) -> gpu.Step:
    return gpu.Step(name, seconds, lambda options, left: [sys.executable, *command], "about")


HANGS = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"


def options(folder: Path, **more: Any) -> argparse.Namespace:
    return argparse.Namespace(device="cpu", output=folder, quick=True, **more)


def test_a_step_that_fails_or_hangs_stops_no_other(tmp_path: Path) -> None:
    log = io.StringIO()
    steps = [
        step("info", 20, "-c", "print('all well')"),
        step("smoke", 20, "-c", "import sys; print('broken'); sys.exit(3)"),
        # A child of the step must not outlive it either.
        step("tests", 1.5, "-c", HANGS),
        gpu.Step("memcheck", 9, lambda o, s: gpu.NOT_ON_PATH, "about"),
        step("bench", 20, "-c", "print('late')"),
    ]  # fmt: skip
    outcomes = gpu.run_steps(steps, options(tmp_path), log, 60.0)
    assert [o.status for o in outcomes] == ["ok", "FAILED", "OUT OF TIME", "skipped", "ok"]
    assert outcomes[0].note == "all well"
    assert outcomes[1].note == "exit status 3: broken"
    assert outcomes[2].seconds < 10
    assert "all well" in log.getvalue()
    assert "!!! memcheck: compute-sanitizer is not on the PATH" in gpu._summary(outcomes)
    assert [o.status for o in gpu.run_steps(steps[:1], options(tmp_path), log, 0.0)] == ["OUT OF TIME"]


STAMP = {"device": {"name": "NVIDIA Test 9"}, "versions": {"torch": "2"}, "commit": "abc", "date": "today"}


def verdict(
    folder: Path, monkeypatch: pytest.MonkeyPatch, device: str, **status: str
) -> tuple[str, dict[str, str] | None]:
    given = {"selftest": "ok", "smoke": "ok", "tests": "ok"} | status
    outcomes = [gpu.Outcome(name, found, 1.0, "") for name, found in given.items()]
    text = gpu._verdict(outcomes, STAMP, argparse.Namespace(device=device, output=folder))
    (folder / "nvidia-test-9.json").write_text((folder / "tuned.json").read_text())
    monkeypatch.setenv("VQKERNELS_TUNED", str(folder))
    tuned.clear_cache()
    found = tuned.verified("NVIDIA Test 9")
    tuned.clear_cache()
    return text, found


def test_only_a_green_run_on_a_gpu_leaves_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, record = verdict(tmp_path, monkeypatch, "cuda")
    assert record == {"commit": "abc", "date": "today", "torch": "2"}
    assert "vqkernels/tuned/nvidia-test-9.json" in text
    for device, status in (
        ("cpu", {}), ("cuda", {"tests": "FAILED"}), ("cuda", {"selftest": "OUT OF TIME"}),
        ("cuda", {"memcheck": "FAILED"}),
    ):  # fmt: skip
        text, record = verdict(tmp_path, monkeypatch, device, **status)
        assert record is None
        assert "goes on not choosing Triton" in text


def test_the_record_is_what_lets_auto_choose_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vqkernels import _triton

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test 9")
    monkeypatch.setenv("VQKERNELS_TUNED", str(tmp_path))
    tuned.clear_cache()
    reason = _triton.held_back(torch.device("cuda", 0))
    assert reason is not None
    assert "not verified on NVIDIA Test 9" in reason
    verdict(tmp_path, monkeypatch, "cuda")
    assert _triton.held_back(torch.device("cuda", 0)) is None
    assert _triton.held_back(CPU) is not None
    tuned.clear_cache()


def test_every_stage_measures_ours_and_says_why_others_did_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch.compile takes seconds per case, and has a test of its own kind in test_benchmarks.
    monkeypatch.setattr(gpu_peers, "_compile", lambda *_: (_ for _ in ()).throw(gpu_peers.Unavailable("not here")))
    monkeypatch.setattr(gpu_stages.gpu_cases, "SEARCH", ("encodec", "llamagen"))
    monkeypatch.setattr(gpu_stages.gpu_cases, "FEW_ROWS", (1, 4))
    monkeypatch.setattr(gpu_stages.gpu_cases, "UPDATE", ("llamagen",))
    monkeypatch.setattr(gpu_stages.gpu_cases, "TRAIN", ("cifar",))
    bench = gpu_stages.Bench(CPU, PEAKS, 60.0, quick=True)
    stages = {name: {r["case"]: r for r in measure(bench)} for name, measure in gpu_stages.STAGES.items()}
    assert bench.failed == []
    assert set(stages["search"]) == {"encodec", "llamagen"}
    assert set(stages["few"]) == {"few-1", "few-4"}
    ours = f"vqkernels-{gpu_peers.backends(CPU)[0]}" if gpu_peers.backends(CPU) else None
    for name in ("search", "update", "train"):
        for record in stages[name].values():
            assert ours is None or record["results"][ours]["ms"]["median"] > 0
    assert stages["search"]["encodec"]["skipped"]["compile"] == "not here"
    data = {"environment": gpu.describe("cpu"), "peaks": PEAKS, "stages": stages}
    (tmp_path / "gpu.json").write_text(json.dumps(data))
    text = gpu_report.sections(gpu_report.load(tmp_path))
    assert set(text) == {"gpu-search", "gpu-few", "gpu-update", "gpu-train", "gpu-targets"}
    assert "torch.cdist + argmin" in text["gpu-search"]
    assert text["gpu-targets"].count("not measured") >= 5
    if ours is not None:
        assert gpu_report.chart(data, tmp_path / "chart.png")


def test_wrong_indices_are_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = vqkernels.nearest

    def wrong(*args: Any, backend: str = "auto", **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        indices, score = right(*args, backend="reference", **kwargs)
        return (indices if backend == "reference" else indices ^ 1), score

    monkeypatch.setattr(vqkernels, "nearest", wrong)
    monkeypatch.setattr(gpu_peers, "backends", lambda device: ["native"])
    bench = gpu_stages.Bench(CPU, PEAKS, 60.0, quick=True)
    case, z, codebook = bench.make(gpu_stages.gpu_cases.BY_NAME["encodec"])
    skipped: dict[str, str] = {}
    work, _, _ = bench.admit([gpu_peers._ours("native")], case, z, codebook, skipped)
    assert work == {}
    assert "NOT REPORTED" in skipped["vqkernels-native"]
    assert bench.failed == ["vqkernels-native on encodec: wrong rows"]


def test_contestants_take_turns_and_the_budget_holds() -> None:
    order: list[str] = []
    ticks = iter(range(1, 1000))

    def clock(work: Any) -> float:
        work()
        return float(next(ticks))

    series = gpu_timing.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, clock,
                                   rounds=9, budget=-1.0, fewest=3)  # fmt: skip
    assert order == list("aabb" + "ab" + "ba" + "ab")
    assert [len(s.seconds) for s in series.values()] == [3, 3]


def test_smoke_compares_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_smoke.run(CPU, "reference") > 80
    original = vqkernels.ops.lookup
    monkeypatch.setattr(vqkernels.ops, "lookup", lambda *a: original(*a) + torch.rand(()))
    with pytest.raises(AssertionError, match="lookup on reference"):
        gpu_smoke.run(CPU, "reference")


def test_help_and_a_machine_without_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        gpu.main(["--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    assert all(s.name in text for s in gpu.STEPS)
    if not torch.cuda.is_available():
        assert gpu.main(["--steps", "info"]) == 1
        assert "torch sees no CUDA device" in capsys.readouterr().err
