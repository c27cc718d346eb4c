"""Launch configurations: the heuristic, files that `vqkernels tune` writes, and what it says without a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vqkernels import dispatch, tuned
from vqkernels.cli import main, tune


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VQKERNELS_TUNED", str(tmp_path))
    tuned.clear_cache()
    yield
    tuned.clear_cache()


def test_shipped_files_are_whole_and_name_what_was_verified() -> None:
    for path in tuned.folder().glob("*.json"):
        content = json.loads(path.read_text())
        device = content["device"]
        assert path.stem == tuned.slug(device)
        assert content["schema"] == tuned.SCHEMA
        for op in dispatch.OPS:
            assert "auto" not in content or tuned.choice(device, op, 65536, 16384, 256) is not None
        assert set(tuned.load(device)) <= set(tuned.HEURISTIC)
        # Of kernels that have changed since, perhaps: then it only says what was.
        record = content.get("verified")
        assert record is None or {"commit", "date", "torch", "triton", "sources"} <= set(record)
        assert device in (tuned.folder().parents[1] / "docs" / "gpu.md").read_text(), "say so in docs/gpu.md"
    assert tuned.load("no such GPU") == {}
    assert tuned.verified("no such GPU") is None


@pytest.mark.parametrize(
    ("padded_dim", "largest"), [(16, 16), (32, 32), (64, 64), (128, 128), (256, 2**31), (4096, 2**31)]
)
def test_heuristic_serves_every_width(padded_dim: int, largest: int) -> None:
    assert tuned.nearest_config(padded_dim, "some GPU") == tuned.HEURISTIC[largest]


def test_a_written_file_is_read_back_and_wins(tmp_path: Path) -> None:
    config = tuned.Config(64, 256, 32, 4, 2)
    path = tune.write(tmp_path, "NVIDIA H200", {"32": config.to_dict()}, {"triton": "none"})
    assert path.name == "nvidia-h200.json"
    assert json.loads(path.read_text())["device"] == "NVIDIA H200"
    assert tuned.nearest_config(32, "NVIDIA H200") == config
    assert tuned.nearest_config(16, "NVIDIA H200") == config
    assert tuned.nearest_config(64, "NVIDIA H200") == tuned.HEURISTIC[64]
    assert tuned.nearest_config(32, "NVIDIA A100") == tuned.HEURISTIC[32]


@pytest.mark.parametrize("text", ['{"nearest": {"32": {"block_m": 1}}}', '{"nearest": 3}', "{}"])
def test_a_broken_file_is_an_error_that_names_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "some-gpu.json").write_text(text)
    with pytest.raises(ValueError, match=r"some-gpu\.json is not a file that `vqkernels tune` wrote"):
        tuned.nearest_config(32, "Some GPU")


def test_override_is_for_a_block_only() -> None:
    config = tuned.Config(16, 16, 16, 1, 1)
    with tuned.override(config):
        assert tuned.nearest_config(64) == config
    assert tuned.nearest_config(64) == tuned.HEURISTIC[64]


def test_heuristic_is_tried_first_for_every_entry() -> None:
    assert set(tune.DIMS) == set(tuned.HEURISTIC)
    for largest in tuned.HEURISTIC:
        found = tune.candidates(largest)
        assert found[0] == tuned.HEURISTIC[largest]
        assert len(found) == len(set(found)) > 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_without_a_gpu_is_one_clear_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["tune"]) == 2
    err = capsys.readouterr().err
    assert "torch sees no CUDA device" in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
