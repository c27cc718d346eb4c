"""A residual quantizer in eval, all levels in one search against one by one: ``python -m benchmarks.residual``.

Before anything is timed the indices of every level are compared with the float64 oracle on the residual that the level
was given. The floor is reading the codes once, as one sum over them, in the same turns. Writes
``results/<device>/residual.json``; takes about a minute.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CASES", "main"]


@dataclass(frozen=True)
class ResidualCase:
    """N rows, Q levels of K codes with D dims."""

    title: str
    rows: int
    levels: int
    codes: int
    dim: int


CASES: dict[str, ResidualCase] = {
    "frame-8": ResidualCase("Mimi, one frame", 1, 8, 2048, 256),
    "frame-32": ResidualCase("Mimi, one frame, all levels", 1, 32, 2048, 256),
    "batch-8": ResidualCase("Mimi, 16 streams", 16, 8, 2048, 256),
    "batch-32": ResidualCase("Mimi, 16 streams, all levels", 16, 32, 2048, 256),
    "second-8": ResidualCase("Mimi, 64 frames", 64, 8, 2048, 256),
    "encodec": ResidualCase("EnCodec, 64 s", 4800, 8, 1024, 128),
    "encodec-long": ResidualCase("EnCodec, 640 s", 48000, 8, 1024, 128),
}


class GateFailed(RuntimeError):
    """A level named a code that is not the nearest: there is nothing to report."""


def _modules(case: ResidualCase) -> tuple[Any, Any]:
    """A quantizer whose levels are searched at once, and a copy whose levels are asked one by one."""
    import torch

    import vqkernels

    class Asked(vqkernels.VectorQuantizer):
        """Of another class, so that nothing is known about what it does."""

    torch.manual_seed(1)
    rvq = vqkernels.ResidualVectorQuantizer(case.codes, case.dim, case.levels, decay=0.99).eval()
    for i in range(case.levels):
        rvq.level(i).codebook.normal_(std=0.8**i)
    other = copy.deepcopy(rvq)
    for level in other.layers:
        level.__class__ = Asked
    return rvq, other


def _plain(codebooks: list[Any], x: Any) -> Callable[[], Any]:
    """What one writes in PyTorch: rows (N, D)."""
    import torch

    def run() -> Any:
        residual, total, indices = x, torch.zeros_like(x), []
        for codes in codebooks:
            indices.append(torch.cdist(residual[None], codes[None])[0].argmin(-1))
            chosen = codes[indices[-1]]
            residual, total = residual - chosen, total + chosen
        return total, torch.stack(indices, -1)

    return run


def _gate(out: Any, codebooks: list[Any], x: Any) -> None:
    import torch

    from benchmarks.stages import ORACLE_WORK
    from vqkernels.testing import oracle_nearest

    count = min(len(x), max(64, int(ORACLE_WORK / 10 / sum(c.numel() for c in codebooks))))
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))[:count]
    residual, indices = x[chosen], out.indices.reshape(len(x), -1)[chosen]
    for level, codes in enumerate(codebooks):
        wrong = int((oracle_nearest(residual, codes)[0] != indices[:, level]).sum())
        if wrong:
            raise GateFailed(f"level {level}: {wrong} of {count} rows")
        residual = residual - codes[indices[:, level]]


def _measure(case: ResidualCase, rounds: int, seconds: float) -> dict[str, Any]:
    import torch

    from benchmarks.timing import interleave, ratios

    rvq, other = _modules(case)
    x = torch.randn(case.rows, case.dim)
    z = x.T.unsqueeze(0).contiguous()  # (1, D, T), as an encoder leaves it
    codebooks = [rvq.level(i).codebook for i in range(case.levels)]
    every = torch.stack(codebooks)
    with torch.no_grad():
        _gate(rvq(z), codebooks, x)
        contestants = {
            "plain": _plain(codebooks, x),
            "asked": lambda: other(z),
            "searched": lambda: rvq(z),
            "read": lambda: every.sum(),
        }
        series = interleave(contestants, rounds=rounds, budget=seconds, fewest=3)
    return {
        "title": case.title,
        "size": f"{case.rows} x {case.codes} x {case.dim}",
        "levels": case.levels,
        "ms": {who: s.summary() for who, s in series.items()},
        "speedup": {who: ratios(series["searched"], series[who]) for who in ("plain", "asked")},
        "read_share": ratios(series["searched"], series["read"]),
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.residual", description=__doc__.split("\n")[0])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=6.0, help="per case; at least 3 rounds (default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="instead of benchmarks/results/<device>")
    options = parser.parse_args(arguments)
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    from benchmarks import environment as env

    stamp = env.describe(options.threads) | {"commit": env.commit()}
    path = (options.results or env.results_folder()) / "residual.json"
    data = json.loads(path.read_text()) if path.exists() else {"kind": "residual", "cases": {}}
    failed = []
    for name in options.case:
        try:
            record = _measure(CASES[name], options.rounds, options.seconds)
        except GateFailed as e:
            failed.append(name)
            print(f"{name}: NOT REPORTED, the correctness gate failed: {e}")
            continue
        data["cases"][name] = {"case": name, **record, "environment": {**stamp, "date": env.now()}}
        env.write_json(path, data)
        ms = {who: f"{s['median']:.3f}" for who, s in record["ms"].items()}
        print(f"{name:<14} {ms}, {record['speedup']['asked']['median']:.2f}x level by level", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
