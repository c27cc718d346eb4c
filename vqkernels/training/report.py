"""The evaluation as one HTML file that opens offline: tables, pictures and plots are inside it.

Called by :mod:`vqkernels.training.evaluate`; the page itself is ``report.html.j2`` beside this file.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vqkernels
from vqkernels._files import replace_file
from vqkernels.models import TokenModel
from vqkernels.training import figures
from vqkernels.training.config import require
from vqkernels.training.image_source import ImageSource, fit

__all__ = ["write_report"]

SHOWN, WORST, SIDE = 6, 2, 192


def _more(value: float) -> float:
    return value


def _less(value: float) -> float:
    return -value


def _near_one(value: float) -> float:
    return -abs(math.log(max(value, 1e-12)))


# name in the results, heading, digits, what is better, what it says
COLUMNS = (
    ("psnr", "PSNR, dB", 2, _more, "mean over images; 1 dB is 21 % less squared error"),
    ("ssim", "SSIM", 4, _more, "structural similarity, 1 is equal"),
    ("ms_ssim", "MS-SSIM", 4, _more, "the same over five scales"),
    ("mse", "MSE", 5, _less, "of values in [0, 1]"),
    ("sharpness", "sharpness", 3, _near_one, "variance of the Laplacian, of the original's: below 1 is blurred"),
    ("lpips", "LPIPS", 4, _less, "learned perceptual distance"),
    ("rfid", "rFID", 2, _less, "Fréchet distance of Inception features"),
)


def write_report(
    path: Path,
    report: dict[str, Any],
    models: Sequence[TokenModel],
    source: ImageSource,
    size: int | None,
) -> None:
    """Write the page in one step.

    Args:
        path: final name.
        report: what :func:`vqkernels.training.evaluate.evaluate` found.
        models: in the order of the report.
        source, size: of the images.

    Raises:
        OSError: the folder cannot be written.
    """
    results = report["models"]
    page = require("jinja2").Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8")
    )  # fmt: skip
    labels = [r["label"] for r in results]
    trained = [(r["label"], r["training"]) for r in results if r["training"] is not None]
    text = page.render(
        version=vqkernels.__version__,
        images=report["images"],
        models=results,
        rows=_rows(results),
        missing=_missing(results),
        pictures=_pictures(results, models, source, size),
        use=_use(results),
        maps=[_maps(r, m) for r, m in zip(results, models, strict=True)],
        curves=_inline(figures.curves(trained)) if trained else None,
        seeds=report["seeds"],
        labels=labels,
    )
    replace_file(path, text.encode())


def _inline(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per metric, a cell per model; the best of several is marked."""
    rows: list[dict[str, Any]] = []

    def add(
        name: str, note: str, values: Sequence[float | None], digits: int, better: Callable[[float], float] | None
    ) -> None:
        known = [v for v in values if v is not None]
        if not known:
            return
        best = None if better is None or len(set(known)) < 2 else max(known, key=better)
        cells = [{"text": "–" if v is None else f"{v:.{digits}f}", "best": v is not None and v == best} for v in values]
        rows.append({"name": name, "note": note, "cells": cells})

    for key, name, digits, better, note in COLUMNS:
        add(name, note, [r["quality"].get(key, {}).get("mean") for r in results], digits, better)
    add("PSNR, spread", "standard deviation over images", [r["quality"]["psnr"]["std"] for r in results], 2, None)
    add("bits per pixel", "tokens as they are", [r["bits_per_pixel"] for r in results], 4, _less)
    coded = [sum(s["bits_per_pixel_entropy_coded"] for s in r["streams"]) for r in results]
    add("bits per pixel, entropy coded", "at the entropy of these images' tokens", coded, 4, _less)
    for i in range(max(len(r["streams"]) for r in results)):
        streams = [r["streams"][i] if i < len(r["streams"]) else None for r in results]
        which = f", stream {i}" if max(len(r["streams"]) for r in results) > 1 else ""
        add(f"codes{which}", "K", [s and s["codes"] for s in streams], 0, None)
        add(f"usage{which}, %", "codes chosen at least once", [s and 100 * s["usage"] for s in streams], 1, _more)
        add(
            f"perplexity{which}",
            "equally frequent codes of the same entropy",
            [s and s["perplexity"] for s in streams],
            1,
            _more,
        )
        add(f"entropy{which}, bits", "per token", [s and s["entropy_bits"] for s in streams], 2, None)
    kept = [
        r["diversity"]["pixels_of_reconstructions"] / max(r["diversity"]["pixels_of_originals"], 1e-12) for r in results
    ]
    add(
        "diversity kept, %",
        "mean distance of pairs of reconstructions, of the originals'",
        [100 * k for k in kept],
        1,
        None,
    )
    add(
        "token diversity",
        "mean Jaccard distance of pairs of images",
        [r["diversity"]["tokens"] for r in results],
        3,
        None,
    )
    add("parameters, million", "", [r["parameters"] / 1e6 for r in results], 2, None)
    for what in ("encode", "decode"):
        speed = [r["timing"][f"{what}_images_per_second"] for r in results]
        add(f"{what}, images/s", "one image at a time, on this machine", speed, 1, _more)
    return rows


