"""The benchmark harness itself: turns and ratios, the correctness gate, the bars, the documents it writes."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import vqkernels

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import baselines, cases, check, environment, memory, patched, report, run, stages, timing  # noqa: E402


def test_default_cases_exist_and_make_what_they_say() -> None:
    for name in (*cases.SEARCH, *cases.TRAIN, *cases.MEMORY):
        case = cases.shrink(cases.BY_NAME[name])
        z, codebook = case.make()
        assert case.rows <= 512
        assert case.rows_of(z).shape == (*case.shape, case.dim)
        assert codebook.shape == (case.codes, case.dim)
        if case.metric == "cosine":
            torch.testing.assert_close(codebook.norm(dim=1), torch.ones(case.codes))


def test_ratios_are_formed_within_rounds() -> None:
    # The machine gets four times slower half-way: medians of times would mislead, ratios do not.
    ours = timing.Series([1.0, 1.0, 4.0, 4.0])
    peer = timing.Series([3.0, 3.0, 12.0, 12.0])
    assert timing.ratios(ours, peer) == {"median": 3.0, "q25": 3.0, "q75": 3.0}


def test_contestants_take_turns_for_the_same_number_of_rounds() -> None:
    order: list[str] = []

    def sleeper(name: str, seconds: float) -> timing.Work:
        def work() -> None:
            order.append(name)
            time.sleep(seconds)

        return work

    series = timing.interleave({"a": sleeper("a", 0.03), "b": sleeper("b", 0.09)}, rounds=4, least=0.01)
    assert [len(s.seconds) for s in series.values()] == [4, 4]
    assert order == list("aabb" + "ab" + "ba" + "ab" + "ba")
    assert 1.5 < timing.ratios(series["a"], series["b"])["median"] < 4.5


def test_gate_refuses_to_report_wrong_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    right = vqkernels.nearest

    def wrong(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        indices, score = right(*args, **kwargs)
        indices.view(-1)[3] += 1
        return indices, score

    monkeypatch.setenv("VQKERNELS_ISA", "")
    monkeypatch.setattr(vqkernels, "nearest", wrong)
    with pytest.raises(stages.GateFailed, match="1 of"):
        stages.measure_search("dac", [], ["auto"], 1, 1.0, {}, quick=True)


@pytest.mark.parametrize("name", ["encodec", "llamagen", "vqgan-1024"])
def test_peers_do_the_same_job(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQKERNELS_ISA", "")
    case = cases.shrink(cases.BY_NAME[name])
    z, codebook = case.make()
    chosen, expected = stages.oracle(case, z, codebook)
    for contestant in ("vqkernels", "reference", "cdist", "addmm", "faiss"):
        try:
            indices = baselines.SEARCH[contestant].make(case, z, codebook)()
        except baselines.Unavailable:
            continue
        assert (indices[chosen] == expected).float().mean() > 0.99, contestant
    for contestant in baselines.TRAIN.values():
        try:
            indices = contestant.make(case, z, codebook)()
        except baselines.Unavailable:
            continue
        assert (indices[chosen] == expected).float().mean() > 0.99, contestant.name


def test_quick_run_writes_conditions_beside_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQKERNELS_ISA", "")
    threads = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, str(threads))
    path = tmp_path / "out.json"
    arguments = ["--quick", "--case", "dac", "--peer", "cdist", "--threads", str(threads), "--json", str(path)]
    assert run.main(arguments) == 0
    (record,) = json.loads(path.read_text())["records"]
    assert record["results"]["vqkernels"]["wrong_rows_percent"] == 0
    assert (
        record["speedup"]["cdist"]["q25"] <= record["speedup"]["cdist"]["median"] <= record["speedup"]["cdist"]["q75"]
    )
    stamp = record["environment"]
    assert torch.__version__.startswith(stamp["versions"]["torch"])  # metadata may lack "+cu132"
    assert stamp["threads"] == threads
    assert stamp["command"] == f"python -m benchmarks.run --quick --case dac --peer cdist --threads {threads}"
    assert str(tmp_path) not in path.read_text()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc (Linux)")
def test_memory_of_a_peer_is_seen() -> None:
    # 2048 x 512 floats are 4 MiB; cdist holds two such matrices for a moment.
    size, reason = memory.measure("search", "vqvae-cifar", "cdist", 1)
    assert reason is None
    assert size is not None
    assert 4 * 2**20 <= size < 32 * 2**20


def test_a_contestant_that_fails_is_named_with_the_reason() -> None:
    size, reason = memory.measure("search", "vqvae-cifar", "no such contestant", 1)
    assert size is None
    assert reason is not None
    assert "no such contestant" in reason


def test_bars_miss_and_hold() -> None:
    def scaling(exponent: float) -> check.Results:
        return {"scaling": {axis: {"exponent": exponent} for axis in ("rows", "codes", "dim")}}

    text, good = check.table(scaling(1.0))
    assert text.count(" ok") == 3
    assert text.count("not measured") == len(check.BARS) - 3
    assert not good
    assert check.table(scaling(1.3))[0].count("MISSED") == 3


def test_tables_replace_what_was_there(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- results:bars -->\nold\n<!-- /results:bars -->\nafter\n")
    results = tmp_path / "results"
    record = {
        "case": "rows",
        "values": [1, 2],
        "fixed": {"codes": 3, "dim": 4},
        "ms": [{"median": 1.0, "q25": 1.0, "q75": 1.0}, {"median": 2.0, "q25": 2.0, "q75": 2.0}],
        "exponent": 1.0,
        "environment": {
            "device": {"cpu": "a CPU"},
            "versions": {"torch": "2", "faiss-cpu": "1", "vector-quantize-pytorch": "1"},
            "threads": 2,
            "native": {"isa": "avx2"},
            "commit": "abc",
            "date": "2026-01-01 00:00 UTC",
        },
    }
    environment.write_json(results / "scaling.json", {"kind": "scaling", "cases": {"rows": record}})
    for _ in range(2):
        assert report.main(["--results", str(results), "--docs", str(tmp_path)]) == 0
        text = document.read_text()
        assert "old" not in text
        assert text.count("cost grows with N") == 1
        assert text.startswith("before\n")
        assert text.endswith("after\n")
    assert (tmp_path / "docs" / "img" / "bench-scaling.png").stat().st_size > 1000
    assert [p.name for p in results.iterdir()] == ["scaling.json"]


def test_patched_quantizers_are_measured_behind_a_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    threads = torch.get_num_threads()
    arguments = ["--quick", "--case", "emu3", "--threads", str(threads), "--results", str(tmp_path)]
    monkeypatch.setattr(patched, "_measure_memory", lambda *args: {"emu3": {"original": 9.0, "patched": 0.5}})
    assert patched.main(arguments) == 0
    record = json.loads((tmp_path / "patched.json").read_text())["cases"]["emu3"]
    assert record["size"] == "25 x 32768 x 4"
    assert record["speedup"]["median"] > 0
    document = tmp_path / "README.md"
    document.write_text("<!-- results:patched -->\n<!-- /results:patched -->\n")
    assert report.main(["--results", str(tmp_path), "--docs", str(tmp_path)]) == 0
    assert "| transformers Emu3 | encode | 25 x 32768 x 4 |" in document.read_text()

    right = vqkernels.nearest

    def wrong(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        indices, score = right(*args, **kwargs)
        return indices + 1, score

    monkeypatch.setattr("vqkernels.recognisers.transformers_image.nearest", wrong)
    assert patched.main(arguments) == 1


def test_slope_of_a_power_law() -> None:
    x = [1.0, 2.0, 4.0, 8.0]
    y = [math.log(3 * v**1.5) for v in x]
    assert stages._slope([math.log(v) for v in x], y) == pytest.approx(1.5)
