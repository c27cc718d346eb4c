"""Adversarial training that is cut, killed or spread over processes ends with the same bits, or the same numbers."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_vqgan
import torch
import torch.multiprocessing as mp
from small_vqgan import MODEL, quiet, same, started, tensors, without_timing

from vqkernels.models import load_model
from vqkernels.training import TrainConfig, loop, plots, train
from vqkernels.training.checkpoint import load_checkpoint

# Fixtures, the last one for every test here.
photos, config, quick = small_vqgan.photos, small_vqgan.config, small_vqgan.one_thread_no_plots


def cut_and_resume(config: TrainConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End a run without warning before a step, and go on from its last checkpoint."""
    original = loop._Run._step

    class Killed(BaseException):
        pass

    def wrapped(self: Any, batch: torch.Tensor) -> None:
        if self.step == step:
            raise Killed
        original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_step", wrapped)
        with pytest.raises(Killed):
            train(config, say=quiet)
    found = load_checkpoint(Path(config.output) / "checkpoint.safetensors")[1]["step"]
    assert 0 < found < step
    train(config, resume=True, say=quiet)


@pytest.mark.parametrize(
    "changes",
    [
        {"discriminator": {"channels": 8, "layers": 1, "scales": 2, "attention": True}},
        {"accumulate": 2, "clip": 0.5, "average": 0.9, "sizes": [32, 48]},
        {"loss": {"discriminator_start": 1, "lecam": 0.1, "r1": 1.0, "adversarial": "non_saturating"}},
        {"model_options": {**MODEL, "residual_levels": 2, "coarse_factor": 2}, "loss": {"adversarial": "vanilla"}},
        {"stage": "vqvae"},
        {"precision": "bf16"},
    ],
    ids=["scales", "accumulate", "regularised", "hybrid", "vqvae", "bf16"],
)
def test_resuming_gives_the_bits_of_an_uninterrupted_run(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    config = TrainConfig.from_dict(config.to_dict() | changes)
    train(config, say=quiet)
    cut = replace(config, output=str(tmp_path / "cut"))
    cut_and_resume(cut, 6, monkeypatch)
    assert same(tensors(config), tensors(cut))
    assert without_timing(config) == without_timing(cut)
    for name in ("model", "best"):
        a, b = (load_model(Path(c.output) / name).state_dict() for c in (config, cut))
        assert same(a, b)


def write_shards(photos: Path, folder: Path) -> str:
    """Two WebDataset tars with every photograph in both."""
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for path in sorted(photos.glob("*.png")):
                tar.add(path, arcname=f"{number}{path.name}")
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_train_and_resume_to_the_bit(
    config: TrainConfig, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    shards = write_shards(photos, tmp_path / "shards")
    config = replace(config, data=shards, column="png", streaming=streaming, steps=5, checkpoint_every=2, eval_every=5)
    train(config, say=quiet)
    cut = replace(config, output=str(tmp_path / "cut"))
    cut_and_resume(cut, 3, monkeypatch)
    assert same(tensors(config), tensors(cut))
    assert without_timing(config) == without_timing(cut)


# A process that has imported everything forks the ones to be killed: a tenth of the time of fresh ones.
KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
import accelerate, safetensors.torch, torch._dynamo, torchmetrics.functional.image
from vqkernels.models import load_model
from vqkernels.training import TrainConfig, plots, train
from vqkernels.training.checkpoint import load_checkpoint

plots.curves = lambda path, *_: path.write_bytes(b"")  # slower than the training
config = TrainConfig.from_dict(json.loads(sys.argv[1]))
folder, draw, kills = Path(config.output), random.Random(3), 0

def begin():
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # no progress bar
        train(config, resume=(folder / "config.json").exists(), say=lambda line: None)
        os._exit(0)
    return child

def processor_time(child):
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

while kills < 10:
    child, moment = begin(), draw.uniform(0, float(sys.argv[2]))
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if processor_time(child) >= moment:  # not the clock's: other processes run beside this one
            os.kill(child, signal.SIGKILL)
            kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            break
        time.sleep(0.002)
    # What lies under its final name is whole.
    for name in ("config.json", "metrics.json"):
        if (folder / name).exists():
            json.loads((folder / name).read_text())
    if (folder / "checkpoint.safetensors").exists():
        print(load_checkpoint(folder / "checkpoint.safetensors")[1]["step"], flush=True)
    for name in ("model", "best"):
        if (folder / name / "model.safetensors").exists():
            load_model(folder / name)
assert os.waitpid(begin(), 0)[1] == 0
print("ended")
"""


@pytest.mark.slow
def test_killed_at_ten_moments_it_ends_with_the_same_bits(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, steps=40, eval_every=5, checkpoint_every=2, average=0.9, loss={"discriminator_start": 10})
    began = time.process_time()
    train(config, say=quiet)
    killed = replace(config, output=str(tmp_path / "killed"))
    seconds = str(0.4 * (time.process_time() - began))
    command = [sys.executable, "-c", KILLS, json.dumps(killed.to_dict()), seconds]
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert found.returncode == 0, found.stderr
    *reached, last = found.stdout.split()
    assert last == "ended"
    assert len(set(reached)) > 3  # it was killed at different steps
    assert same(tensors(config), tensors(killed))
    assert without_timing(config) == without_timing(killed)
    for name in ("model", "best"):
        a, b = ((Path(c.output) / name / "model.safetensors").read_bytes() for c in (config, killed))
        assert a == b
    assert not list(Path(killed.output).rglob(".*.tmp"))


def smooth(patch: pytest.MonkeyPatch) -> None:
    """Make the steps a smooth function of the gradients.

    A gradient that is nothing but rounding still makes Adam take a step of full length, and a code that flips changes
    more than rounding: both runs would part whatever computes them. A larger eps prevents it, a small rate keeps the
    runs together long enough to be compared.
    """
    patch.setattr(torch.optim, "Adam", functools.partial(torch.optim.Adam, eps=1e-3))


def one_of_two(rank: int, config: TrainConfig, port: int) -> None:
    """What torchrun starts, without another three interpreters; test_training.py has torchrun itself."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        smooth(patch)
        patch.setattr(plots, "curves", lambda path, *_: path.write_bytes(b""))
        train(config, say=said.append)
    Path(config.output, f"said-{rank}").write_text("\n".join(said))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.slow
def test_two_processes_train_like_one(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name in ("one", "two"):
        found[name] = replace(
            config, output=str(tmp_path / name), steps=20, log_every=5, eval_every=20, checkpoint_every=20,
            lr=3e-5, discriminator_lr=3e-5, batch_size=8, average=0.9, accumulate=2, clip=1.0,
            loss={"discriminator_start": 3, "lecam": 0.1, "r1": 0.5},
        )  # fmt: skip
    said: list[str] = []
    with monkeypatch.context() as patch:
        smooth(patch)
        train(found["one"], say=said.append)
    mp.start_processes(one_of_two, (found["two"], free_port()), nprocs=2, start_method="forkserver")
    said_by_two = [Path(found["two"].output, f"said-{rank}").read_text() for rank in range(2)]
    for lines in ("\n".join(said), "".join(said_by_two)):
        assert lines.count("held-out: PSNR") == 1
    one, two = tensors(found["one"]), tensors(found["two"])
    assert one.keys() == two.keys()
    assert any(name.startswith("discriminator.") for name in one)
    for name in one:
        if name.startswith(("model.", "discriminator.", "average.", "lecam.")):
            torch.testing.assert_close(
                two[name], one[name], rtol=1e-4, atol=2e-6, msg=lambda t, name=name: f"{name}: {t}"
            )
    # They did move, and far more than that.
    fresh = started(replace(config, output=str(tmp_path / "fresh"), lr=3e-5), monkeypatch).stepper
    for prefix, module in (("model.", fresh.model), ("discriminator.", fresh.critic)):
        moved = [(one[prefix + n] - p).abs().max().item() for n, p in module.named_parameters()]
        assert max(moved) > 1e-4
    lines = [without_timing(c)["history"]["train"] for c in found.values()]
    for name in ("reconstruction", "discriminator", "adaptive_weight", "lecam"):
        assert [line[name] for line in lines[1] if name in line] == pytest.approx(
            [line[name] for line in lines[0] if name in line], rel=1e-3
        )
