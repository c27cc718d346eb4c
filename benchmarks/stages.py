"""The four measurements - search, training step, peak memory, scaling - each returning plain records for the JSON.

Called by ``run``. Nothing is timed before its answer was compared with the float64 oracle.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines, memory, peak
from benchmarks.cases import BY_NAME, Case, shrink
from benchmarks.timing import Series, interleave, quartiles, ratios

__all__ = ["GateFailed", "measure_memory", "measure_scaling", "measure_search", "measure_train"]

# Rows x codes x dims that the oracle may evaluate in float64 per case: a few seconds.
ORACLE_WORK = 3e9
# Dims at which the AVX2 kernels screen in int16 (kInt16LeastDims and kInt16MostDims of csrc/cpu/nearest.h).
INT16_DIMS = range(20, 8193)


class GateFailed(RuntimeError):
    """Our own indices differ from the oracle's: there is nothing to report."""


def oracle(case: Case, z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the rows that are checked, and their exact indices."""
    from vqkernels.testing import oracle_nearest

    rows = case.rows_of(z).reshape(-1, case.dim)
    count = min(case.rows, max(64, int(ORACLE_WORK / (case.codes * case.dim))))
    chosen = torch.randperm(case.rows, generator=torch.Generator().manual_seed(2))[:count].sort().values
    # A few rows at a time and dims in memory order: the same additions, without leaving the cache.
    columns = codebook.double().T.contiguous().T
    step = max(1, 2**16 // case.codes)
    parts = [oracle_nearest(part, columns, metric=case.metric)[0] for part in rows[chosen].split(step)]
    return chosen, torch.cat(parts)


def _wrong(indices: Tensor, chosen: Tensor, expected: Tensor) -> int:
    return int((indices[chosen] != expected).sum())


def _describe(case: Case) -> dict[str, Any]:
    return {
        "case": case.name,
        "title": case.title,
        "size": case.size,
        "rows": case.rows,
        "codes": case.codes,
        "dim": case.dim,
        "metric": case.metric,
        "channel_first": case.channel_first,
        "codebook": case.codebook,
        "source": case.source,
    }


def _floors(case: Case, isa: str, peaks: dict[str, float]) -> dict[str, float]:
    """Milliseconds that the machine's ceilings leave: products, running maximum, memory."""
    floors = {}
    if peaks.get(isa):
        floors["products"] = 1e3 * case.flops / peaks[isa]
    if peaks.get("max"):
        floors["maximum"] = 1e3 * case.rows * case.codes / peaks["max"]
    if peaks.get("bytes"):
        floors["bytes"] = 1e3 * case.floor_bytes / peaks["bytes"]
    return floors


def _best_isa(case: Case) -> str:
    """The instruction set that runs if none is forced: it depends on the shape."""
    from vqkernels import _native

    if _native.unavailable():
        return "reference"
    return _native.ISAS[_native.lib().vqk_cpu_nearest_isa(case.codes, case.dim)]


def _ceiling_of(name: str, best: str, dim: int) -> str:
    """Which ceiling a contestant is held against: that of the instructions that it runs on."""
    if not name.startswith("vqkernels"):
        return "avx512"
    isa = best if name == "vqkernels" else name.removeprefix("vqkernels-")
    return "avx2int16" if isa == "avx2" and dim in INT16_DIMS else isa


def measure_search(
    name: str,
    peers: list[str] | None,
    isas: list[str],
    rounds: int,
    budget: float,
    peaks: dict[str, float],
    quick: bool,
) -> dict[str, Any]:
    """Time the search of one case.

    Raises:
        GateFailed: an index of ours is not the oracle's.
    """
    case = shrink(BY_NAME[name]) if quick else BY_NAME[name]
    z, codebook = case.make()
    chosen, expected = oracle(case, z, codebook)
    work, wrong, titles, skipped = {}, {}, {}, {}
    for contestant in baselines.search_peers(peers, isas):
        if contestant.needs(case) > 0.6 * memory.available():
            skipped[contestant.name] = "does not fit into memory"
            continue
        try:
            function = contestant.make(case, z, codebook)
        except baselines.Unavailable as e:
            skipped[contestant.name] = str(e)
            continue
        wrong[contestant.name] = _wrong(function(), chosen, expected)
        if contestant.name.startswith("vqkernels") and wrong[contestant.name]:
            raise GateFailed(f"{contestant.name} on {name}: {wrong[contestant.name]} of {len(chosen)} rows are wrong")
        work[contestant.name], titles[contestant.name] = function, contestant.title
    timed = interleave(work, rounds=rounds, budget=budget)
    best = _best_isa(case)
    results = {}
    for key, series in timed.items():
        median = quartiles(series.seconds)["median"]
        results[key] = {
            "title": titles[key],
            "ms": series.summary(),
            "gflops": case.flops / median / 1e9,
            "fraction_of_peak": peak.fraction(case.flops, median, _ceiling_of(key, best, case.dim), peaks),
            "peak": _ceiling_of(key, best, case.dim),
            "wrong_rows_percent": 100 * wrong[key] / len(chosen),
        }
    return {
        **_describe(case),
        "isa": best,
        "checked_rows": len(chosen),
        "rounds": len(next(iter(timed.values())).seconds),
        "results": results,
        "speedup": {key: ratios(timed["vqkernels"], timed[key]) for key in timed if key != "vqkernels"},
        # The chart's unit: how many times as fast as torch.cdist + argmin.
        "over_cdist": {key: ratios(timed[key], timed["cdist"]) for key in timed} if "cdist" in timed else {},
        # A forced instruction set has ratios of its own.
        "speedup_by_isa": {
            key.removeprefix("vqkernels-"): {
                p: ratios(timed[key], timed[p]) for p in timed if not p.startswith("vqkernels")
            }
            for key in timed
            if key.startswith("vqkernels-")
        },
        "floors_ms": _floors(case, _ceiling_of("vqkernels", best, case.dim), peaks),
        "peaks": peaks,
        "skipped": skipped,
    }


def measure_train(name: str, rounds: int, budget: float, peaks: dict[str, float], quick: bool) -> dict[str, Any]:
    """Time forward, backward and update, against vector-quantize-pytorch with the same settings.

    Raises:
        GateFailed: an index of our first step is not the oracle's.
    """
    case = shrink(BY_NAME[name]) if quick else BY_NAME[name]
    z, codebook = case.make()
    chosen, expected = oracle(case, z, codebook)
    work, wrong, titles, skipped = {}, {}, {}, {}
    for contestant in [c for pair in baselines.train_peers(case) for c in pair]:
        if contestant.needs(case) > 0.6 * memory.available():
            skipped[contestant.name] = "does not fit into memory"
            continue
        try:
            step = contestant.make(case, z, codebook)
        except baselines.Unavailable as e:
            skipped[contestant.name] = str(e)
            continue
        wrong[contestant.name] = _wrong(step(), chosen, expected)
        if contestant.name.startswith("vqkernels") and wrong[contestant.name]:
            raise GateFailed(f"{contestant.name} on {name}: {wrong[contestant.name]} of {len(chosen)} rows are wrong")
        work[contestant.name], titles[contestant.name] = step, contestant.title
    timed: dict[str, Series] = {}
    speedup = {}
    for ours, peer in [(a.name, b.name) for a, b in baselines.train_peers(case)]:
        pair = interleave({k: work[k] for k in (ours, peer) if k in work}, rounds=rounds, budget=budget)
        timed |= pair
        if peer in pair:
            speedup[peer] = ratios(pair[ours], pair[peer])
    results = {
        key: {
            "title": titles[key],
            "ms": series.summary(),
            "rounds": len(series.seconds),
            "wrong_rows_percent": 100 * wrong[key] / len(chosen),
        }
        for key, series in timed.items()
    }
    return {
        **_describe(case),
        "isa": _best_isa(case),
        "checked_rows": len(chosen),
        "results": results,
        "speedup": speedup,
        "peaks": peaks,
        "skipped": skipped,
    }


def measure_memory(name: str, threads: int, quick: bool) -> dict[str, Any]:
    """Peak memory that one search and one training step add to the process, each contestant in its own process."""
    case = shrink(BY_NAME[name]) if quick else BY_NAME[name]
    results: dict[str, dict[str, Any]] = {}
    for op, names in (
        ("search", ("vqkernels", "cdist", "addmm", "faiss")),
        ("train", ("vqkernels-ema", "vqtorch-ema", "vqkernels-learn", "vqtorch-learn")),
    ):
        table = baselines.SEARCH if op == "search" else baselines.TRAIN
        for contestant in (table[n] for n in names):
            if case.metric == "cosine" and contestant.name.endswith("-learn"):
                continue
            entry: dict[str, Any] = {"title": contestant.title, "op": op}
            needed = contestant.needs(case)
            if needed > 0.6 * memory.available():
                entry["not_run"] = f"would need about {needed / 2**30:.0f} GiB"
            else:
                size, reason = memory.measure(op, name, contestant.name, threads, quick)
                entry |= {"not_run": reason} if size is None else {"mib": size / 2**20}
            results[contestant.name] = entry
    return {
        **_describe(case),
        "isa": _best_isa(case),
        "matrix_mib": 4 * case.rows * case.codes / 2**20,
        "results": results,
    }


def measure_scaling(rounds: int, budget: float, quick: bool) -> list[dict[str, Any]]:
    """Cost against N, K and D, one at a time, and the exponent of a straight line through the logarithms."""
    import vqkernels

    base = {"rows": 256, "codes": 128, "dim": 32} if quick else {"rows": 16384, "codes": 4096, "dim": 64}
    sweeps = {
        "rows": [128, 256, 512] if quick else [2**i for i in range(12, 18)],
        "codes": [64, 128, 256] if quick else [2**i for i in range(9, 16)],
        "dim": [32, 64, 128] if quick else [2**i for i in range(5, 11)],
    }
    os.environ["VQKERNELS_ISA"] = ""
    records = []
    for axis, values in sweeps.items():
        work = {}
        for value in values:
            size = {**base, axis: value}
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(size["rows"], size["dim"], generator=generator)
            codebook = torch.randn(size["codes"], size["dim"], generator=generator)
            work[str(value)] = lambda x=x, codebook=codebook: vqkernels.nearest(x, codebook)
        timed = interleave(work, rounds=rounds, budget=budget)
        milliseconds = [series.summary() for series in timed.values()]
        exponent = _slope([math.log(v) for v in values], [math.log(m["median"]) for m in milliseconds])
        fixed = {key: value for key, value in base.items() if key != axis}
        records.append({"case": axis, "values": values, "fixed": fixed, "ms": milliseconds, "exponent": exponent})
        del work
    return records


def _slope(x: list[float], y: list[float]) -> float:
    """Least squares."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)
