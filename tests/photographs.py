"""Crops of photographs that ship inside scikit-image, and a few training steps on them: real data for the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vqkernels.models import TokenModel


def crops(count: int, size: int, seed: int = 0, name: str = "astronaut") -> Tensor:
    """(count, 3, size, size) float32 in [0, 1], cut at random places of one photograph."""
    skimage = pytest.importorskip("skimage")
    image = pytest.importorskip("skimage.io").imread(Path(skimage.__file__).parent / "data" / f"{name}.png")
    pixels = torch.from_numpy(np.ascontiguousarray(image[..., :3])).permute(2, 0, 1).float() / 255
    generator = torch.Generator().manual_seed(seed)
    ys, xs = (torch.randint(0, s - size + 1, (count,), generator=generator).tolist() for s in pixels.shape[1:])
    return torch.stack([pixels[:, y : y + size, x : x + size] for y, x in zip(ys, xs, strict=True)])


def patches(images: Tensor, side: int) -> Tensor:
    """Images as latents (B, 3 * side * side, H / side, W / side): what a linear encoder would give the quantizer."""
    return F.pixel_unshuffle(images, side) - 0.5


def train(model: TokenModel, images: Tensor, steps: int, lr: float = 2e-3, batch: int = 4) -> list[float]:
    """Plain reconstruction training; the losses of all steps."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        part = images[(torch.arange(batch) + step * batch) % len(images)]
        out: Any = model(part)
        loss = (out.reconstruction - part).square().mean() + out.quantizer.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def error(model: TokenModel, images: Tensor) -> float:
    """Mean squared error of the images after a round trip through their tokens."""
    return float((model.decode_indices(model.encode_to_indices(images)) - images).square().mean())
