"""Several processes as threads of one: what a process sums is compared with what the others do, and nothing hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from vqkernels.nn import _distributed

__all__ = ["Ranks"]


class Ranks:
    """Stands in for ``torch.distributed`` in :mod:`vqkernels.nn`; each thread of :meth:`run` is a process."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size = size
        self._local = threading.local()
        self._barrier = threading.Barrier(size)
        self._parts: list[Tensor] = [torch.empty(0)] * size
        monkeypatch.setattr(_distributed, "dist", self)

    def run(self, process: Callable[[int], Any]) -> list[Any]:
        """``process(rank)`` of every rank; the first error of any of them is raised."""

        def thread(rank: int) -> Any:
            self._local.rank = rank
            try:
                return process(rank)
            except BaseException:
                self._barrier.abort()  # nobody waits for a process that is gone
                raise

        with ThreadPoolExecutor(self.size) as pool:
            tasks = [pool.submit(thread, rank) for rank in range(self.size)]
        errors = [e for t in tasks if (e := t.exception()) is not None]
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return [task.result() for task in tasks]

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return hasattr(self._local, "rank")

    def get_rank(self) -> int:
        rank: int = self._local.rank
        return rank

    def get_world_size(self) -> int:
        return self.size

    def all_reduce(self, tensor: Tensor) -> None:
        self._parts[self._local.rank] = tensor.clone()
        self._barrier.wait(30)
        kinds = [(part.dtype, tuple(part.shape)) for part in self._parts]
        assert len(set(kinds)) == 1, f"the processes sum different things: {kinds}"
        total = torch.stack(self._parts).sum(0)
        self._barrier.wait(30)
        tensor.copy_(total)
