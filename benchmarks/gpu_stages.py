"""What is measured on a GPU, in plain records: search, a few rows, all levels, update, training step, ops, memory.

Called by ``gpu``. Nothing of ours is timed before its answer was compared with the float64 reference.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_cases, gpu_peers
from benchmarks.baselines import Contestant, Unavailable, Work
from benchmarks.cases import Case, shrink
from benchmarks.gpu_ops import ops
from benchmarks.gpu_residual import residual
from benchmarks.gpu_timing import Clock, captured, interleave
from benchmarks.timing import Series, quartiles, ratios

__all__ = ["STAGES", "Bench"]

Record = dict[str, Any]
# Rows compared with the reference on the device, and of those with the oracle on the CPU.
CHECKED, CHECKED_ON_CPU = 512, 16


class Bench:
    """One run: the device, its clock, its ceilings, and the seconds that are left."""

    def __init__(self, device: torch.device, peaks: dict[str, float], seconds: float, quick: bool = False) -> None:
        self.device, self.peaks, self.quick = device, peaks, quick
        self.clock = Clock(device)
        self.seconds, self.deadline = seconds, time.monotonic() + seconds
        self.failed: list[str] = []

    def left(self) -> float:
        """Seconds until the run should end."""
        return self.deadline - time.monotonic()

    def make(self, case: Case) -> tuple[Case, Tensor, Tensor]:
        """The case (tiny if ``quick``) and its tensors on the device."""
        case = shrink(case) if self.quick else case
        z, codebook = case.make()
        return case, z.to(self.device), codebook.to(self.device)

    def timed(self, work: dict[str, Work], budget: float) -> dict[str, Series]:
        """Device seconds of contestants in turns."""
        rounds = 3 if self.quick else 15
        return interleave(work, self.clock.once, rounds=rounds, budget=max(0.1, budget), fewest=3)

    def expected(self, case: Case, z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the checked rows and their indices by the reference here, itself checked on the CPU."""
        import vqkernels
        from vqkernels.testing import oracle_nearest

        rows = case.rows_of(z).reshape(-1, case.dim)
        generator = torch.Generator().manual_seed(2)
        chosen = torch.randperm(case.rows, generator=generator)[:CHECKED].sort().values
        part = rows[chosen.to(self.device)]
        indices, _ = vqkernels.nearest(part, codebook, metric=case.metric, backend="reference")
        few = slice(None, None, max(1, len(chosen) // CHECKED_ON_CPU))
        answer, _ = oracle_nearest(part[few].cpu(), codebook.cpu(), case.metric)
        if not indices[few].cpu().equal(answer):
            self.failed.append(f"the reference on {self.device} differs from the CPU's at {case.name}")
        return chosen.to(self.device), indices

    def admit(
        self, contestants: list[Contestant], case: Case, z: Tensor, codebook: Tensor, skipped: dict[str, str]
    ) -> tuple[dict[str, Work], dict[str, float], dict[str, str]]:
        """Contestants that run: their work, percent of wrong rows, titles. A wrong one of ours is not timed."""
        chosen, expected = self.expected(case, z, codebook)
        work: dict[str, Work] = {}
        wrong: dict[str, float] = {}
        for contestant in contestants:
            name = contestant.name
            try:
                function = contestant.make(case, z, codebook)
                indices = function().reshape(-1)
            except (Unavailable, NotImplementedError) as e:
                skipped[name] = str(e)
                continue
            except Exception as e:  # a peer that fails is a line in the table, not the end of the run
                skipped[name] = f"{type(e).__name__}: {str(e)[:160]}"
                if name.startswith("vqkernels"):
                    self.failed.append(f"{name} on {case.name}: {skipped[name]}")
                continue
            wrong[name] = 100.0 * float((indices[chosen] != expected).double().mean())
            if name.startswith("vqkernels") and wrong[name]:
                skipped[name] = f"NOT REPORTED: {wrong[name]:.3g} % of the checked rows are wrong"
                self.failed.append(f"{name} on {case.name}: wrong rows")
                continue
            work[name] = function
        return work, wrong, {c.name: c.title for c in contestants}


def _describe(case: Case) -> Record:
    keys = ("title", "size", "rows", "codes", "dim", "metric", "channel_first", "codebook", "source", "dtype")
    return {"case": case.name, **{key: getattr(case, key) for key in keys}}


def _first(names: Iterator[str] | list[str]) -> str | None:
    return next((name for name in names if name.startswith("vqkernels")), None)


def _speedup(timed: dict[str, Series]) -> dict[str, dict[str, float]]:
    """How many times as long the others take as the first of ours, round by round."""
    ours = _first(list(timed))
    return {} if ours is None else {k: ratios(timed[ours], timed[k]) for k in timed if k != ours}


def search(bench: Bench) -> Iterator[Record]:
    """Every case against every peer."""
    for name in gpu_cases.SEARCH:
        if bench.left() < 0.4 * bench.seconds:  # what the other stages need
            return
        case, z, codebook = bench.make(gpu_cases.BY_NAME[name])
        skipped: dict[str, str] = {}
        work, wrong, titles = bench.admit(gpu_peers.search(bench.device), case, z, codebook, skipped)
        timed = bench.timed(work, 0.05 * bench.seconds)
        # Products at 16-bit rate, or everything once over the bus: whichever takes longer.
        floors = {
            "products": 1e3 * case.flops / bench.peaks["fp16"],
            "bytes": 1e3 * case.floor_bytes / bench.peaks["bytes"],
        }
        results = {}
        for key, series in timed.items():
            median = quartiles(series.seconds)["median"]
            results[key] = {
                "title": titles[key],
                "ms": series.summary(),
                "tflops": case.flops / median / 1e12,
                "share_of_floor": max(floors.values()) / (1e3 * median),
                "wrong_rows_percent": wrong[key],
                "rows_per_chunk": gpu_peers.rows_per_chunk(case, bench.device, 4.3) if "vqk" not in key else None,
            }
        yield {
            **_describe(case),
            "rounds": len(next(iter(timed.values())).seconds) if timed else 0,
            "results": results,
            "speedup": _speedup(timed),
            "floors_ms": floors,
            "peaks": bench.peaks,
            "skipped": skipped,
        }
        del work, z, codebook
        _release(bench)


def few(bench: Bench) -> Iterator[Record]:
    """1 to 64 rows: device time, an eager loop's time per call, and one CUDA graph launch."""
    names = ("addmm-tf32", "compile", "flash-kmeans")
    for rows in gpu_cases.FEW_ROWS:
        if bench.left() < 0.3 * bench.seconds:
            return
        case, z, codebook = bench.make(replace(gpu_cases.FEW, name=f"few-{rows}", shape=(rows,)))
        skipped: dict[str, str] = {}
        contestants = [c for c in gpu_peers.search(bench.device) if c.name.startswith("vqkernels") or c.name in names]
        work, wrong, titles = bench.admit(contestants, case, z, codebook, skipped)
        timed = bench.timed(work, 3.0)
        results = {}
        for key, series in timed.items():
            calls = 3 if bench.quick else 100
            wall = statistics.median(bench.clock.wall(work[key], calls) for _ in range(3))
            graph: dict[str, Any] = {}
            if bench.device.type == "cuda":
                try:
                    replay = captured(work[key])
                    graph = {"graph_us": 1e6 * statistics.median(bench.clock.once(replay) for _ in range(9))}
                except Exception as e:
                    graph = {"no_graph": f"{type(e).__name__}: {str(e)[:120]}"}
            results[key] = {
                "title": titles[key],
                "device_us": 1e6 * quartiles(series.seconds)["median"],
                "eager_us": 1e6 * wall,
                "wrong_rows_percent": wrong[key],
                **graph,
            }
        yield {**_describe(case), "results": results, "speedup": _speedup(timed), "skipped": skipped}


def update(bench: Bench) -> Iterator[Record]:
    """Sums per code and moving averages, from indices that are there."""
    import vqkernels

    for name in gpu_cases.UPDATE:
        if bench.left() < 5:
            return
        case, z, codebook = bench.make(gpu_cases.BY_NAME[name])
        indices = torch.randint(case.codes, (case.rows,), generator=torch.Generator().manual_seed(3)).to(bench.device)
        rows = case.rows_of(z).reshape(-1, case.dim)
        expected = torch.zeros(case.codes, case.dim, dtype=torch.float64, device=bench.device)
        expected.index_add_(0, indices, rows.double())
        work, titles, skipped = {}, {}, {}
        for key, title, make in gpu_peers.update(bench.device):
            try:
                function = make(case, z, codebook, indices)
                sums = function()
            except Exception as e:
                skipped[key] = str(e) if isinstance(e, Unavailable) else f"{type(e).__name__}: {str(e)[:160]}"
                if key.startswith("vqkernels") and not isinstance(e, vqkernels.Unsupported):
                    bench.failed.append(f"{key} update: {skipped[key]}")
                continue
            error = float((sums.double() - expected).abs().amax() / expected.abs().amax())
            if key.startswith("vqkernels") and not (error < 1e-4 and function().equal(sums)):
                bench.failed.append(f"{key} update: relative error {error:.1e}, or two runs differ")
                continue
            work[key], titles[key] = function, title
        timed = bench.timed(work, 5.0)
        # Rows and codes once, state twice.
        floor = 1e3 * 4.0 * case.dim * (case.rows + 4 * case.codes) / bench.peaks["bytes"]
        results = {
            key: {
                "title": titles[key],
                "ms": series.summary(),
                "share_of_floor": floor / (1e3 * quartiles(series.seconds)["median"]),
            }
            for key, series in timed.items()
        }
        yield {**_describe(case), "results": results, "speedup": _speedup(timed), "floors_ms": {"bytes": floor},
               "skipped": skipped}  # fmt: skip
        _release(bench)


def train(bench: Bench) -> Iterator[Record]:
    """Forward, backward with a gradient from the decoder, EMA update, against vector-quantize-pytorch."""
    for name in gpu_cases.TRAIN:
        if bench.left() < 5:
            return
        case, z, codebook = bench.make(gpu_cases.BY_NAME[name])
        skipped: dict[str, str] = {}
        contestants = []
        for contestant in gpu_peers.train(bench.device):
            if contestant.needs(case) > 0.8 * gpu_peers._free(bench.device):
                skipped[contestant.name] = f"would need about {contestant.needs(case) / 2**30:.0f} GiB"
            else:
                contestants.append(contestant)
        work, wrong, titles = bench.admit(contestants, case, z, codebook, skipped)
        timed = bench.timed(work, min(8.0, bench.left()))
        results = {
            key: {"title": titles[key], "ms": series.summary(), "wrong_rows_percent": wrong[key]}
            for key, series in timed.items()
        }
        yield {**_describe(case), "results": results, "speedup": _speedup(timed), "skipped": skipped}
        del work, z, codebook
        _release(bench)


def memory(bench: Bench) -> Iterator[Record]:
    """How far one call raises the allocator's peak above inputs and parameters; outputs are counted."""
    if bench.device.type != "cuda":
        return
    for name in gpu_cases.MEMORY:
        if bench.left() < 5:
            return
        case, z, codebook = bench.make(gpu_cases.BY_NAME[name])
        results: dict[str, Record] = {}
        jobs = [("search", c) for c in gpu_peers.search(bench.device) if c.name in ("cdist", "addmm", "flash-kmeans")
                or c.name.startswith("vqkernels")] + [("train", c) for c in gpu_peers.train(bench.device)]  # fmt: skip
        for op, contestant in jobs:
            entry: Record = {"title": contestant.title, "op": op}
            key = f"{op}: {contestant.name}"
            if contestant.needs(case) > 0.8 * gpu_peers._free(bench.device):
                entry["not_run"] = f"would need about {contestant.needs(case) / 2**30:.0f} GiB"
                results[key] = entry
                continue
            try:
                entry["mib"] = _peak(contestant.make(case, z, codebook), bench) / 2**20
            except Exception as e:
                entry["not_run"] = str(e)[:160]
            results[key] = entry
            _release(bench)
        matrix = 4 * case.rows * case.codes / 2**20
        for key, entry in results.items():
            # An index of 8 bytes and a score per row, packed rows and codes, gradients: far below N x K.
            if "vqkernels" in key and entry.get("mib", 0.0) > 0.5 * matrix:
                bench.failed.append(f"{key} at {case.name} takes {entry['mib']:.0f} MiB; N x K floats are {matrix:.0f}")
        yield {**_describe(case), "matrix_mib": matrix, "results": results}


def _peak(work: Callable[[], Tensor], bench: Bench) -> int:
    for _ in range(2):
        work()
    bench.clock.wait()
    torch.cuda.reset_peak_memory_stats(bench.device)
    before = torch.cuda.memory_allocated(bench.device)
    result = work()
    bench.clock.wait()
    peak = torch.cuda.max_memory_allocated(bench.device) - before
    del result
    return int(peak)


def _release(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


# In this order: a run that is cut short has the searches.
STAGES: dict[str, Callable[[Bench], Iterator[Record]]] = {
    "search": search, "few": few, "residual": residual, "update": update, "train": train, "ops": ops, "memory": memory,
}  # fmt: skip
