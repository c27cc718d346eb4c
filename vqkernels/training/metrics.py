"""What is measured: reconstruction quality by torchmetrics, and how the codebook is used.

Called by :mod:`vqkernels.training.loop` on the held-out crops, and for the running numbers of the training batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vqkernels.models import VQVAE, VQVAEConfig
from vqkernels.nn import statistics
from vqkernels.training.config import require

__all__ = ["TERMS", "Window", "code_statistics", "count_codes", "evaluate", "to_unit"]

TERMS = ("loss", "reconstruction", "codebook", "commitment")


def to_unit(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images to float32 in [0, 1] on ``device``."""
    return images.to(device, non_blocking=True).to(torch.float32).div_(255)


def code_statistics(counts: Tensor) -> tuple[float, float]:
    """Usage and perplexity.

    Args:
        counts: (H, K) how often each code was chosen; heads are averaged over.

    Returns:
        Share of the codes that were chosen at least once, and ``exp(entropy)`` of the choices (between 1 and K).
    """
    return statistics.usage(counts).mean().item(), statistics.perplexity(counts).mean().item()


def count_codes(indices: Tensor, config: VQVAEConfig) -> Tensor:
    """How often each code was chosen, int64 (H, K).

    Args:
        indices: (B, h, w), with a last dim of H if there are several heads.
        config: of the model.
    """
    by_head = indices.movedim(-1, 0) if config.heads > 1 else indices[None]
    return statistics.count_codes(by_head, config.codes)


@torch.no_grad()
def evaluate(
    model: VQVAE, crops: Tensor, names: Sequence[str], device: torch.device, batch_size: int
) -> dict[str, Any]:
    """Reconstruct held-out crops and measure.

    Args:
        model: put into evaluation mode for the duration; nothing of it changes.
        crops: uint8 (N, 3, S, S).
        names: image of each crop.
        device: of the model.
        batch_size: crops at a time; the result does not depend on it beyond rounding.

    Returns:
        ``psnr`` (mean over crops, dB), ``psnr_pooled`` (of the mean squared error over all pixels), ``ssim``, ``mse``
        (of values in [0, 1]), ``usage``, ``perplexity``, ``psnr_by_image``; reconstructions are clamped to [0, 1].
    """
    image = require("torchmetrics.functional.image")
    training = model.training
    model.eval()
    try:
        errors, similarity, counts = [], [], torch.zeros(model.config.heads, model.config.codes, dtype=torch.int64)
        psnr: list[Tensor] = []
        for start in range(0, len(crops), batch_size):
            originals = to_unit(crops[start : start + batch_size], device)
            out = model(originals)
            restored = out.reconstruction.float().clamp(0, 1)
            errors.append((restored - originals).double().square().mean((1, 2, 3)))
            psnr += [
                image.peak_signal_noise_ratio(r[None], o[None], data_range=1.0)
                for r, o in zip(restored, originals, strict=True)
            ]
            similarity.append(
                image.structural_similarity_index_measure(restored, originals, data_range=1.0, reduction="none")
            )
            counts += count_codes(out.quantizer.indices, model.config).cpu()
    finally:
        model.train(training)
    per_crop = torch.stack(psnr).double().cpu()
    mse = torch.cat(errors).mean().item()
    usage, perplexity = code_statistics(counts)
    by_image = {n: per_crop[[i for i, m in enumerate(names) if m == n]].mean().item() for n in dict.fromkeys(names)}
    return {
        "psnr": per_crop.mean().item(),
        "psnr_pooled": -10 * math.log10(max(mse, 1e-12)),
        "ssim": torch.cat(similarity).double().mean().item(),
        "mse": mse,
        "usage": usage,
        "perplexity": perplexity,
        "psnr_by_image": by_image,
    }


class Window:
    """Means of the loss terms and counts of the codes since the last line of the log; no host sync until it is read.

    Args:
        heads, codes: of the quantizer.
        device: where the losses live.
    """

    def __init__(self, heads: int, codes: int, device: torch.device) -> None:
        self.sums = torch.zeros(len(TERMS) + 1, dtype=torch.float64, device=device)
        self.counts = torch.zeros(heads, codes, dtype=torch.int64, device=device)

    def add(self, terms: Mapping[str, Tensor], counts: Tensor) -> None:
        """One step's loss terms (0-d) and code counts (H, K)."""
        values = [terms[name].detach().double() for name in TERMS]
        self.sums += torch.stack([*values, torch.ones_like(values[0])])
        self.counts += counts

    def reduce(self, accelerator: Any) -> None:
        """Gather all processes' sums on the main process; the others start again at zero."""
        if accelerator.num_processes > 1:
            keep = 1 if accelerator.is_main_process else 0
            self.sums = accelerator.reduce(self.sums, "sum") * keep
            self.counts = accelerator.reduce(self.counts, "sum") * keep

    def take(self) -> dict[str, float]:
        """The means, PSNR of the mean reconstruction error, usage and perplexity; then start again."""
        *sums, steps = self.sums.tolist()
        line = {name: value / max(steps, 1) for name, value in zip(TERMS, sums, strict=True)}
        line["psnr"] = -10 * math.log10(line["reconstruction"]) if line["reconstruction"] > 0 else math.inf
        line["usage"], line["perplexity"] = code_statistics(self.counts)
        self.sums.zero_()
        self.counts.zero_()
        return line

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return {"window.sums": self.sums, "window.counts": self.counts}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put :meth:`tensors` back."""
        self.sums.copy_(tensors["window.sums"])
        self.counts.copy_(tensors["window.counts"])
