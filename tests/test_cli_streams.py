"""The command line with closed streams, names that are no UTF-8, outputs that cannot be written, and Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.full_disk import full_disk
from vqkernels.cli import main
from vqkernels.models import build_model
from vqkernels.training import TrainingError, plots
from vqkernels.training.checkpoint import load_checkpoint
from vqkernels.training.evaluate import EvaluateConfig, evaluate
from vqkernels.training.run_folder import check_output
from vqkernels.training.token_shards import read_shard
from vqkernels.training.tokenize import side_by_side

SIZES = ("--image-size", "32", "--batch-size", "4", "--codes", "9", "--dim", "4", "--base-channels", "8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    build_model("tiny").eval().save_pretrained(folder / "model")
    return str(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    torch.manual_seed(1)
    for i in range(6):
        Image.fromarray((torch.rand(40, 48, 3) * 255).byte().numpy()).save(folder / f"{i}.png")
    return folder


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error: one line, behind whatever the progress bar drew."""
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert re.match(r"vqkernels \w+: error: ", errors[0])
    return errors[0]


def shell(line: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``vqkernels``, the arguments being $1, $2, ... of a line of shell in which $V stands for the command."""
    environment = os.environ | {"V": f"{sys.executable} -m vqkernels", "OMP_NUM_THREADS": "1"}
    command = ["sh", "-c", line, "sh", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_closed_streams_are_no_error(model: str, images: Path, tmp_path: Path) -> None:
    done = shell('$V tokenize "$1" --images "$2" --output "$3" <&- >&- 2>&-', model, images, tmp_path / "t")
    assert done.returncode == 0
    assert (tmp_path / "t" / "manifest.json").exists()
    done = shell('$V detokenize "$1" --model "$2" --output "$3" 2>&-', tmp_path / "t", model, tmp_path / "r")
    assert (done.returncode, done.stderr) == (0, "")
    assert "6 images written" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device")
def test_a_full_stderr_changes_no_status() -> None:
    done = shell("$V tokenize nothing 2>/dev/full")
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no such pipes")
def test_a_reader_that_leaves_ends_training_like_any_command(images: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "vqkernels", "train", "--data", str(images), "--output", str(tmp_path / "r")]
    done = subprocess.run([*command, *SIZES, "--steps", "1"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, "error" in done.stderr) == (141, False)


def test_what_the_encoding_of_the_output_lacks_is_escaped(
    model: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    folder = tmp_path / "bilder ü"
    shutil.copytree(images, folder)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["tokenize", model, "--images", str(folder), "--output", str(tmp_path / "t")]) == 0
    assert b"bilder \\xfc" in raw.getvalue()


# Names


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 only")
def test_names_that_would_be_escaped_alike_stay_apart(model: str, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    names = [b"caf\xe9.png", b"caf\\xe9.png", b"caf\\x5cxe9.png", b"plain\\name.png", b"caf\\xE9.png"]
    for i, name in enumerate(names):
        shutil.copy(images / f"{i}.png", folder / os.fsdecode(name))
    tokens = tmp_path / "tokens"
    assert main(["tokenize", model, "--images", str(folder), "--output", str(tokens)]) == 0
    (file,) = tokens.glob("tokens-*")
    found = [image.name for image in read_shard(file).images]
    assert len(set(found)) == len(names)
    assert {r"caf\xe9.png", r"caf\x5cxe9.png", r"caf\x5cx5cxe9.png", r"plain\name.png", r"caf\xE9.png"} == set(found)
    assert main(["detokenize", str(tokens), "--model", model, "--output", str(tmp_path / "r")]) == 0
    assert len(list((tmp_path / "r").iterdir())) == len(names)


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 only")
@pytest.mark.parametrize("command", ["train", "tokenize", "evaluate"])
def test_an_output_that_is_no_utf8_is_refused_before_anything_is_written(
    command: str, model: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / os.fsdecode(b"caf\xe9")
    how = ["train", "--data", *SIZES, "--steps", "1"] if command == "train" else [command, model, "--images"]
    how.insert(2 if command == "train" else 3, str(images))
    assert main([*how, "--output", str(output)]) == 2
    assert "is no UTF-8" in one_line(capsys)
    assert not output.exists()


# Outputs that cannot be written


def test_a_folder_that_cannot_be_written_is_told_of_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_output(tmp_path)
    check_output(tmp_path / "new")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(TrainingError, match="cannot be written"):
        check_output(tmp_path)


def test_a_full_disk_while_tokenizing(
    model: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tokenize", model, "--images", str(images), "--output", str(tmp_path / "t"), "--shard-size", "3"]
    with full_disk(600):  # enough for the plan
        assert main(arguments) == 2
    assert re.search(r"tokens-00000-of-00002\.safetensors'$", one_line(capsys))
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["plan.json"]
    assert main(arguments) == 0
    with full_disk(100):
        assert main(["detokenize", str(tmp_path / "t"), "--model", model, "--output", str(tmp_path / "r")]) == 2
    assert re.search(r"/\d\.png\.png cannot be written: File too large$", one_line(capsys))
    assert list((tmp_path / "r").iterdir()) == []


def test_a_full_disk_while_evaluating(
    model: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", model, "--images", str(images), "--output", str(tmp_path / "r"), "--limit", "2"]
    with full_disk(50_000):  # enough for the numbers, not for the page
        assert main(arguments) == 2
    assert re.search(r"/report\.html'$", one_line(capsys))
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["parts", "report.json"]
    assert main(arguments) == 0
    assert "measured already" in capsys.readouterr().out


def test_a_full_disk_while_training(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "curves", lambda path, *_: path.write_bytes(b""))
    arguments = ["train", "--data", str(images), "--output", str(tmp_path / "r"), *SIZES]
    with full_disk(20_000):  # enough for the config
        assert main([*arguments, "--steps", "2", "--checkpoint-every", "1"]) == 2
    assert re.search(r"/checkpoint\.safetensors'$", one_line(capsys))
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["config.json"]
    assert main(["train", "--output", str(tmp_path / "r"), "--resume"]) == 0
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["finished"]


# Ctrl-C


def test_what_waits_is_dropped_when_a_block_ends_early() -> None:
    begun, go = threading.Event(), threading.Event()
    done: list[int] = []

    def work(number: int) -> None:
        begun.set()
        go.wait(60)
        done.append(number)

    def interrupted() -> None:
        with side_by_side(1) as pool:
            results = pool.map(work, range(5))  # noqa: F841 (alive, as it is in a traceback)
            begun.wait(60)
            go.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(done) < 5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_saves_a_checkpoint(number: signal.Signals, images: Path, tmp_path: Path) -> None:
    # A shell has it ignored in the background.
    heard = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; from vqkernels.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", "--data", str(images), *SIZES, "--output", str(tmp_path / "r")]
    command += ["--steps", "100000", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    seen = ""
    while not re.search(r"[1-9]\d*/100000", seen):  # a step was taken
        seen += process.stderr.read(1) or pytest.fail(seen)
    os.killpg(process.pid, number)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert load_checkpoint(tmp_path / "r" / "checkpoint.safetensors")[1]["step"] >= 1


def test_ctrl_c_while_evaluating_ends_it_with_status_130(
    model: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vqkernels.training import evaluate as module

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    arguments = ["evaluate", model, "--images", str(images), "--output", str(tmp_path / "r")]
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_report", interrupted)
        assert main(arguments) == 130
    assert capsys.readouterr().err.endswith("vqkernels evaluate: interrupted\n")
    said: list[str] = []
    evaluate(EvaluateConfig((model,), str(images), str(tmp_path / "r")), say=said.append)
    assert any("measured already" in line for line in said)
