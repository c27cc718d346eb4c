"""The training app: repeatable, resumable to the bit, honest about what it measures, clear about what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.commands import Command
from vqkernels import _files
from vqkernels.cli import main
from vqkernels.models import VQVAE
from vqkernels.training import TrainConfig, TrainingError, data, loop, plots, train
from vqkernels.training.checkpoint import load_checkpoint, save_checkpoint
from vqkernels.training.loop import Interrupted

FILES = ["best", "checkpoint.safetensors", "config.json", "curves.png", "metrics.json", "model", "samples.png"]


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven smooth pictures of different sizes and kinds, one in a subfolder."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    random = np.random.default_rng(5)
    names = ["a.png", "b.jpg", "c.webp", "d.bmp", "more/e.PNG", "f.jpeg", "g.tif"]
    for number, name in enumerate(names):
        coarse = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((40 + 7 * number, 63), Image.Resampling.BICUBIC).save(folder / name)
    return folder


@pytest.fixture
def config(photos: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        data=str(photos), output=str(tmp_path / "run"), image_size=32, held_out=0.3, batch_size=4, steps=7, codes=13,
        dim=6, base_channels=8, residual_blocks=1, log_every=2, eval_every=5, checkpoint_every=4, device="cpu",
        threads=1,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the curves takes longer than these trainings: one test does."""
    if request.node.name != "test_curves_are_drawn":
        monkeypatch.setattr(plots, "curves", lambda path, *_: path.write_bytes(b""))


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_checkpoint(Path(folder) / "checkpoint.safetensors")[0]


