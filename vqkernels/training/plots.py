"""The two pictures of a run: held-out originals above their reconstructions, and the curves.

Called by :mod:`vqkernels.training.loop`; both are written in one step, and neither needs a display.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vqkernels._files import replace_file
from vqkernels.training.config import require

__all__ = ["GAP", "MARGIN", "curves", "sample_grid", "tile_position"]

# Layout of the sample grid in pixels.
MARGIN, GAP, LABEL = 16, 4, 22
COLUMNS = 4
INK, PAPER, MUTED = (20, 20, 20), (255, 255, 255), (110, 110, 110)


def tile_position(number: int, side: int, restored: bool) -> tuple[int, int]:
    """Top left pixel (x, y) of a tile of :func:`sample_grid`.

    Args:
        number: of the sample.
        side: of a tile.
        restored: the reconstruction (below) instead of the original (above).
    """
    band, column = divmod(number, COLUMNS)
    band_height = 2 * side + GAP + LABEL + MARGIN
    x = MARGIN + column * (side + GAP)
    y = MARGIN + 2 * LABEL + band * band_height + (side + GAP if restored else 0)
    return x, y


def sample_grid(path: Path, originals: Tensor, restored: Tensor, labels: Sequence[str], title: str) -> None:
    """Write a PNG: bands of originals with the reconstructions right below them, pixel for pixel.

    Args:
        path: final name.
        originals: uint8 (N, 3, S, S).
        restored: uint8 (N, 3, S, S).
        labels: one under each pair.
        title: on top.

    Raises:
        OSError: the folder cannot be written.
    """
    image_module, draw_module, font_module = (require(f"PIL.{name}") for name in ("Image", "ImageDraw", "ImageFont"))
    side = originals.shape[-1]
    columns = min(COLUMNS, len(originals))
    _, last_y = tile_position(len(originals) - 1, side, True)
    subtitle = "top: held-out original   bottom: reconstruction from the codes"
    large, small = font_module.load_default(15), font_module.load_default(12)
    text_width = max(large.getlength(title), small.getlength(subtitle))
    width = max(2 * MARGIN + columns * (side + GAP) - GAP, int(text_width) + 2 * MARGIN)
    canvas = image_module.new("RGB", (width, last_y + side + LABEL + MARGIN // 2), PAPER)
    draw = draw_module.Draw(canvas)
    draw.text((MARGIN, MARGIN - 6), title, fill=INK, font=large)
    draw.text((MARGIN, MARGIN + LABEL - 6), subtitle, fill=MUTED, font=small)
    for number, label in enumerate(labels):
        for images, below in ((originals, False), (restored, True)):
            tile = image_module.fromarray(np.ascontiguousarray(images[number].permute(1, 2, 0).numpy()))
            canvas.paste(tile, tile_position(number, side, below))
        x, y = tile_position(number, side, True)
        while small.getlength(label) > side and len(label) > 4:
            label = label[:-4] + "..."
        draw.text((x, y + side + 3), label, fill=MUTED, font=small)
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    replace_file(path, buffer.getvalue())


def curves(path: Path, history: Mapping[str, Sequence[Mapping[str, Any]]], codes: int, title: str) -> None:
    """Write a PNG with the loss terms, PSNR, usage and perplexity over the steps.

    Args:
        path: final name.
        history: "train" and "held_out", lists of {"step": ..., name: value}.
        codes: K, the most that perplexity can reach.
        title: on top.

    Raises:
        OSError: the folder cannot be written.
    """
    # Figure and canvas directly: pyplot would keep global state and look for a display.
    figure_module, canvas_module = require("matplotlib.figure"), require("matplotlib.backends.backend_agg")
    figure = figure_module.Figure(figsize=(11, 7), dpi=110)
    # Fixed margins: an automatic layout draws everything twice, and this is drawn after every evaluation.
    figure.subplots_adjust(left=0.07, right=0.98, top=0.89, bottom=0.07, hspace=0.33, wspace=0.16)
    canvas_module.FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    (losses, psnr), (usage, perplexity) = figure.subplots(2, 2)
    train, held_out = history["train"], history["held_out"]

    def draw(axes: Any, lines: Sequence[Mapping[str, Any]], name: str, **style: Any) -> None:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), **style)

    # The codebook and the commitment loss have the same value by definition (only their gradients differ): one curve.
    for name, label, color in (
        ("loss", "total", "C7"),
        (("l2", "mean squared error", "C0") if any("l2" in line for line in train) else
         ("reconstruction", "reconstruction (mean squared error)", "C0")),
        ("commitment", "quantization, mean (z - e)^2", "C1"),
        ("perceptual", "perceptual", "C4"),
        ("discriminator", "discriminator", "C2"),
    ):  # fmt: skip
        if any(line.get(name, 0) > 0 for line in train):  # else there is nothing to show on a logarithmic axis
            draw(losses, train, name, color=color, label=label, linewidth=1.2)
    losses.set(title="Loss terms (training batches)", yscale="log")
    for axes, name, heading in (
        (psnr, "psnr", "PSNR (dB)"),
        (usage, "usage", "Codebook usage (%)"),
        (perplexity, "perplexity", f"Perplexity (at most {codes})"),
    ):
        scale = 100 if name == "usage" else 1
        for lines, label, style in (
            (train, "training batches", {"color": "C0", "linewidth": 1.0, "alpha": 0.6}),
            (held_out, "held-out images", {"color": "C3", "marker": "o", "markersize": 4, "linewidth": 1.6}),
        ):
            scaled = [{"step": line["step"], name: line[name] * scale} for line in lines if np.isfinite(line[name])]
            draw(axes, scaled, name, label=label, **style)
        axes.set_title(heading)
    usage.set_ylim(0, 105)
    perplexity.set_ylim(bottom=0)
    for axes in (losses, psnr, usage, perplexity):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    replace_file(path, buffer.getvalue())
