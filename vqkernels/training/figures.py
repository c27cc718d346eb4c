"""Pictures of a report as PNG bytes: pairs with their error, use of the codes, a map of the codebook, curves.

Called by :mod:`vqkernels.training.report`; no display and no global state of matplotlib.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqkernels.models import TokenModel
from vqkernels.nn import VectorQuantizer
from vqkernels.training.config import require

__all__ = ["codebooks", "curves", "error_map", "map_of_codes", "png", "project", "use_of_codes"]


def codebooks(model: TokenModel) -> list[tuple[str, Tensor]]:
    """Name and codes (K, D) of every codebook of a model; heads are apart."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, VectorQuantizer):
            codes = module.codebook.detach().float().cpu()
            heads = codes if codes.dim() == 3 else codes[None]
            found += [(f"{name}[{h}]" if len(heads) > 1 else name, head) for h, head in enumerate(heads)]
    return found


def png(image: Tensor) -> bytes:
    """uint8 (3, H, W) as PNG."""
    buffer = io.BytesIO()
    array = image.permute(1, 2, 0).contiguous().numpy()
    require("PIL.Image").fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def error_map(original: Tensor, restored: Tensor, most: float = 0.25) -> Tensor:
    """Mean absolute difference of the channels in colour: black for none, white from ``most`` on.

    Args:
        original, restored: (3, H, W) in [0, 1].

    Returns:
        uint8 (3, H, W).
    """
    colours = require("matplotlib").colormaps["inferno"]
    share = ((original - restored).abs().mean(0) / most).clamp(0, 1)
    return torch.from_numpy((colours(share.numpy())[..., :3] * 255).round().astype(np.uint8)).permute(2, 0, 1)


def _figure(width: float, height: float) -> Any:
    figure = require("matplotlib.figure").Figure(figsize=(width, height), dpi=100, layout="constrained")
    require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def _bytes(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def use_of_codes(counts: Sequence[tuple[str, Sequence[int]]]) -> bytes:
    """Frequency of the codes, most frequent first, a line per label; even use would be the dotted line."""
    figure = _figure(5.2, 3.4)
    axes = figure.subplots()
    for i, (label, values) in enumerate(counts):
        y = np.sort(np.asarray(values, dtype=np.float64))[::-1]
        y = y / max(y.sum(), 1)
        used = int((y > 0).sum())
        axes.plot(np.arange(1, used + 1), y[:used], color=f"C{i}", label=f"{label}: {used} of {len(y)} used")
        axes.axhline(1 / len(y), color=f"C{i}", linestyle=":", linewidth=1)
    axes.set(yscale="log", xlabel="codes, most frequent first", ylabel="share of the tokens")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return _bytes(figure)


def project(codes: Tensor) -> tuple[Tensor, float]:
    """Codes (K, D) on their two principal axes (K, 2), and the share of the variance that they hold.

    Signs are fixed (the largest coordinate of an axis is positive), so that the picture is the same every time.
    """
    x = codes.double() - codes.double().mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x)
    axes = vectors[:, [-1, -2]] if x.shape[1] > 1 else torch.cat([vectors, torch.zeros_like(vectors)], 1)
    largest = axes.abs().argmax(0)
    axes = axes * torch.where(axes.gather(0, largest[None]) < 0, -1.0, 1.0)
    share = values[-2:].sum() / values.sum().clamp(min=1e-300)
    return x @ axes, float(share)


def map_of_codes(codes: Tensor, counts: Sequence[int] | None, title: str) -> bytes:
    """The codebook on its two principal axes; colour and size show how often a code was chosen, crosses were never."""
    figure = _figure(4.4, 3.8)
    axes = figure.subplots()
    points, share = project(codes)
    x, y = points.numpy().T
    if counts is None:
        axes.scatter(x, y, s=8, color="C0", linewidths=0)
    else:
        count = np.asarray(counts, dtype=np.float64)
        used = count > 0
        axes.scatter(x[~used], y[~used], marker="x", s=12, color="0.7", linewidths=0.8, label="never chosen")
        shown = axes.scatter(
            x[used], y[used], c=np.log10(count[used]), s=6 + 30 * count[used] / max(count.max(), 1), cmap="viridis"
        )
        figure.colorbar(shown, ax=axes, label="log10 of how often chosen", shrink=0.85)
        if not used.all():
            axes.legend(fontsize=8)
    axes.set(title=title, xlabel=f"two principal axes: {share:.0%} of the variance", xticks=[], yticks=[])
    axes.title.set_fontsize(10)
    return _bytes(figure)


def curves(runs: Sequence[tuple[str, dict[str, Any]]]) -> bytes:
    """Loss, held-out PSNR, usage and perplexity over the steps, a colour per run."""
    figure = _figure(10, 5.6)
    grid = figure.subplots(2, 2)
    panels = (("train", "loss", "Loss (training)"), ("held_out", "psnr", "PSNR of held-out images, dB"),
              ("train", "usage", "Usage (training)"), ("train", "perplexity", "Perplexity (training)"))  # fmt: skip
    for axes, (part, name, title) in zip(grid.flat, panels, strict=True):
        for i, (label, run) in enumerate(runs):
            lines = [line for line in run["history"].get(part, ()) if line.get(name) is not None]
            axes.plot([line["step"] for line in lines], [line[name] for line in lines], color=f"C{i}", label=label)
        axes.set(title=title, xlabel="step")
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.25)
        if name == "loss" and axes.has_data():
            axes.set_yscale("log")
    grid[0, 0].legend(fontsize=8)
    return _bytes(figure)
