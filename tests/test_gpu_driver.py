"""The driver behind `make gpu`, without a GPU: budgets, failures, what is written. Measurements have their own file."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vqkernels import tuned

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu, gpu_record, gpu_steps  # noqa: E402

CPU = torch.device("cpu")
PEAKS = {"fp16": 1e12, "tf32": 1e12, "fp32": 1e12, "bytes": 1e11}


def step(name: str, seconds: float, *command: str) -> gpu_steps.Step:
    return gpu_steps.Step(name, seconds, lambda options, left: [sys.executable, *command], "about")


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
        gpu_steps.Step("memcheck", 9, lambda o, s: gpu.NOT_FOUND, "about"),
        step("bench", 20, "-c", "print('late')"),
    ]  # fmt: skip
    outcomes = gpu.run_steps(steps, options(tmp_path), log, 60.0)
    assert [o.status for o in outcomes] == ["ok", "FAILED", "OUT OF TIME", "skipped", "ok"]
    assert outcomes[0].note == "all well"
    assert outcomes[1].note == "exit status 3: broken"
    assert outcomes[2].seconds < 10
    assert "all well" in log.getvalue()
    assert "!!! memcheck: there is no compute-sanitizer on the PATH" in gpu_steps.summary(outcomes)
    assert [o.status for o in gpu.run_steps(steps[:1], options(tmp_path), log, 0.0)] == ["OUT OF TIME"]


def test_nothing_is_waited_for_in_vain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that left the group keeps the pipe open; a driver that is stuck lets no process end."""
    monkeypatch.setattr(gpu_steps, "GRACE", 0.3)
    leaves = HANGS.replace("run(", "Popen(").replace("])", "], start_new_session=True)")
    steps = [step("info", 20, "-c", leaves + "; print('left')"), step("smoke", 20, "-c", "print('late')")]
    outcomes = gpu.run_steps(steps, options(tmp_path), io.StringIO(), 60.0)
    assert [(o.status, o.note) for o in outcomes] == [("ok", "left"), ("ok", "late")]
    assert outcomes[0].seconds < 15


def test_what_a_step_leaves_over_goes_to_elastic_ones(tmp_path: Path) -> None:
    given: list[float] = []

    def command(o: argparse.Namespace, seconds: float) -> str:
        given.append(seconds)
        return "nothing to run"

    steps = [gpu_steps.Step(n, s, command, "", elastic=n in "bd") for n, s in zip("abcd", (5, 20, 10, 30), strict=True)]
    gpu.run_steps(steps, options(tmp_path), io.StringIO(), 100.0)
    assert given == pytest.approx([5, 20 + 40, 10, 100], abs=1)  # nothing took any time
    given.clear()
    gpu.run_steps(steps, options(tmp_path), io.StringIO(), 18.0)
    assert given == pytest.approx([5, 18, 10, 18], abs=1)


def test_a_tool_that_cannot_work_here_has_found_nothing(tmp_path: Path) -> None:
    code = "import sys; print('Error: Device not supported'); sys.exit(1)"
    command = [sys.executable, "-c", code]
    steps = [
        gpu_steps.Step("memcheck", 20, lambda o, s: command, "", cannot=gpu.REFUSED),
        step("smoke", 20, "-c", code),
    ]
    outcomes = gpu.run_steps(steps, options(tmp_path), io.StringIO(), 60.0)
    assert [o.status for o in outcomes] == ["skipped", "FAILED"]
    assert "!!! memcheck: Error: Device not supported: NOTHING WAS CHECKED" in gpu_steps.summary(outcomes)
    assert {s.name for s in gpu.STEPS if s.cannot} == set(gpu_record.SANITIZERS)


def test_output_of_any_encoding_is_kept(tmp_path: Path) -> None:
    code = r"import sys; sys.stdout.buffer.write(b'broken \xff, \xe2\x88\x9e\n')"
    (outcome,) = gpu.run_steps([step("info", 20, "-c", code)], options(tmp_path), io.StringIO(), 60.0)
    assert outcome.note == "broken \ufffd, ∞"