def _missing(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    names = {key: name for key, name, *_ in COLUMNS}
    return {names.get(k, k): reason for r in results for k, reason in r["missing"].items()}


@torch.inference_mode()
def _pictures(
    results: Sequence[dict[str, Any]], models: Sequence[TokenModel], source: ImageSource, size: int | None
) -> list[dict[str, Any]]:
    """Some images spread over the set, and those with the lowest PSNR of the first model: all models side by side."""
    measured = results[0]["images"]
    spread = [round(i * (len(measured) - 1) / max(SHOWN - 1, 1)) for i in range(min(SHOWN, len(measured)))]
    worst = sorted(range(len(measured)), key=lambda i: measured[i]["psnr"])[:WORST]
    places = {name: i for i, name in enumerate(source.names)}
    found = []
    for index in dict.fromkeys([*spread, *worst]):
        name = measured[index]["name"]
        tiles = []
        original = None
        for result, model in zip(results, models, strict=True):
            image = _middle(fit(source.load(places[name]), model.multiple, size), model.multiple)
            device = next(model.parameters()).device
            tokens = model.encode_to_indices(image[None].to(device))
            restored = model.decode_indices(tokens)[0].float().clamp(0, 1).cpu()
            original = original or _inline(figures.png(_bytes(image)))
            psnr = -10 * torch.log10((restored - image).double().square().mean().clamp(min=1e-10))
            tiles.append({
                "label": result["label"], "psnr": float(psnr), "image": _inline(figures.png(_bytes(restored))),
                "error": _inline(figures.png(figures.error_map(image, restored))),
            })  # fmt: skip
        found.append({"name": name, "original": original, "tiles": tiles, "worst": index in worst})
    return found


def _middle(image: Tensor, multiple: int) -> Tensor:
    """At most SIDE pixels on each side, from the middle."""
    sides = [min(side, max(SIDE // multiple, 1) * multiple) for side in image.shape[1:]]
    top, left = (image.shape[1] - sides[0]) // 2, (image.shape[2] - sides[1]) // 2
    return image[:, top : top + sides[0], left : left + sides[1]]


def _bytes(image: Tensor) -> Tensor:
    return image.mul(255).round().clamp(0, 255).to(torch.uint8)


def _use(results: Sequence[dict[str, Any]]) -> str:
    lines = []
    for result in results:
        for i, stream in enumerate(result["streams"]):
            for p, counts in enumerate(stream["counts"]):
                which = f" stream {i}" if len(result["streams"]) > 1 else ""
                which += f" token {p}" if stream["per_place"] > 1 else ""
                lines.append((result["label"] + which, counts))
    return _inline(figures.use_of_codes(lines[:10]))


def _maps(result: dict[str, Any], model: TokenModel) -> list[str]:
    """A map per codebook; coloured by use where codebooks and counted tokens match one to one."""
    books = figures.codebooks(model)
    counts = [c for stream in result["streams"] for c in stream["counts"]]
    matched = len(books) == len(counts) and all(
        len(c) == len(codes) for c, (_, codes) in zip(counts, books, strict=True)
    )
    return [
        _inline(figures.map_of_codes(codes, counts[i] if matched else None, f"{result['label']}: {name}"))
        for i, (name, codes) in enumerate(books[:8])
    ]
