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
from vqkernels.models import TokenModel
from vqkernels.training import data, metrics, plots
from vqkernels.training.config import TrainConfig
from vqkernels.training.run_folder import RunFolder, write_json

__all__ = ["write_results"]

SAMPLES = 8


def write_results(
    folder: RunFolder,
    config: TrainConfig,
    model: TokenModel,
    images: data.Split,
    history: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    warnings: Sequence[Mapping[str, Any]] = (),
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
        warnings: given so far.
        finished: whether this is the end of the run.
        processes: how many trained together.
        seconds: spent so far.

    Returns:
        What was written to metrics.json.

    Raises:
        OSError: the folder cannot be written.
    """
    last, stream = history["held_out"][-1], model.streams[-1]
    adversarial = config.discriminator_config is not None
    scores = [metrics.score(line, adversarial) for line in history["held_out"]]
    best = max(range(len(scores)), key=scores.__getitem__)
    title = (
        f"step {last['step']}: held-out PSNR {last['psnr']:.2f} dB, SSIM {last['ssim']:.3f}, "
        f"{stream.downsample}x downsampling, {model.streams[0].codes} codes"
    )
    originals, names = data.sample_crops(images.held_out, config.image_size, model.multiple, SAMPLES)
    restored = _reconstruct(model, originals)
    errors = (restored.double() - originals.double()).div(255).square().mean((1, 2, 3)).clamp(min=1e-12)
    labels = [f"{name} {-10 * math.log10(error):.1f} dB" for name, error in zip(names, errors.tolist(), strict=True)]
    plots.sample_grid(folder.samples, originals, restored, labels, title)
    plots.curves(folder.curves, history, model.streams[0].codes, title)
    model.save_pretrained(folder.model)
    if best == len(scores) - 1:
        model.save_pretrained(folder.best)
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
        "best": {
            "step": history["held_out"][best]["step"],
            "score": scores[best],
            "by": "psnr - 5 |log2 sharpness|" if adversarial else "psnr",
        },
        "warnings": list(warnings),
        "images": described,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bits_per_pixel": model.bits_per_pixel,
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


def _environment(model: TokenModel, processes: int) -> dict[str, Any]:
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
def _reconstruct(model: TokenModel, images: Tensor) -> Tensor:
    """uint8 to uint8, one image at a time: they are larger than the training crops."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        restored = [model(metrics.to_unit(image[None], device)).reconstruction for image in images]
    finally:
        model.train(training)
    return (torch.cat(restored).float().clamp(0, 1).cpu() * 255).round().to(torch.uint8)