def test_a_call_that_is_cut_off_has_recorded_the_steps_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "describe", lambda device: STAMP)
    show = f"import json; print([o['step'] for o in json.load(open({str(tmp_path / 'run.json')!r}))['steps']])"
    steps = [step("info", 20, "-c", "print('all well')"), step("smoke", 20, "-c", show)]
    monkeypatch.setattr(gpu, "STEPS", steps)
    assert gpu.main(["--device", "cpu", "--output", str(tmp_path), "--steps", "info", "smoke"]) == 0
    assert json.loads((tmp_path / "run.json").read_text())["steps"][1]["note"] == "['info']"


@pytest.mark.parametrize(
    ("code", "screen"),
    [
        ("print('every screen ...')", ""),
        ("import sys; sys.exit('SCREENS FAILED: wgmma wrong')", ""),  # the library finds out by itself
        ("import sys; sys.exit('SCREENS FAILED: wgmma crashed')", "mma"),
        ("import sys; sys.exit('SCREENS FAILED: mma.sync crashed, wgmma crashed')", "float64"),
        ("import time; time.sleep(60)", "mma"),
    ],
)
def test_a_screen_that_hangs_or_crashes_spoils_one_step(code: str, screen: str, tmp_path: Path) -> None:
    log = io.StringIO()
    show = "import os; print('screen', os.environ.get('VQKERNELS_CUDA_SCREEN', ''))"
    steps = [step("blocks", 2, "-c", code), step("smoke", 20, "-c", show)]
    outcomes = gpu.run_steps(steps, options(tmp_path), log, 60.0)
    assert outcomes[1].note == f"screen {screen}".strip()
    assert (f"!!! {outcomes[0].note}: every step from here on" in log.getvalue()) == bool(screen)


STAMP = {
    "device": {"name": "NVIDIA Test 9"},
    "versions": {"torch": "2"},
    "commit": "abc",
    "date": "today",
    "sources": {"native": "feedfeedfeedfeed", "triton": tuned.triton_sources()},
}
GREEN = {"blocks": "ok", "selftest": "ok", "smoke": "ok", "tests": "ok"}


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """What a call does with tuned.json once it is copied to where the package looks."""
    monkeypatch.setenv("VQKERNELS_TUNED", str(tmp_path / "shipped"))
    (tmp_path / "shipped").mkdir()

    def copy() -> None:
        shutil.copy(tmp_path / "tuned.json", tmp_path / "shipped" / "nvidia-test-9.json")
        tuned.clear_cache()

    tuned.clear_cache()
    yield copy
    tuned.clear_cache()


def verdict(folder: Path, device: str = "cuda", stamp: dict[str, Any] = STAMP, **status: str) -> str:
    outcomes = [{"step": name, "status": found} for name, found in (GREEN | status).items()]
    return gpu_record.verdict(folder, stamp, outcomes, device)


def test_only_a_green_run_on_a_gpu_leaves_a_record(tmp_path: Path, shipped: Callable[[], None]) -> None:
    text = verdict(tmp_path)
    shipped()
    assert tuned.verified("NVIDIA Test 9") == {
        "commit": "abc", "date": "today", "torch": "2", "sources": STAMP["sources"],
    }  # fmt: skip
    assert "vqkernels/tuned/nvidia-test-9.json" in text
    for device, status in (
        ("cpu", {}), ("cuda", {"tests": "FAILED"}), ("cuda", {"selftest": "OUT OF TIME"}),
        ("cuda", {"blocks": "FAILED"}),
        ("cuda", {"memcheck": "FAILED"}),
    ):  # fmt: skip
        text = verdict(tmp_path, device, **status)
        shipped()
        assert tuned.verified("NVIDIA Test 9") is None
        assert "goes on not choosing these kernels" in text
    text = verdict(tmp_path, stamp=STAMP | {"quick": True})
    shipped()
    assert tuned.verified("NVIDIA Test 9") is None, "a part of the suite proves nothing"
    assert "(--quick)" in text