def without_timing(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "metrics.json").read_text())
    del found["timing"]
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Do something right after a step has been taken."""
    original = loop._Run._step

    def wrapped(self: Any, batch: torch.Tensor) -> None:
        original(self, batch)
        if self.step == step:
            act()

    monkeypatch.setattr(loop._Run, "_step", wrapped)


# Training


def test_same_seed_same_bits(config: TrainConfig, tmp_path: Path) -> None:
    other = replace(config, output=str(tmp_path / "other"))
    third = replace(config, output=str(tmp_path / "third"), seed=1, steps=1)
    for each in (config, other, third):
        train(each, say=quiet)
    assert sorted(p.name for p in Path(config.output).iterdir()) == FILES
    assert same(weights(config.output), weights(other.output))
    assert without_timing(config.output) == without_timing(other.output)
    assert not same(weights(config.output), weights(third.output))


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own Ctrl-C handler, also where the suite runs in the background and the shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("decay", [0.9, None])
@pytest.mark.parametrize("step", [3, 5])
def test_resuming_gives_the_bits_of_an_uninterrupted_run(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decay: float | None, step: int
) -> None:
    config = replace(config, decay=decay)
    train(config, say=quiet)
    stopped = replace(config, output=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        stop_at(step, patch, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted, match=rf"stopped at step {step} of 7; go on with: .*--resume"):
            train(stopped, say=quiet)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert load_checkpoint(Path(stopped.output) / "checkpoint.safetensors")[1]["step"] == step
    said: list[str] = []
    train(stopped, resume=True, say=said.append)
    assert f"resuming at step {step}" in said
    assert same(weights(config.output), weights(stopped.output))
    assert without_timing(config.output) == without_timing(stopped.output)


def test_resuming_after_a_sudden_end(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config, say=quiet)
    killed = replace(config, output=str(tmp_path / "killed"))

    class Killed(BaseException):
        pass

    def die() -> None:
        raise Killed

    for step in (2, 6):  # before the first checkpoint, and two steps after it
        with monkeypatch.context() as patch:
            stop_at(step, patch, die)
            with pytest.raises(Killed):
                train(killed, resume=step > 2, say=quiet)
    # What a kill in the middle of a write leaves; no process has this number.
    leftover = Path(killed.output) / f".checkpoint.safetensors.{_files._machine()}.{2**30}.tmp"
    leftover.write_bytes(b"half")
    train(killed, resume=True, say=quiet)
    assert not leftover.exists()
    assert same(weights(config.output), weights(killed.output))
    assert without_timing(config.output) == without_timing(killed.output)


def test_a_finished_run_can_be_extended(config: TrainConfig) -> None:
    train(config, say=quiet)
    longer = train(replace(config, steps=9), resume=True, say=quiet)
    assert longer["step"] == 9
    assert [line["step"] for line in longer["history"]["held_out"]] == [5, 7, 9]
    assert train(replace(config, steps=9), resume=True, say=quiet)["final"] == longer["final"]
    with pytest.raises(TrainingError, match="already at step 9"):
        train(replace(config, steps=8), resume=True, say=quiet)


def test_training_learns(config: TrainConfig) -> None:
    result = train(replace(config, steps=150, batch_size=8, eval_every=50, init="kmeans"), say=quiet)
    first, *_, last = result["history"]["train"]
    assert last["reconstruction"] < 0.75 * first["reconstruction"]
    assert result["final"]["psnr"] > result["history"]["held_out"][0]["psnr"] > 8
    assert last["codebook"] == pytest.approx(last["commitment"])
    assert last["loss"] == pytest.approx(last["reconstruction"] + 0.25 * last["commitment"])


@pytest.mark.parametrize(
    "changes", [{"precision": "bf16"}, {"heads": 2, "metric": "cosine"}, {"backend": "reference"}, {"workers": 1}]
)
def test_variants_run(config: TrainConfig, changes: dict[str, Any]) -> None:
    result = train(replace(config, steps=3, **changes), say=quiet)
    assert result["finished"]
    assert np.isfinite(result["final"]["psnr"])
    assert result["environment"]["backend"] == changes.get("backend", result["environment"]["backend"])
    assert "VQKERNELS_BACKEND" not in os.environ


def test_the_process_is_left_as_it_was(config: TrainConfig) -> None:
    threads = torch.get_num_threads()
    train(replace(config, steps=1, threads=1), say=quiet)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_divergence_stops_and_keeps_the_checkpoint(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison() -> None:
        run.model.decoder.mix.weight.data.fill_(float("nan"))

    original = loop._Run.__init__

    def remember(self: Any, *args: Any) -> None:
        nonlocal run
        original(self, *args)
        run = self

    run: Any = None
    monkeypatch.setattr(loop._Run, "__init__", remember)
    stop_at(4, monkeypatch, lambda: None)
    stop_at(5, monkeypatch, poison)
    with pytest.raises(TrainingError, match=r"the loss is not finite at step 6: try --lr below 0.002; .* from before"):
        train(config, say=quiet)
    assert all(t.isfinite().all() for t in weights(config.output).values() if t.is_floating_point())


def test_tensorboard_on_request(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = train(replace(config, tensorboard=True), say=quiet)
    events = accumulator.EventAccumulator(str(Path(config.output) / "tensorboard")).Reload()
    values = [(e.step, e.value) for e in events.Scalars("held_out/psnr")]
    assert values == [(line["step"], pytest.approx(line["psnr"])) for line in result["history"]["held_out"]]
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(TrainingError, match=r"tensorboard is not installed: pip install 'vqkernels\[tensorboard\]'"):
        train(replace(config, output=config.output + "2", tensorboard=True), say=quiet)
    assert not Path(config.output + "2").exists()


# Files


def test_the_written_model_is_the_trained_model(config: TrainConfig) -> None:
    train(config, say=quiet)
    model = VQVAE.from_pretrained(Path(config.output) / "model")
    trained = {n.removeprefix("model."): t for n, t in weights(config.output).items() if n.startswith("model.")}
    assert same(dict(model.state_dict()), trained)


def test_sample_grid_shows_originals_above_reconstructions(config: TrainConfig) -> None:
    train(config, say=quiet)
    split = data.image_folder(str(config.data), 32, None, 0.3)
    originals, _ = data.sample_crops(split.held_out, 32, 4, 8)
    model = VQVAE.from_pretrained(Path(config.output) / "model")
    picture = np.asarray(Image.open(Path(config.output) / "samples.png").convert("RGB"))
    side = originals.shape[-1]
    for number, original in enumerate(originals):
        x, y = plots.tile_position(number, side, restored=False)
        assert np.array_equal(picture[y : y + side, x : x + side], original.permute(1, 2, 0).numpy())
        restored = model.decode(model.encode(original[None] / 255))[0]
        x, y = plots.tile_position(number, side, restored=True)
        found = torch.from_numpy(picture[y : y + side, x : x + side].copy()).permute(2, 0, 1)
        assert (found.int() - (restored * 255).round().int()).abs().max() <= 1


def test_curves_are_drawn(config: TrainConfig) -> None:
    train(config, say=quiet)
    picture = np.asarray(Image.open(Path(config.output) / "curves.png").convert("RGB")).astype(int)
    assert picture.shape[0] > 500
    red = (abs(picture - [214, 39, 40]).sum(-1) < 30).sum()  # the held-out curves
    assert red > 200


def test_checkpoint_round_trip_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    tensors = {
        "a": torch.randn(3, 100),
        "b": torch.tensor(7),
        "empty": torch.zeros(0, 2),
        "h": torch.ones(3).bfloat16(),
    }
    save_checkpoint(path, tensors, {"step": 3, "text": "Größe"})
    found, state = load_checkpoint(path)
    assert same(found, tensors)
    assert state == {"step": 3, "text": "Größe"}
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:50], b"", whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(TrainingError, match="is damaged"):
            load_checkpoint(path)
    path.unlink()
    with pytest.raises(TrainingError, match="there is no checkpoint"):
        load_checkpoint(path)


# The run folder


def test_another_run_is_not_overwritten(config: TrainConfig) -> None:
    train(config, say=quiet)
    before = weights(config.output)
    with pytest.raises(TrainingError, match=r"another config: use --output .* --resume .* --overwrite"):
        train(replace(config, seed=3), say=quiet)
    assert same(weights(config.output), before)
    train(config, say=quiet)  # the same again leads to the same files
    assert same(weights(config.output), before)
    keep = Path(config.output) / "notes.txt"
    keep.write_text("mine")
    train(replace(config, seed=3), overwrite=True, say=quiet)
    assert not same(weights(config.output), before)
    assert keep.read_text() == "mine"


def test_resume_refuses_what_would_not_be_the_same_run(config: TrainConfig, photos: Path) -> None:
    with pytest.raises(TrainingError, match="there is no run in"):
        train(config, resume=True, say=quiet)
    train(config, say=quiet)
    with pytest.raises(TrainingError, match=r"other options \(codes 13 -> 14\)"):
        train(replace(config, codes=14), resume=True, say=quiet)
    checkpoint = Path(config.output) / "checkpoint.safetensors"
    tensors, state = load_checkpoint(checkpoint)
    save_checkpoint(checkpoint, tensors | {"model.quantizer.codebook": torch.zeros(12, 6)}, state)
    before = checkpoint.read_bytes()
    with pytest.raises(TrainingError, match=r"quantizer\.codebook is \(12, 6\) float32, expected \(13, 6\)"):
        train(config, resume=True, say=quiet)
    save_checkpoint(checkpoint, tensors, state | {"images": ["0", "1"]})
    with pytest.raises(TrainingError, match="images have changed"):
        train(config, resume=True, say=quiet)
    checkpoint.write_bytes(before[:1000])
    with pytest.raises(TrainingError, match="is damaged"):
        train(config, resume=True, say=quiet)
    assert checkpoint.read_bytes() == before[:1000]


def test_an_output_that_cannot_be_written(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="is a file, not a folder"):
        train(replace(config, output=str(tmp_path / "file")), say=quiet)
    with pytest.raises(TrainingError, match="cannot be written"):
        train(replace(config, output=str(tmp_path / "file" / "run")), say=quiet)


# The command line


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["train", *arguments])
    return status, *capfd.readouterr()


def test_command_line_errors_are_one_line_and_write_nothing(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    cases = {
        ("--data", str(tmp_path / "none")): "there is no folder",
        ("--data", str(tmp_path / "empty")): "no readable image",
        ("--data", str(photos / "a.png")): "is not a folder",
        ("--image-size", "30"): "image_size is 30; expected an integer >= 32",
        ("--image-size", "36", "--downsample", "8"): "expected a multiple of downsample=8",
        ("--downsample", "5"): "downsample is 5",
        ("--precision", "int8"): "precision is 'int8'; expected one of fp32, bf16, fp16",
        ("--lr", "nan"): "lr is nan",
        ("--shuffle-channels", "2"): "shuffle_channels is 2.0; expected a share between 0 and 1",
        ("--metric", "l3"): "metric is 'l3'",
        ("--backend", "magic"): "backend is 'magic'",
        ("--resume",): "there is no run in",
    }
    if not torch.cuda.is_available():
        cases["--device", "cuda"] = "device is 'cuda', which torch cannot use"
    for arguments, words in cases.items():
        status, _, errors = run(capfd, "--output", str(tmp_path / "run"), "--steps", "1", *arguments)
        assert (status, errors.count("\n")) == (2, 1), errors
        assert errors.startswith("vqkernels train: error: ")
        assert words in errors
    assert not (tmp_path / "run").exists()


def test_missing_extras_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    status, _, errors = run(capfd, "--output", str(tmp_path / "run"))
    assert status == 2
    assert "accelerate is not installed: pip install 'vqkernels[train]'" in errors
    assert not (tmp_path / "run").exists()


def test_command_line_trains_and_resumes(photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "run")
    sizes = ("--image-size", "32", "--batch-size", "4", "--codes", "9", "--dim", "4", "--base-channels", "8")
    arguments = ("--data", str(photos), "--output", folder, *sizes, "--gradient-codebook", "--device", "cpu")
    status, said, _ = run(capfd, *arguments, "--steps", "2")
    assert status == 0
    assert "6 to train on, 1 held out" in said
    assert "held-out: PSNR" in said
    # Only what changes has to be given again.
    status, said, _ = run(capfd, "--output", folder, "--resume", "--steps", "3")
    assert status == 0
    assert "resuming at step 2" in said
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (stored["steps"], stored["codes"], stored["decay"], stored["data"]) == (3, 9, None, str(photos))


@pytest.mark.slow
def test_two_processes_train_like_one(photos: Path, tmp_path: Path) -> None:
    sizes = ("--image-size", "32", "--batch-size", "8", "--codes", "9", "--dim", "4", "--base-channels", "8")
    arguments = ("train", "--data", str(photos), *sizes, "--steps", "4", "--device", "cpu", "--log-every", "2")
    one = Command([*arguments, "--output", str(tmp_path / "one")]).finish()
    launch = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vqkernels")
    two = subprocess.run(
        [sys.executable, "-m", *launch, *arguments, "--output", str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    for status, out, err in (one, (two.returncode, two.stdout, two.stderr)):
        assert status == 0, err
        assert out.count("held-out: PSNR") == 1
    alone, together = weights(str(tmp_path / "one")), weights(str(tmp_path / "two"))
    assert alone.keys() == together.keys()
    for key in alone:
        torch.testing.assert_close(
            together[key], alone[key], rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    history = [without_timing(str(tmp_path / name))["history"]["train"] for name in ("one", "two")]
    assert [line["reconstruction"] for line in history[1]] == pytest.approx(
        [line["reconstruction"] for line in history[0]], rel=1e-4
    )
