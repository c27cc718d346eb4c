"""Measure saved models on images: reconstruction, rate, use of the codebook, diversity, stability, speed.

Called by :mod:`vqkernels.cli.evaluate`. Each image is measured by itself on one thread and results are added up in the
order of the images, so that a report depends on model and images only; what takes time is apart, under "timing".
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vqkernels._files import sweep
from vqkernels.models import TokenModel
from vqkernels.nn import statistics
from vqkernels.training import quality, stability
from vqkernels.training.config import TrainingError, require
from vqkernels.training.image_source import ImageSource, fit, open_source
from vqkernels.training.report import write_report
from vqkernels.training.run_folder import check_output, write_json
from vqkernels.training.tokenize import one_thread, open_saved, side_by_side

__all__ = ["EvaluateConfig", "evaluate"]

THUMBNAIL, PAIRS_OF = 16, 256


@dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation.

    Args:
        models: run folders or saved models; several are compared side by side.
        images: see :func:`vqkernels.training.image_source.open_source`; ``None``: the built-in photographs.
        output: folder of the report.
        size: scale the shorter side to this and cut out the middle square; ``None``: the images' own pixels.
        limit: at most so many images, spread evenly over all of them.
        column, split: of a data set.
        inception: file with Inception weights, for rFID.
        workers: images measured side by side; ``None``: as many as torch has threads.
        device: "auto", "cpu" or "cuda".

    Raises:
        TrainingError: a value is out of range.
    """

    models: tuple[str, ...]
    images: str | None = None
    output: str = "report"
    size: int | None = None
    limit: int | None = None
    column: str = "image"
    split: str = "train"
    inception: str | None = None
    workers: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.models:
            raise TrainingError("models is empty; expected at least one folder")
        for name in ("size", "limit", "workers"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise TrainingError(f"{name} is {value!r}; expected an integer of at least 1")
        if self.device not in ("auto", "cpu", "cuda"):
            raise TrainingError(f"device is {self.device!r}; expected auto, cpu or cuda")


def evaluate(config: EvaluateConfig, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure every model and write ``report.json`` and ``report.html``.

    A model that was measured already (the same model, images and options) is read from the output folder, so that the
    same call goes on after an interruption.

    Returns:
        What was written to report.json.

    Raises:
        TrainingError: something the user can put right.
    """
    for name in ("torchmetrics", "matplotlib", "jinja2", "tqdm"):
        require(name)
    folder = Path(config.output)
    check_output(folder)
    source = open_source(config.images, size=config.size, column=config.column, split=config.split)
    numbers = _spread(len(source.names), config.limit)
    opened = [(name, *open_saved(name, config.device)) for name in config.models]
    for _, model, _ in opened:
        if config.size is not None and config.size % model.multiple:
            raise TrainingError(f"size is {config.size}; expected a multiple of {model.multiple}")
    try:
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        sweep(folder)
        sweep(folder / "parts")
    except OSError as e:
        raise TrainingError(f"output {folder} cannot be written: {e.strerror or e}") from e
    results = []
    for (name, model, digest), label in zip(opened, _labels(config.models), strict=True):
        key = {"model": digest, "images": source.fingerprint, "numbers": [len(numbers), config.size, config.inception]}
        part = folder / "parts" / f"{digest[:16]}.json"
        found = _read_part(part, key)
        if found is None:
            found = _Measurement(model, source, numbers, config, label).run(say)
            write_json(part, {"key": key, "result": found})
        else:
            say(f"{label}: measured already")
        run = stability.read_run(Path(name))
        results.append({**found, "label": label, "folder": name, "digest": digest, "training": run})
        _say_summary(results[-1], say)
    report = {
        "images": {"what": source.what, "count": len(numbers), "skipped": [list(s) for s in source.skipped]},
        "models": results,
        "seeds": stability.over_seeds(results),
    }
    write_json(folder / "report.json", report)
    write_report(folder / "report.html", report, [model for _, model, _ in opened], source, config.size)
    say(f"wrote {folder / 'report.html'} and {folder / 'report.json'}")
    return report


def _spread(count: int, limit: int | None) -> list[int]:
    if limit is None or limit >= count:
        return list(range(count))
    return [round(i * (count - 1) / max(limit - 1, 1)) for i in range(limit)]


def _labels(models: Sequence[str]) -> list[str]:
    """Short and distinct: the last part of each path that tells them apart."""
    for parts in range(1, 10):
        labels = ["/".join(Path(m).parts[-parts:]) for m in models]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{i}: {m}" for i, m in enumerate(models)]


def _read_part(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    try:
        part = json.loads(path.read_text())
        return dict(part["result"]) if part["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or of another call: measure again


def _say_summary(found: dict[str, Any], say: Callable[[str], None]) -> None:
    mean = {name: value["mean"] for name, value in found["quality"].items()}
    use = found["streams"][0]
    say(
        f"{found['label']}: PSNR {mean['psnr']:.2f} dB, SSIM {mean['ssim']:.3f}, {found['bits_per_pixel']:.3f} bits "
        f"per pixel, usage {use['usage']:.1%}, perplexity {use['perplexity']:.0f} of {use['codes']}"
    )


class _One(NamedTuple):
    """What is kept of one image."""

    metrics: dict[str, float]
    counts: list[Tensor]
    tokens: frozenset[int]
    thumbnails: tuple[Tensor, Tensor]
    features: tuple[Tensor, Tensor] | None


class _Measurement:
    """One model on all images."""

    def __init__(
        self, model: TokenModel, source: ImageSource, numbers: list[int], config: EvaluateConfig, label: str
    ) -> None:
        self.model, self.source, self.numbers, self.config, self.label = model, source, numbers, config, label
        self.device = next(model.parameters()).device
        self.metrics = quality.ImageMetrics(self.device)
        self.extract = quality.fid_extractor(config.inception, self.device)

    def run(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Measure."""
        skipped, names, found = [], [], []
        progress = require("tqdm").tqdm(total=len(self.numbers), desc=self.label, unit="image", dynamic_ncols=True)
        with progress, one_thread() as threads, side_by_side(self.config.workers or threads) as pool:
            for number, one in zip(self.numbers, pool.map(self._measure, self.numbers), strict=True):
                if isinstance(one, str):
                    skipped.append([self.source.names[number], one])
                else:
                    names.append(self.source.names[number])
                    found.append(one)
                progress.update()
        for name, reason in skipped[:10]:
            say(f"skipped {name}: {reason}")
        if not found:
            raise TrainingError(
                f"none of the {len(self.numbers)} images could be measured; first reason: {skipped[0][1]}"
            )
        missing = dict(self.metrics.missing)
        if isinstance(self.extract, str):
            missing["rfid"] = self.extract
        summary = {name: _summary([one.metrics[name] for one in found if name in one.metrics])
                   for name in dict.fromkeys(n for one in found for n in one.metrics)}  # fmt: skip
        if "ms_ssim" not in summary:
            missing["ms_ssim"] = f"needs images of at least {quality.MS_SSIM_SIDE} pixels on each side"
        features = [one.features for one in found if one.features is not None]
        if len(features) >= 2:
            value = quality.frechet_distance(*(torch.stack(side) for side in zip(*features, strict=True)))
            summary["rfid"] = {"mean": value}
        few = found[:PAIRS_OF]
        return {
            "model": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "bits_per_pixel": self.model.bits_per_pixel,
            "quality": summary,
            "missing": missing,
            "images": [{"name": name, **one.metrics} for name, one in zip(names, found, strict=True)],
            "skipped": skipped,
            "streams": self._streams([torch.stack(c).sum(0) for c in zip(*(one.counts for one in found), strict=True)]),
            "diversity": {
                "pixels_of_originals": quality.pixel_diversity([one.thumbnails[0] for one in few]),
                "pixels_of_reconstructions": quality.pixel_diversity([one.thumbnails[1] for one in few]),
                "tokens": quality.token_diversity([one.tokens for one in few]),
            },
            "timing": self._timing(),
        }

    def _image(self, number: int) -> Tensor:
        return fit(self.source.load(number), self.model.multiple, self.config.size).to(self.device)

    @torch.inference_mode()
    def _measure(self, number: int) -> _One | str:
        try:
            image = self._image(number)
        except Exception as e:  # decoders raise whatever the damage makes them raise
            return " ".join(str(e).split()) or type(e).__name__
        tokens = self.model.encode_to_indices(image[None])
        restored = self.model.decode_indices(tokens)[0].float().clamp(0, 1)
        counts = []
        for stream, indices in zip(self.model.streams, tokens, strict=True):
            places = indices[0].reshape(-1, stream.per_place).T.contiguous()
            counts.append(statistics.count_codes(places, stream.codes).cpu())
        small = tuple(F.adaptive_avg_pool2d(x, THUMBNAIL).cpu() for x in (image, restored))
        features = None
        if not isinstance(self.extract, str):
            pair = torch.stack([image, restored]).mul(255).round().to(torch.uint8)
            a, b = self.extract(pair).cpu()
            features = (a, b)
        seen = frozenset(int(t) for t in tokens[-1].reshape(-1).tolist())
        return _One(self.metrics(image, restored), counts, seen, (small[0], small[1]), features)

    def _streams(self, counts: list[Tensor]) -> list[dict[str, Any]]:
        """Use of every stream; the codes of a place with several tokens are counted apart, and averaged."""
        found = []
        for stream, count in zip(self.model.streams, counts, strict=True):
            p = count.double() / count.sum(-1, keepdim=True).clamp(min=1)
            entropy = float((torch.special.entr(p).sum(-1) / torch.log(torch.tensor(2.0))).mean())
            found.append({
                "codes": stream.codes, "downsample": stream.downsample, "per_place": stream.per_place,
                "usage": float(statistics.usage(count).mean()),
                "perplexity": float(statistics.perplexity(count).mean()),
                "entropy_bits": entropy,
                "bits_per_pixel": stream.bits_per_pixel,
                "bits_per_pixel_entropy_coded": entropy * stream.per_place / stream.downsample**2,
                "counts": count.tolist(),
            })  # fmt: skip
        return found

    @torch.inference_mode()
    def _timing(self) -> dict[str, float]:
        """Images per second of one image after the other, with all threads; not reproducible, hence apart."""
        images = []
        for number in self.numbers[:8]:
            try:
                images.append(self._image(number)[None])
            except Exception:  # skipped above, with the reason
                continue
        tokens = [self.model.encode_to_indices(image) for image in images]
        spent = {}
        for name, work in (
            ("encode", lambda: [self.model.encode_to_indices(image) for image in images]),
            ("decode", lambda: [self.model.decode_indices(t) for t in tokens]),
        ):
            begin = time.perf_counter()
            result = work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            spent[f"{name}_images_per_second"] = len(result) / (time.perf_counter() - begin)
        spent["pixels_per_image"] = sum(i.shape[2] * i.shape[3] for i in images) / max(len(images), 1)
        return spent


def _summary(values: list[float]) -> dict[str, float]:
    x = torch.tensor(values, dtype=torch.float64)
    deviation = float(x.std()) if len(values) > 1 else 0.0
    return {"mean": float(x.mean()), "std": deviation, "least": float(x.min()), "most": float(x.max()), "count": len(x)}