def test_the_record_is_what_lets_auto_choose(
    tmp_path: Path, shipped: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vqkernels import _cuda, _triton

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test 9")
    monkeypatch.setattr(_cuda, "sources", lambda: "feedfeedfeedfeed")
    device = torch.device("cuda", 0)
    for backend in (_triton, _cuda):
        assert "not verified on NVIDIA Test 9" in str(backend.held_back(device))
    verdict(tmp_path)
    shipped()
    assert (_triton.held_back(device), _cuda.held_back(device)) == (None, None)
    assert _triton.held_back(CPU) is not None
    verdict(tmp_path, stamp=STAMP | {"sources": {"triton": "0" * 16}})
    shipped()
    assert "its kernels are not those" in str(_triton.held_back(device))
    assert "did not run it" in str(_cuda.held_back(device))


def measured(**milliseconds: float) -> dict[str, Any]:
    return {f"vqkernels-{k}": {"ms": {"median": v}} for k, v in milliseconds.items()} | {"cdist": {"ms": {"median": 9}}}


SIZE = {"rows": 65536, "codes": 16384, "dim": 256}
FEW = {
    "vqkernels-native": {"device_us": 9.0, "eager_us": 20.0},
    "vqkernels-triton": {"device_us": 8.0, "eager_us": 60.0},
}
STAGES = {
    "search": {
        "vqgan": {"case": "vqgan", **SIZE, "results": measured(native=0.75, triton=1.5)},
        "vqgan-bf16": {"case": "vqgan-bf16", **SIZE, "results": measured(native=0.5, triton=0.25)},
        "broken": {"case": "broken", **SIZE, "dim": 7, "results": measured()},
    },
    "few": {"few-1": {"case": "few-1", "rows": 1, "codes": 2048, "dim": 256, "results": FEW}},
    "ops": {
        "lookup vqgan": {"case": "lookup vqgan", "op": "lookup", "size": "vqgan", **SIZE,
                         "results": measured(native=0.5, triton=0.25)},
        "ema_update vqgan": {"case": "ema_update vqgan", "op": "ema_update", "size": "vqgan", **SIZE, "rows": 0,
                             "results": measured(triton=0.125)},
    },
}  # fmt: skip


def test_measured_times_become_the_table_that_auto_goes_by(tmp_path: Path, shipped: Callable[[], None]) -> None:
    gpu.write_json(tmp_path / "gpu.json", {"environment": STAMP, "stages": STAGES})
    text = verdict(tmp_path)
    assert "CUDA or Triton by measured times" in text
    content = json.loads((tmp_path / "tuned.json").read_text())
    assert content["schema"] == tuned.SCHEMA
    assert content["device"] == "NVIDIA Test 9"
    assert content["auto_measured"] == {k: STAMP[k] for k in ("commit", "date", "versions", "sources")}
    assert {op: [e["case"] for e in entries] for op, entries in content["auto"].items()} == {
        "nearest": ["vqgan", "few-1"], "lookup": ["vqgan"], "ema_update": ["vqgan"],
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []
    shipped()

    def chosen(op: str, *sizes: int) -> str:
        found = tuned.choice("NVIDIA Test 9", op, *sizes)
        assert found is not None
        return found.why

    assert chosen("nearest", 65536, 16384, 256).endswith("(vqgan): native 0.75 ms, triton 1.5 ms")
    # Few rows wait for the launches, not for the kernels.
    assert chosen("nearest", 2, 2048, 256).endswith("(few-1, the nearest in the table): native 0.02 ms, triton 0.06 ms")
    assert chosen("lookup", 65536, 16384, 256).endswith("triton 0.25 ms, native 0.5 ms")
    assert chosen("ema_update", 0, 16384, 256).endswith("16384 codes x 256 dims (vqgan): triton 0.125 ms")


def test_times_of_other_kernels_make_no_table(tmp_path: Path) -> None:
    for other in (
        {"commit": "abd"},
        {"quick": True},
        {"sources": {}},
        {"versions": {"torch": "3"}},
        {"device": {"name": "another"}},
    ):
        gpu.write_json(tmp_path / "gpu.json", {"environment": STAMP | other, "stages": STAGES})
        text = verdict(tmp_path)
        assert "auto" not in json.loads((tmp_path / "tuned.json").read_text())
        assert f"gpu.json is of another {next(iter(other)).removesuffix('s')}" in text
    # On a CPU nothing is measured that a GPU could go by.
    gpu.write_json(tmp_path / "gpu.json", {"environment": STAMP, "stages": STAGES})
    verdict(tmp_path, "cpu")
    assert "auto" not in json.loads((tmp_path / "tuned.json").read_text())


def test_configurations_of_an_earlier_call_stay(tmp_path: Path) -> None:
    config = {"32": tuned.Config(64, 64, 32, 4, 2).to_dict()}
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "nvidia-test-9.json").write_text(json.dumps({"nearest": config, "measured": {"rows": 1}}))
    for _ in range(2):  # the tuner's own file is there in the first call only
        verdict(tmp_path)
        content = json.loads((tmp_path / "tuned.json").read_text())
        assert (content["nearest"], content["measured"]) == (config, {"rows": 1})
    verdict(tmp_path, stamp=STAMP | {"device": {"name": "NVIDIA Test 10"}})
    assert json.loads((tmp_path / "tuned.json").read_text())["nearest"] == {}


def test_two_calls_add_up_and_a_changed_kernel_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = {"triton": "a" * 16}
    monkeypatch.setattr(gpu, "describe", lambda device: STAMP | {"sources": dict(kernels)})
    steps = [
        step(name, 20, "-c", "print('all well')") for name in ("info", "selftest", "smoke", "tests", "bench", "report")
    ]
    monkeypatch.setattr(gpu, "STEPS", steps)
    given = ["--device", "cpu", "--output", str(tmp_path)]

    def run(*arguments: str) -> dict[str, str]:
        assert gpu.main([*given, "--steps", *arguments]) == 0
        return {o["step"]: o["status"] for o in json.loads((tmp_path / "run.json").read_text())["steps"]}

    assert run("prove") == dict.fromkeys(["info", "selftest", "smoke", "tests"], "ok")
    assert list(run("measure")) == ["info", "selftest", "smoke", "tests", "bench", "report"]
    assert "from earlier calls: info ok, selftest ok, smoke ok, tests ok" in capsys.readouterr().out
    assert (tmp_path / "log.txt").read_text().count("NVIDIA Test 9; ") == 2
    kernels["triton"] = "b" * 16
    assert list(run("smoke")) == ["smoke"]
    assert "results of an earlier call are left out: another source" in capsys.readouterr().out


def test_each_part_and_the_build_fit_into_a_call() -> None:
    budgets = {step.name: step.seconds for step in gpu.STEPS}
    assert sorted(name for part in gpu.PARTS.values() for name in part) == sorted(budgets)
    for part in gpu.PARTS.values():
        assert gpu.BUILD + sum(budgets[name] for name in part) <= gpu.CALL < 540
    assert set(gpu_record.PROOF) | set(gpu_record.SANITIZERS) < set(gpu.PARTS["prove"])


def test_the_time_of_the_build_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu._left(500.0) == 500.0
    monkeypatch.setenv("VQKERNELS_GPU_STARTED", str(time.time() - 100))
    assert 395 < gpu._left(500.0) <= 400


def test_the_sanitizer_runs_the_small_cases_or_says_why_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = next(s.command for s in gpu.STEPS if s.name == "memcheck")
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    cuda = argparse.Namespace(device="cuda")
    assert command(cuda, 9.0) == gpu.NOT_FOUND
    # Nothing but steps that did not run is no success.
    monkeypatch.setattr(gpu, "describe", lambda device: STAMP)
    monkeypatch.setattr(gpu, "STEPS", [gpu_steps.Step("memcheck", 9, lambda o, s: gpu.NOT_FOUND, "about")])
    assert gpu.main(["--device", "cpu", "--output", str(tmp_path), "--steps", "memcheck"]) == 1
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/bin/{name}")
    found = command(cuda, 9.0)
    assert isinstance(found, list)
    assert found[-2:] == ["--device", "cuda"]
    assert found[2:7] == ["/bin/compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    assert command(argparse.Namespace(device="cpu"), 9.0)[-3:] == ["benchmarks.gpu_smoke", "--device", "cpu"]


def test_the_sanitizer_is_found_beside_the_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    program = tmp_path / "compute-sanitizer" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    command = next(s.command for s in gpu.STEPS if s.name == "racecheck")(argparse.Namespace(device="cuda"), 9.0)
    assert command[0] == str(program)


def test_help_and_a_machine_without_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        gpu.main(["--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    assert all(s.name in text for s in gpu.STEPS)
    if not torch.cuda.is_available():
        assert gpu.main(["--steps", "info"]) == 1
        assert "torch sees no CUDA device" in capsys.readouterr().err
