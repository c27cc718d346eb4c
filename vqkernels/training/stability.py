"""How steady a training was: statistics of its curves, and the spread over runs that differ in their seed only.

Called by :mod:`vqkernels.training.evaluate`; reads what ``vqkernels train`` left in the run folder.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["curve_statistics", "over_seeds", "read_run"]

# What may differ between runs that count as the same experiment.
FREE = ("seed", "output", "log_every", "eval_every", "checkpoint_every", "workers", "tensorboard", "threads", "device")


def read_run(folder: Path) -> dict[str, Any] | None:
    """Config, curves and their statistics of the run that made a model; ``None`` if the folder is no run's."""
    folder = folder.parent if folder.name == "model" and (folder.parent / "metrics.json").exists() else folder
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        config = json.loads((folder / "config.json").read_text())
        history = metrics["history"]
        return {"config": config, "history": history, "curve": curve_statistics(history["train"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def curve_statistics(lines: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Statistics of the curve of the total loss.

    Returns:
        ``final``: mean over the last tenth of the points; ``noise``: their standard deviation relative to it;
        ``largest_rise``: the largest factor between a point and the least before it; ``usage_trend``: change of the
        usage over the second half of training. ``None`` with fewer than four points.

    Example:
        >>> lines = [{"loss": x, "usage": 0.5} for x in (4.0, 2.0, 3.0, 1.0)]
        >>> curve_statistics(lines)["largest_rise"]
        1.5
    """
    losses = [float(line["loss"]) for line in lines if math.isfinite(line.get("loss", math.nan))]
    if len(losses) < 4:
        return None
    tail = losses[-max(2, len(losses) // 10) :]
    final, least, rise = statistics.fmean(tail), losses[0], 1.0
    for loss in losses[1:]:
        rise = max(rise, loss / least if least > 0 else 1.0)
        least = min(least, loss)
    usage = [float(line["usage"]) for line in lines if "usage" in line]
    half = usage[len(usage) // 2 :]
    return {
        "final": final,
        "noise": statistics.pstdev(tail) / final if final > 0 else 0.0,
        "largest_rise": rise,
        "usage_trend": half[-1] - half[0] if half else 0.0,
    }


def over_seeds(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread of PSNR, SSIM and usage over models whose training differed in the seed only.

    Returns:
        One entry per experiment with at least two seeds: ``labels``, ``seeds``, and per metric ``mean`` and ``std``.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if (run := result.get("training")) is not None:
            key = json.dumps({k: v for k, v in run["config"].items() if k not in FREE}, sort_keys=True)
            groups.setdefault(key, []).append(result)
    found = []
    for members in groups.values():
        seeds = [m["training"]["config"].get("seed") for m in members]
        if len(set(seeds)) < 2:
            continue
        values = {
            "psnr": [m["quality"]["psnr"]["mean"] for m in members],
            "ssim": [m["quality"]["ssim"]["mean"] for m in members],
            "usage": [m["streams"][0]["usage"] for m in members],
        }
        entry: dict[str, Any] = {"labels": [m["label"] for m in members], "seeds": seeds}
        entry |= {n: {"mean": statistics.fmean(v), "std": statistics.stdev(v)} for n, v in values.items()}
        found.append(entry)
    return found
