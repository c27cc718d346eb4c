"""What `make gpu` measures, on toy sizes without a GPU: who takes part, wrong answers, turns and budgets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vqkernels
from vqkernels import dispatch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu, gpu_ops, gpu_peers, gpu_record, gpu_report, gpu_smoke, gpu_stages, gpu_timing  # noqa: E402

CPU = torch.device("cpu")
PEAKS = {"fp16": 1e12, "tf32": 1e12, "fp32": 1e12, "bytes": 1e11}


def test_ops_are_measured_for_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_stages.gpu_cases, "OPS", ("encodec", "cifar"))
    monkeypatch.setattr(gpu_stages.gpu_cases, "SOFT", ("encodec", "cifar"))
    monkeypatch.setattr(gpu_peers, "backends", lambda device: ["reference"])
    bench = gpu_stages.Bench(CPU, PEAKS, 60.0, quick=True)
    records = list(gpu_stages.STAGES["ops"](bench))
    assert bench.failed == []
    assert len(records) == 2 * len(gpu_ops.OPS + gpu_ops.SOFT_OPS)
    found = gpu_record.table({"ops": {r["case"]: r for r in records}})
    # Searches have tables of their own.
    assert set(found) == {op for op in dispatch.OPS if not op.endswith("nearest")}
    for op, entries in found.items():
        assert [e["case"] for e in entries] == ["encodec", "cifar"], op
        assert all(e["milliseconds"]["reference"] > 0 for e in entries)
    # A backend whose results differ is named, and is in no table.
    original = vqkernels.ops.lookup
    monkeypatch.setattr(
        vqkernels.ops, "lookup", lambda *a: original(*a[:-1], "reference") + (1 if a[-1] == "native" else 0)
    )
    monkeypatch.setattr(gpu_peers, "backends", lambda device: ["native"])
    records = list(gpu_stages.STAGES["ops"](bench))
    assert bench.failed == [
        f"lookup by vqkernels-native on {name}: differs from the reference" for name in ("encodec", "cifar")
    ]
    found = gpu_record.table({"ops": {r["case"]: r for r in records}})
    assert "lookup" not in found
    # The table can prefer the reference for a softmax.
    assert [set(e["milliseconds"]) for e in found["soft_assign_grad"]] == [{"native", "reference"}] * 2


def test_all_levels_are_measured_for_the_table_and_wrong_ones_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_stages.gpu_cases, "RESIDUAL", gpu_stages.gpu_cases.RESIDUAL[:2])
    monkeypatch.setattr(gpu_peers, "backends", lambda device: ["reference"])
    bench = gpu_stages.Bench(CPU, PEAKS, 60.0, quick=True)
    records = {r["case"]: r for r in gpu_stages.STAGES["residual"](bench)}
    assert bench.failed == []
    assert [e["case"] for e in gpu_record.table({"residual": records})["residual_nearest"]] == ["encodec-8", "mimi-1"]
    assert {"vqkernels-reference", "levels-reference", "cdist"} <= set(records["mimi-1"]["results"])
    assert records["encodec-8"]["codes"] == 3 * 512
    original = vqkernels.ops.residual_nearest

    def wrong(*args: Any) -> tuple[torch.Tensor, ...]:
        indices, *rest = original(*args[:-1], "reference")
        return indices + (args[-1] == "native"), *rest

    monkeypatch.setattr(vqkernels.ops, "residual_nearest", wrong)
    monkeypatch.setattr(gpu_peers, "backends", lambda device: ["native"])
    records = {r["case"]: r for r in gpu_stages.STAGES["residual"](bench)}
    assert "vqkernels-native on mimi-1: wrong rows" in bench.failed
    assert "residual_nearest" not in gpu_record.table({"residual": records})


def test_every_stage_measures_ours_and_says_why_others_did_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch.compile takes seconds per case, and has a test of its own kind in test_benchmarks.
    monkeypatch.setattr(gpu_peers, "_compile", lambda *_: (_ for _ in ()).throw(gpu_peers.Unavailable("not here")))
    monkeypatch.setattr(gpu_stages.gpu_cases, "SEARCH", ("encodec", "llamagen"))
    monkeypatch.setattr(gpu_stages.gpu_cases, "FEW_ROWS", (1, 4))
    monkeypatch.setattr(gpu_stages.gpu_cases, "UPDATE", ("llamagen",))
    monkeypatch.setattr(gpu_stages.gpu_cases, "TRAIN", ("cifar",))
    monkeypatch.setattr(gpu_stages.gpu_cases, "OPS", ())
    monkeypatch.setattr(gpu_stages.gpu_cases, "SOFT", ())
    monkeypatch.setattr(gpu_stages.gpu_cases, "RESIDUAL", gpu_stages.gpu_cases.RESIDUAL[1:])
    bench = gpu_stages.Bench(CPU, PEAKS, 60.0, quick=True)
    stages = {name: {r["case"]: r for r in measure(bench)} for name, measure in gpu_stages.STAGES.items()}
    assert bench.failed == []
    assert set(stages["search"]) == {"encodec", "llamagen"}
    assert set(stages["few"]) == {"few-1", "few-4"}
    ours = f"vqkernels-{gpu_peers.backends(CPU)[0]}" if gpu_peers.backends(CPU) else None
    for name in ("search", "update", "train"):
        for record in stages[name].values():
            assert ours is None or record["results"][ours]["ms"]["median"] > 0
    assert set(stages["residual"]) == {"mimi-1", "mimi-16"}
    assert stages["residual"]["mimi-1"]["results"]["cdist"]["eager_us"] > 0
    assert stages["search"]["encodec"]["skipped"]["compile"] == "not here"
    data = {"environment": gpu.describe("cpu"), "peaks": PEAKS, "stages": stages}
    (tmp_path / "gpu.json").write_text(json.dumps(data))
    text = gpu_report.sections(gpu_report.load(tmp_path))
    assert set(text) == {"gpu-search", "gpu-few", "gpu-residual", "gpu-update", "gpu-train", "gpu-targets"}
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
    for op in ("lookup", "soft_assign_grad"):
        original = getattr(vqkernels.ops, op)

        def wrong(*a: Any, original: Any = original) -> Any:
            found = original(*a)
            return [t + torch.rand(()) for t in found] if isinstance(found, tuple) else found + torch.rand(())

        with monkeypatch.context() as patch:
            patch.setattr(vqkernels.ops, op, wrong)
            with pytest.raises(AssertionError, match=f"{op} on reference"):
                gpu_smoke.run(CPU, "reference")
