"""What is measured: reconstruction quality by torchmetrics, and how the codebook is used.

Called by :mod:`vqkernels.training.loop` on the held-out crops, and for the running numbers of the training batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vqkernels import _devices
from vqkernels.models import TokenModel, TokenStream
from vqkernels.nn import statistics
from vqkernels.training import quality
from vqkernels.training.config import require

__all__ = ["TERMS", "Window", "code_statistics", "count_codes", "evaluate", "score", "to_unit"]

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


def count_codes(indices: Tensor | Sequence[Tensor], streams: Sequence[TokenStream]) -> list[Tensor]:
    """How often each code was chosen, int64 (P, K) for every stream.

    Args:
        indices: (B, h, w), with a last dim of P tokens per place if there are several; one tensor per stream.
        streams: of the model.
    """
    grids = [indices] if isinstance(indices, Tensor) else indices
    return [
        statistics.count_codes(grid.movedim(-1, 0) if stream.per_place > 1 else grid[None], stream.codes)
        for grid, stream in zip(grids, streams, strict=True)
    ]


def no_counts(streams: Sequence[TokenStream], device: torch.device) -> list[Tensor]:
    """Zeros of the shapes of :func:`count_codes`."""
    return [torch.zeros(s.per_place, s.codes, dtype=torch.int64, device=device) for s in streams]


def describe_counts(counts: Sequence[Tensor]) -> dict[str, Any]:
    """``usage`` and ``perplexity`` of the first stream, and with several streams lists of all."""
    found = [code_statistics(c) for c in counts]
    line: dict[str, Any] = {"usage": found[0][0], "perplexity": found[0][1]}
    if len(found) > 1:
        line |= {"usage_by_stream": [u for u, _ in found], "perplexity_by_stream": [p for _, p in found]}
    return line


def score(line: Mapping[str, Any], adversarial: bool) -> float:
    """What the best model is chosen by: PSNR, and for a VQGAN 5 dB less for every factor of two in sharpness."""
    if not adversarial:
        return float(line["psnr"])
    return float(line["psnr"]) - 5 * abs(math.log2(max(line["sharpness"], 1e-6)))


@torch.no_grad()
def evaluate(
    model: TokenModel, crops: Tensor, names: Sequence[str], device: torch.device, batch_size: int
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
        (of values in [0, 1]), ``usage``, ``perplexity``, ``psnr_by_image``; ``sharpness``: detail of reconstructions as
        a share of the originals' (:func:`vqkernels.training.quality.sharpness`), of all crops of an image together,
        then the mean over images. Reconstructions are clamped to [0, 1].
    """
    image = require("torchmetrics.functional.image")
    training = model.training
    model.eval()
    try:
        errors, similarity, details = [], [], []
        counts = no_counts(model.streams, torch.device("cpu"))
        psnr: list[Tensor] = []
        for start in range(0, len(crops), batch_size):
            originals = to_unit(crops[start : start + batch_size], device)
            out = model(originals)
            restored = out.reconstruction.float().clamp(0, 1)
            errors.append((restored - originals).cpu().double().square().mean((1, 2, 3)))
            psnr += [
                image.peak_signal_noise_ratio(r[None], o[None], data_range=1.0)
                for r, o in zip(restored, originals, strict=True)
            ]
            similarity.append(
                image.structural_similarity_index_measure(restored, originals, data_range=1.0, reduction="none")
            )
            details += [
                (quality.detail(r), quality.detail(o)) for r, o in zip(restored.cpu(), originals.cpu(), strict=True)
            ]
            found = count_codes(out.quantizer.indices, model.streams)
            counts = [a + b.cpu() for a, b in zip(counts, found, strict=True)]
    finally:
        model.train(training)
    per_crop = torch.stack(psnr).cpu().double()
    mse = torch.cat(errors).mean().item()
    crops_of = {n: [i for i, m in enumerate(names) if m == n] for n in dict.fromkeys(names)}
    by_image = {n: per_crop[of].mean().item() for n, of in crops_of.items()}
    pooled = [tuple(sum(details[i][which] for i in of) for which in (0, 1)) for of in crops_of.values()]
    sharpness = [mine / max(reference, quality.LEAST_DETAIL) for mine, reference in pooled]
    return {
        "psnr": per_crop.mean().item(),
        "psnr_pooled": -10 * math.log10(max(mse, 1e-12)),
        "ssim": torch.cat(similarity).cpu().double().mean().item(),
        "mse": mse,
        "sharpness": sum(sharpness) / len(sharpness),
        **describe_counts(counts),
        "psnr_by_image": by_image,
    }


class Window:
    """Means of the loss terms and counts of the codes since the last line of the log; no host sync until it is read.

    Args:
        streams: of the model.
        device: where the losses live.
        terms: names of the loss terms; one that a step lacks counts in no mean.
    """

    def __init__(self, streams: Sequence[TokenStream], device: torch.device, terms: Sequence[str] = TERMS) -> None:
        self.terms = tuple(terms)
        self.sums = torch.zeros(2, len(self.terms), dtype=_devices.widest(device), device=device)
        self.counts = no_counts(streams, device)

    def add(self, terms: Mapping[str, Tensor], counts: Sequence[Tensor]) -> None:
        """One step's loss terms (0-d) and code counts (P, K)."""
        here = next(iter(terms.values())).detach().to(self.sums.dtype)
        values = [terms[n].detach().to(self.sums.dtype) if n in terms else torch.zeros_like(here) for n in self.terms]
        present = torch.tensor([float(n in terms) for n in self.terms], dtype=self.sums.dtype)
        self.sums += torch.stack([torch.stack(values), present.to(self.sums.device)])
        for mine, new in zip(self.counts, counts, strict=True):
            mine += new

    def reduce(self, accelerator: Any) -> None:
        """Gather all processes' sums on the main process; the others start again at zero."""
        if accelerator.num_processes > 1:
            keep = 1 if accelerator.is_main_process else 0
            self.sums = accelerator.reduce(self.sums, "sum") * keep
            self.counts = [accelerator.reduce(c, "sum") * keep for c in self.counts]

    def take(self) -> dict[str, Any]:
        """The means, PSNR of the mean squared error, usage and perplexity; then start again."""
        sums, present = self.sums.tolist()
        line: dict[str, Any] = {
            n: s / max(c, 1) for n, s, c in zip(self.terms, sums, present, strict=True) if c or n in TERMS
        }
        mse = line.get("l2", line["reconstruction"])
        line["psnr"] = -10 * math.log10(mse) if mse > 0 else math.inf
        line |= describe_counts(self.counts)
        self.sums.zero_()
        for c in self.counts:
            c.zero_()
        return line

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return {"window.sums": self.sums, **{f"window.counts.{i}": c for i, c in enumerate(self.counts)}}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put :meth:`tensors` back."""
        for name, t in self.tensors().items():
            t.copy_(tensors[name])
