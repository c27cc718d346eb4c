"""Time on the device: CUDA events behind a full queue, a cold L2, and contestants that take turns.

Called by ``gpu_stages``. On CPU tensors (tests) the same functions read the host's clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from benchmarks.timing import Series

__all__ = ["Clock", "captured", "interleave", "peaks"]

Work = Callable[[], object]
# Cycles that the device sleeps before a timed call, so that the host has launched everything by the time it starts:
# half a millisecond or so. Without it a short call is the time that Python takes to launch it.
HEAD_START = 1_000_000


@dataclass
class Clock:
    """Seconds of one call on ``device``."""

    device: torch.device
    _flush: torch.Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            size = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 64 * 2**20)
            self._flush = torch.empty(2 * size, dtype=torch.int8, device=self.device)

    def once(self, work: Work, cold: bool = True) -> float:
        """Device seconds of one call: the queue is full when it starts, and no input is in L2 (``cold``)."""
        if self._flush is None:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if cold:
            self._flush.zero_()
        torch.cuda._sleep(HEAD_START)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end)

    def wall(self, work: Work, calls: int) -> float:
        """Host seconds per call of a loop, waiting once at its end: what an eager caller sees."""
        self.wait()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        self.wait()
        return (time.perf_counter() - start) / calls

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def interleave(
    contestants: Mapping[str, Work], time_of: Callable[[Work], float], *, rounds: int, budget: float, fewest: int = 5
) -> dict[str, Series]:
    """One timed call of each per round, each round starting with another one.

    Args:
        contestants: name -> one call.
        time_of: seconds of one call.
        rounds: at most.
        budget: seconds after which no further round begins once ``fewest`` are done.
        fewest: rounds done whatever they cost.
    """
    for work in contestants.values():
        for _ in range(2):  # compilation, allocator, clocks
            time_of(work)
    names = list(contestants)
    series = {name: Series([]) for name in names}
    begin = time.perf_counter()
    for turn in range(rounds):
        if turn >= min(fewest, rounds) and time.perf_counter() - begin > budget:
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            series[name].seconds.append(time_of(contestants[name]))
    return series


def captured(work: Work) -> Work:
    """``work`` as one CUDA graph launch.

    Raises:
        RuntimeError: it cannot be captured (it waits for the device, or allocates outside of torch).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def peaks(device: torch.device, quick: bool = False) -> dict[str, float]:
    """Ceilings of this device as torch reaches them: fp16, TF32 and fp32 products (FLOP/s), a large copy (bytes/s)."""
    clock = Clock(device)
    n = 64 if quick else 8192
    found = {}

    def median(work: Work) -> float:
        clock.once(work)
        return statistics.median(clock.once(work) for _ in range(7))

    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        for name, dtype, tf32 in (("fp16", torch.float16, False), ("tf32", torch.float32, True),
                                  ("fp32", torch.float32, False)):  # fmt: skip
            torch.backends.cuda.matmul.allow_tf32 = tf32
            a, b = torch.randn(2, n, n, device=device).to(dtype)
            out = torch.empty_like(a)
            found[name] = 2.0 * n**3 / median(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    source = torch.zeros((2**20 if quick else 2**30) // 4, device=device)
    target = torch.empty_like(source)
    found["bytes"] = 2.0 * source.numel() * 4 / median(lambda: target.copy_(source))
    return found
