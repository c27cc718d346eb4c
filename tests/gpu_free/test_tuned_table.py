"""The measured table and the record of a green `make gpu`: which backend they speak for, and when they say nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cuda_host import ROOT, installed

from vqkernels import _cuda, _triton, tuned

GPU = "NVIDIA Test 9"
MIMI = {"case": "mimi", "rows": 64, "codes": 2048, "dim": 256, "milliseconds": {"native": 0.02, "triton": 0.05}}
VQGAN = {"case": "vqgan", "rows": 65536, "codes": 16384, "dim": 256, "milliseconds": {"native": 1.5, "triton": 1.25}}
LLAMAGEN = {"case": "llamagen", "rows": 65536, "codes": 16384, "dim": 8, "milliseconds": {"native": 0.2, "triton": 0.2}}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VQKERNELS_TUNED", str(tmp_path / "user"))
    (tmp_path / "user").mkdir()
    tuned.clear_cache()
    yield
    tuned.clear_cache()


def write(folder: Path, **content: Any) -> Path:
    path = folder / "user" / "nvidia-test-9.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"schema": tuned.SCHEMA, "device": GPU, "nearest": {}} | content))
    tuned.clear_cache()
    return path


def chosen(op: str, *sizes: int) -> tuple[str, str]:
    found = tuned.choice(GPU, op, *sizes)
    assert found is not None
    return found.case, found.backend


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((65536, 16384, 256), ("vqgan", "triton")),
        ((64, 2048, 256), ("mimi", "native")),
        ((1, 1, 256), ("mimi", "native")),
        ((2**40, 2**30, 300), ("vqgan", "triton")),
        ((65536, 8192, 12), ("llamagen", "native")),
        # From 64 to 65536 rows and 2048 to 16384 codes are 13 doublings: 7 are nearer to one end, 6 to the other.
        ((64 * 2**6, 2048, 256), ("mimi", "native")),
        ((64 * 2**7, 2048, 256), ("vqgan", "triton")),
        # No rows: they count as one.
        ((0, 2048, 256), ("mimi", "native")),
    ],
)
def test_the_nearest_measured_size_decides(
    tmp_path: Path, sizes: tuple[int, int, int], expected: tuple[str, str]
) -> None:
    write(tmp_path, auto={"nearest": [VQGAN, MIMI, LLAMAGEN]})
    assert chosen("nearest", *sizes) == expected


def test_of_equals_the_first_written_wins(tmp_path: Path) -> None:
    # 128 rows lie one doubling from either; both of llamagen's backends take as long.
    a, b = MIMI | {"case": "a"}, MIMI | {"case": "b", "rows": 256}
    write(tmp_path, auto={"nearest": [a, b, LLAMAGEN]})
    assert chosen("nearest", 128, 2048, 256)[0] == "a"
    assert chosen("nearest", 65536, 16384, 8)[1] == "native"
    write(tmp_path, auto={"nearest": [b, a, LLAMAGEN | {"milliseconds": {"triton": 0.2, "native": 0.2}}]})
    assert chosen("nearest", 128, 2048, 256)[0] == "b"
    assert chosen("nearest", 65536, 16384, 8)[1] == "triton"


def test_the_reason_names_sizes_and_times(tmp_path: Path) -> None:
    write(tmp_path, auto={"nearest": [VQGAN], "ema_update": [VQGAN | {"rows": 0}]})
    exact, near = tuned.choice(GPU, "nearest", 65536, 16384, 256), tuned.choice(GPU, "nearest", 65535, 16384, 256)
    update = tuned.choice(GPU, "ema_update", 0, 16384, 256)
    assert exact is not None
    assert near is not None
    assert update is not None
    times = "triton 1.25 ms, native 1.5 ms"
    assert exact.why == f"measured at 65536 rows x 16384 codes x 256 dims (vqgan): {times}"
    assert near.why.endswith(f"x 256 dims (vqgan, the nearest in the table): {times}")
    assert update.why == f"measured at 16384 codes x 256 dims (vqgan): {times}"


def test_nothing_is_chosen_for_other_ops_and_devices_and_versions(tmp_path: Path) -> None:
    auto = {"nearest": [VQGAN], "lookup": []}
    write(tmp_path, auto=auto)
    assert tuned.choice(GPU, "nearest", 1, 1, 1) is not None
    assert tuned.choice(GPU, "lookup", 1, 1, 1) is None
    assert tuned.choice(GPU, "codebook_sum", 1, 1, 1) is None
    assert tuned.choice("NVIDIA Test 8", "nearest", 1, 1, 1) is None
    # A name that makes the same file name is another device all the same.
    assert tuned.choice("NVIDIA TEST-9", "nearest", 1, 1, 1) is None
    write(tmp_path, auto=auto, schema=tuned.SCHEMA + 1)
    assert tuned.choice(GPU, "nearest", 1, 1, 1) is None
    write(tmp_path)
    assert tuned.choice(GPU, "nearest", 1, 1, 1) is None


@pytest.mark.parametrize(
    "auto",
    [
        {"nearest": 3},
        {"nearest": [{}]},
        {"nearest": [VQGAN | {"milliseconds": {}}]},
        {"nearest": [VQGAN | {"milliseconds": {"native": -1.0}}]},
        {"nearest": [VQGAN | {"rows": "many"}]},
        [],
    ],
)
def test_a_malformed_table_is_an_error_that_names_the_file(tmp_path: Path, auto: Any) -> None:
    write(tmp_path, auto=auto)
    with pytest.raises(ValueError, match=r'nvidia-test-9\.json: the table "auto" for nearest is malformed'):
        tuned.choice(GPU, "nearest", 1, 1, 1)


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_torn_file_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    write(tmp_path).write_text(text)
    for ask in (lambda: tuned.choice(GPU, "nearest", 1, 1, 1), lambda: tuned.verified(GPU)):
        with pytest.raises(ValueError, match=r"nvidia-test-9\.json is not a file that"):
            ask()


def record(**sources: str) -> dict[str, Any]:
    return {"commit": "abc", "date": "today", "sources": sources}


def test_a_record_speaks_for_the_kernels_that_it_saw(tmp_path: Path) -> None:
    here = tuned.triton_sources()
    reason = tuned.untrusted(GPU, "triton", here)
    assert reason == f"not verified on {GPU} (a green `make gpu` there writes tuned/nvidia-test-9.json)"
    write(tmp_path, verified=record(triton=here))
    assert tuned.untrusted(GPU, "triton", here) is None
    assert tuned.verified(GPU) == record(triton=here)
    reason = tuned.untrusted(GPU, "native", "0" * 16)
    assert reason == f"the green `make gpu` on {GPU} (today, commit abc) did not run it"
    write(tmp_path, verified=record(triton="0" * 16, native=here))
    reason = tuned.untrusted(GPU, "triton", here)
    assert reason is not None
    assert reason.startswith(f"its kernels are not those that `make gpu` found green on {GPU} (today, commit abc)")
    assert tuned.verified(GPU) is None
    assert tuned.untrusted(GPU, "native", here) is None
    assert tuned.untrusted(GPU, "native", None) is not None
    # From before there were hashes.
    write(tmp_path, verified={"commit": "abc", "date": "today"})
    assert tuned.verified(GPU) is None


def test_a_record_of_another_schema_or_device_says_so(tmp_path: Path) -> None:
    here = tuned.triton_sources()
    write(tmp_path, verified=record(triton=here), schema=0)
    reason = tuned.untrusted(GPU, "triton", here)
    assert reason == f"nvidia-test-9.json has schema 0, this version reads {tuned.SCHEMA}: run `make gpu` again"
    write(tmp_path, verified=record(triton=here), device="NVIDIA Other", nearest={"32": {"block_m": 1}})
    reason = tuned.untrusted(GPU, "triton", here)
    assert reason == f"nvidia-test-9.json is about NVIDIA Other, not about {GPU}"
    assert tuned.load(GPU) == {}


def test_tuning_for_oneself_keeps_the_shipped_record_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, config = tuned.triton_sources(), tuned.Config(64, 256, 32, 4, 2)
    from vqkernels.tuned import files

    monkeypatch.setattr(files, "folder", lambda: tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    path = write(tmp_path, verified=record(triton=here), auto={"nearest": [VQGAN]})
    path.rename(tmp_path / "shipped" / path.name)
    path.write_text(json.dumps({"device": GPU, "nearest": {"32": config.to_dict()}, "measured": {}}))
    tuned.clear_cache()
    assert tuned.load(GPU) == {32: config}
    assert tuned.verified(GPU) is not None
    assert chosen("nearest", 1, 1, 1) == ("vqgan", "triton")


def test_hash_changes_with_any_kernel_and_with_nothing_else(tmp_path: Path) -> None:
    for name, text in (("b.cu", "1"), ("a.cuh", "2")):
        (tmp_path / name).write_text(text)
    paths = [tmp_path / "b.cu", tmp_path / "a.cuh"]
    before = tuned.digest(tmp_path, paths)
    assert before == tuned.digest(tmp_path, paths[::-1])
    assert len(before) == 16
    (tmp_path / "b.cu").write_text("1 ")
    assert tuned.digest(tmp_path, paths) != before
    (tmp_path / "b.cu").write_text("1")
    (tmp_path / "c.cu").write_text("")
    assert tuned.digest(tmp_path, [*paths, tmp_path / "c.cu"]) != before
    assert tuned.digest(tmp_path, paths) == before


def test_the_library_knows_what_it_was_built_from() -> None:
    import ctypes
    import re

    library = ctypes.CDLL(str(installed()))
    library.vqk_build_info.restype = ctypes.c_char_p
    found = re.search(r"sources ([0-9a-f]{16})", library.vqk_build_info().decode())
    folder = ROOT / "csrc" / "cuda"
    kernels = [p for p in folder.iterdir() if p.suffix in (".cu", ".cuh", ".h") and not p.name.startswith("host_exec")]
    assert found is not None
    assert found[1] == tuned.digest(folder, kernels), "the sources changed after the library was built: install again"


def test_backends_ask_with_their_own_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(_cuda, "sources", lambda: "feedfeedfeedfeed")
    write(tmp_path, verified=record(native="feedfeedfeedfeed", triton="0" * 16))
    assert _cuda.held_back(device) is None
    assert "its kernels are not those" in str(_triton.held_back(device))
    write(tmp_path, verified=record(native="0" * 16, triton=tuned.triton_sources()))
    assert "its kernels are not those" in str(_cuda.held_back(device))
    assert _triton.held_back(device) is None
