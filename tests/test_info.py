"""`vqkernels info` and the command line: what they say, and that they say it without any extra installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vqkernels
from vqkernels import _native, dispatch
from vqkernels.cli import bench, main
from vqkernels.info import info, version

# Runs the command line with every optional dependency made impossible to import.
WITHOUT_EXTRAS = """
import sys
EXTRAS = {"PIL", "accelerate", "matplotlib", "safetensors", "skimage", "sklearn", "tensorboard", "torchmetrics", "tqdm"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from vqkernels.cli import main
sys.exit(main(sys.argv[1:]))
"""


def without_extras(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_every_op_backend_and_device_is_listed_with_its_reason() -> None:
    entries = info().backends
    assert len(entries) == len(dispatch.OPS) * len(dispatch.BACKENDS) * 2
    for entry in entries:
        backend = next(b for b in dispatch.BACKENDS if b.name == entry["backend"])
        if entry["device"] == "cpu":
            assert entry["reason"] == dispatch.missing(entry["op"], backend, "cpu")
        elif not torch.cuda.is_available():
            assert "CUDA" in entry["reason"]
        elif entry["backend"] == "native":
            assert entry["reason"] == _native.unavailable("cuda")
        else:
            assert entry["reason"] is None
    assert all(e["reason"] is None for e in entries if (e["backend"], e["device"]) == ("reference", "cpu"))


def test_facts_come_from_the_library_that_runs() -> None:
    found = info()
    assert found.versions["torch"] == torch.__version__
    assert found.threads == torch.get_num_threads()
    reason = _native.unavailable()
    assert found.native["reason"] == reason
    if reason is None:
        assert Path(found.native["path"]).is_file()
        assert found.native["abi"] == _native.ABI_VERSION
        assert found.isa["available"] == _native.supported()
        assert (found.isa["used"], found.isa["reason"]) == (_native.ISAS[_native.isa()], None)


def test_dict_survives_json_and_the_table_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    found = info()
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert main(["info"]) == 0
    table = capsys.readouterr().out
    assert table == f"{found}\n"
    for op in dispatch.OPS:
        rows = [line.split() for line in table.splitlines() if line.startswith(f"{op} ")]
        assert [row[1] for row in rows] == [b.name for b in dispatch.BACKENDS]
        assert rows[-1][2] == "yes"


def test_missing_library_and_wrong_settings_are_shown_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQKERNELS_ISA", "sse9")
    text = str(info())
    assert "VQKERNELS_ISA" in text
    assert _native.unavailable() is not None or "'sse9'; expected one of" in text
    monkeypatch.setenv("VQKERNELS_ISA", "scalar")
    assert _native.unavailable() is not None or "scalar (forced by VQKERNELS_ISA; runs here: scalar" in str(info())
    monkeypatch.setattr(_native, "unavailable", lambda device="cpu": "it was never built")
    assert "none: it was never built" in str(info())


def test_cuda_library_is_named_without_being_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libvqk_cuda99.so").write_bytes(b"no library")
    monkeypatch.setattr(vqkernels, "__path__", [str(tmp_path)])
    assert vqkernels.info().cuda["library"] == "libvqk_cuda99.so"
    monkeypatch.setattr(vqkernels, "__path__", [])
    assert vqkernels.info().cuda["library"].startswith("none: libvqk_cuda was not built")


def test_command_line_needs_no_extras(tmp_path: Path) -> None:
    run = without_extras("info", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("vqkernels ")
    run = without_extras("--help", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "vqkernels info" in run.stdout


def test_missing_extra_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    run = without_extras("train", cwd=tmp_path)
    assert run.returncode == 2
    assert run.stderr.startswith("vqkernels train: error: ")
    assert "pip install 'vqkernels[train]'" in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_module_runs_as_a_script(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vqkernels", "--version"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == f"vqkernels {version()}\n"


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert all(name in out for name in ("info", "bench", "train"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["info", "--jsn"], "unrecognized arguments: --jsn"),
        (["--vers"], "unrecognized arguments: --vers"),
    ],
)
def test_unknown_commands_and_options_exit_with_status_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as e:
        main(argv)
    assert e.value.code == 2
    assert message in capsys.readouterr().err


def checkout(folder: Path) -> Path:
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks" / "run.py").write_text("")
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="no such pipes")
def test_a_reader_that_stops_early_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "vqkernels", "info"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
    closed = subprocess.run(f"'{sys.executable}' -m vqkernels info >&-", shell=True, stderr=subprocess.PIPE, text=True)
    assert (closed.returncode, closed.stderr) == (0, "")


def test_bench_hands_every_argument_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    class Run:
        @staticmethod
        def main(argv: list[str]) -> int:
            seen.append(argv)
            return 3

    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "benchmarks.run", Run)  # type: ignore[arg-type]
    monkeypatch.setattr(bench, "checkout", lambda: checkout(tmp_path))
    assert main(["bench", "--case", "vqgan", "-h", "step"]) == 3
    assert seen == [["--case", "vqgan", "-h", "step"]]


def test_bench_without_a_checkout_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vqkernels.__path__", [str(tmp_path / "site-packages" / "vqkernels")])
    monkeypatch.chdir(tmp_path)
    assert main(["bench"]) == 2
    assert "benchmarks/run.py is part of the source checkout" in capsys.readouterr().err
    assert bench.checkout() is None
    checkout(tmp_path)
    assert bench.checkout() == tmp_path


def test_errors_are_one_line_unless_debugging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "checkout", lambda: None)
    assert main(["bench"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("vqkernels bench: error: ")
    assert "Traceback" not in err
    with pytest.raises(FileNotFoundError):
        main(["--debug", "bench"])
