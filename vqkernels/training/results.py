"""What a run leaves for people: metrics.json, the two pictures and the model.

Called by :mod:`vqkernels.training.loop` after every evaluation; each file is written in one step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import vqkernels
from vqkernels.models import VQVAE
from vqkernels.training import data, metrics, plots
from vqkernels.training.config import TrainConfig
from vqkernels.training.run_folder import RunFolder, write_json

__all__ = ["write_results"]

SAMPLES = 8


def write_results(
    folder: RunFolder,
    config: TrainConfig,
    model: VQVAE,
    images: data.Split,
    history: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    finished: bool,
    processes: int,
    seconds: float,
) -> dict[str, Any]:
    """Write the files.

    Args:
        folder: where to.
        config: of the run.
        model: as it is now.
        images: their held-out side is drawn.
        history: "train" and "held_out"; the last held-out line becomes "final".
        finished: whether this is the end of the run.
        processes: how many trained together.
        seconds: spent so far.

    Returns:
        What was written to metrics.json.

    Raises:
        OSError: the folder cannot be written.
    """
    last = history["held_out"][-1]
    title = (
        f"step {last['step']}: held-out PSNR {last['psnr']:.2f} dB, SSIM {last['ssim']:.3f}, "
        f"{config.downsample}x downsampling, {config.codes} codes"
    )
    originals, names = data.sample_crops(images.held_out, config.image_size, config.downsample, SAMPLES)
    restored = _reconstruct(model, originals)
    errors = (restored.double() - originals.double()).div(255).square().mean((1, 2, 3)).clamp(min=1e-12)
    labels = [f"{name} {-10 * math.log10(error):.1f} dB" for name, error in zip(names, errors.tolist(), strict=True)]
    plots.sample_grid(folder.samples, originals, restored, labels, title)
    plots.curves(folder.curves, history, config.codes, title)
    model.save_pretrained(folder.model)
    described: dict[str, Any] = {
        "train": len(images.train),
        "held_out": len(images.held_out),
        "skipped": [list(pair) for pair in images.skipped],
    }
    if config.data is None:
        described |= {"train": images.train.names, "held_out": images.held_out.names}
    result: dict[str, Any] = {
        "finished": finished,
        "step": last["step"],
        "final": last,
        "images": described,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bits_per_pixel": config.heads * math.log2(config.codes) / config.downsample**2,
        "environment": _environment(model, processes),
        "history": history,
        # The only part that differs between two runs with the same seed on the same machine.
        "timing": {
            "seconds": round(seconds, 2),
            "crops_per_second": round(last["step"] * config.batch_size / max(seconds, 1e-9), 1),
        },
    }
    write_json(folder.metrics, result)
    return result


def _environment(model: VQVAE, processes: int) -> dict[str, Any]:
    device = next(model.parameters()).device
    row = torch.zeros(1, model.config.dim, device=device)
    return {
        "vqkernels": vqkernels.__version__,
        "torch": torch.__version__,
        "device": str(device),
        "backend": vqkernels.explain("nearest", row, row).partition("\n")[0].rpartition(" ")[2],
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


@torch.no_grad()
def _reconstruct(model: VQVAE, images: Tensor) -> Tensor:
    """uint8 to uint8, one image at a time: they are larger than the training crops."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        restored = [model(metrics.to_unit(image[None], device)).reconstruction for image in images]
    finally:
        model.train(training)
    return (torch.cat(restored).float().clamp(0, 1).cpu() * 255).round().to(torch.uint8)
