"""Fair timing: contestants take turns in one process, and every ratio is formed within a round.

Called by ``run``. A machine that slows down for a second slows all contestants of that round, so the median of the
per-round ratios is what we report; medians of times are given beside it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Series", "interleave", "quartiles", "ratios"]

Work = Callable[[], object]


@dataclass
class Series:
    """Seconds per call, one entry a round."""

    seconds: list[float]

    def summary(self) -> dict[str, float]:
        """Quartiles and the best round, in milliseconds."""
        return {**{k: 1e3 * v for k, v in quartiles(self.seconds).items()}, "best": 1e3 * min(self.seconds)}


def quartiles(values: list[float]) -> dict[str, float]:
    """Median, first and third quartile."""
    if len(values) < 2:
        return {"median": values[0], "q25": values[0], "q75": values[0]}
    q25, median, q75 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q25": q25, "q75": q75}


def ratios(ours: Series, peer: Series) -> dict[str, float]:
    """How many times as long the peer took, round by round."""
    return quartiles([p / o for o, p in zip(ours.seconds, peer.seconds, strict=True)])


def interleave(
    contestants: Mapping[str, Work],
    *,
    rounds: int,
    least: float = 0.02,
    budget: float = 30.0,
    fewest: int = 5,
) -> dict[str, Series]:
    """Time contestants in turns.

    Args:
        contestants: name -> one call of the work.
        rounds: how many turns each gets at most.
        least: seconds that a timed stretch lasts at least; short calls are repeated within it.
        budget: seconds after which no further round begins, once ``fewest`` are done.
        fewest: rounds that are done whatever they cost.

    Returns:
        For each contestant its seconds per call, all series of the same length.
    """
    repeat: dict[str, int] = {}
    for name, work in contestants.items():
        work()  # thread pools, caches, compilation
        start = time.perf_counter()
        work()
        once = time.perf_counter() - start
        repeat[name] = max(1, math.ceil(least / max(once, 1e-7)))
    names = list(contestants)
    series = {name: Series([]) for name in names}
    begin = time.perf_counter()
    for turn in range(rounds):
        if turn >= min(fewest, rounds) and time.perf_counter() - begin > budget:
            break
        # Each round starts with another contestant: nobody always runs after the one that leaves caches cold.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            work, count = contestants[name], repeat[name]
            # OpenMP workers of one library spin for a moment after its last parallel region: let them go to sleep.
            time.sleep(0.005)
            if count > 1:
                work()
            start = time.perf_counter()
            for _ in range(count):
                work()
            series[name].seconds.append((time.perf_counter() - start) / count)
    return series
