"""A VQGAN so small that training it takes a second, its fixtures, and what its tests look at.

Used by the tests of adversarial training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vqkernels.training import TrainConfig, loop, plots, train
from vqkernels.training.checkpoint import load_checkpoint

MODEL = {"channels": 8, "multipliers": (1, 2), "z_channels": 8, "codes": 13, "dim": 6, "norm_groups": 4}


def quiet(line: str) -> None:
    """Say nothing."""


def write_photos(folder: Path) -> Path:
    """Seven smooth pictures of different sizes."""
    random = np.random.default_rng(5)
    for number in range(7):
        coarse = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((60 + 7 * number, 63), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def small_config(photos: Path, output: Path) -> TrainConfig:
    """Seven steps; the discriminator joins in the third."""
    return TrainConfig.from_preset(
        "tiny-vqgan", model_options=MODEL, discriminator={"channels": 8, "layers": 1},
        loss={"discriminator_start": 2, "discriminator_ramp": 2}, data=str(photos), output=str(output), image_size=32,
        held_out=0.3, batch_size=4, steps=7, log_every=1, eval_every=5, checkpoint_every=4, device="cpu", threads=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures."""
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def config(photos: Path, tmp_path: Path) -> TrainConfig:
    """A short run on them."""
    return small_config(photos, tmp_path / "run")


@pytest.fixture(autouse=True)
def one_thread_no_plots(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For every test of a module that imports it."""
    monkeypatch.setattr(plots, "curves", lambda path, *_: path.write_bytes(b""))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensors(config: TrainConfig, prefix: str = "") -> dict[str, torch.Tensor]:
    """Those of the checkpoint whose names begin with ``prefix``, without it."""
    found = load_checkpoint(Path(config.output) / "checkpoint.safetensors")[0]
    return {name.removeprefix(prefix): t for name, t in found.items() if name.startswith(prefix)}


def without_timing(config: TrainConfig) -> dict[str, Any]:
    """metrics.json, but for the only part that may differ between two equal runs."""
    found: dict[str, Any] = json.loads((Path(config.output) / "metrics.json").read_text())
    del found["timing"]
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal names, equal bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def started(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The inside of a run before its first step."""
    held: list[Any] = []

    def hold(self: Any, _: Any) -> dict[str, Any]:
        held.append(self)
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "train", hold)
        train(config, say=quiet)
    return held[0]
