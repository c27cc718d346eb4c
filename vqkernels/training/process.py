"""What a run changes in its process, undone at the end: determinism, threads, backend, Ctrl-C.

Called by :mod:`vqkernels.training.loop` around the loop.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from vqkernels.training.config import TrainConfig, TrainingError, require

__all__ = [
    "Interrupt",
    "leave_signals_to_the_main_process",
    "make_accelerator",
    "process_settings",
    "seed_step",
]

# Checkpoints, moving averages and the gradient at the last layer need whole parameters.
SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


def seed_step(seed: int, step: int) -> None:
    """Seed torch for one step, so that a resumed run draws what an uninterrupted one would have drawn.

    Args:
        seed: of the run.
        step: 0 for the initial weights.
    """
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))


@contextlib.contextmanager
def process_settings(config: TrainConfig) -> Iterator[None]:
    """Deterministic algorithms, thread count and backend for the duration.

    Args:
        config: ``threads`` and ``backend`` are used.
    """
    threads, backend = torch.get_num_threads(), os.environ.get("VQKERNELS_BACKEND")
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    # cuBLAS reads this when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling every torch.empty costs time and changes nothing in a program that writes before it reads.
        memory.fill_uninitialized_memory = False
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.backend != "auto":
            # The environment, not the context variable: backward runs in autograd's own threads on a GPU.
            os.environ["VQKERNELS_BACKEND"] = config.backend
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
        torch.set_num_threads(threads)
        if backend is None:
            os.environ.pop("VQKERNELS_BACKEND", None)
        else:
            os.environ["VQKERNELS_BACKEND"] = backend


def make_accelerator(config: TrainConfig) -> Any:
    """An ``accelerate.Accelerator`` for this run.

    Args:
        config: ``device`` and ``precision`` are used.

    Raises:
        TrainingError: the device or the precision is not available here, or parameters would be sharded.
    """
    accelerate, state = require("accelerate"), require("accelerate.state")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(config.device, True):
        raise TrainingError(f"device is {config.device!r}, which torch cannot use on this machine")
    # accelerate keeps one precision per process; a second run in the same process may want another.
    state.AcceleratorState._reset_state(reset_partial_state=False)
    ddp = require("accelerate.utils").DistributedDataParallelKwargs(broadcast_buffers=False)
    try:
        found = accelerate.Accelerator(
            cpu=config.device == "cpu",
            mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
            kwargs_handlers=[ddp],
        )
    except (ValueError, RuntimeError) as e:
        raise TrainingError(f"precision {config.precision} on device {config.device}: {e}") from e
    kind = str(found.distributed_type).rpartition(".")[2]
    if kind in SHARDING:
        raise TrainingError(f"accelerate is configured for {kind}, which is not supported: the models are trained with "
                            "DDP (accelerate launch --multi_gpu)")  # fmt: skip
    return found


class Interrupt:
    """Turns the first Ctrl-C (or SIGTERM) into a flag that the loop reads; a second one acts at once.

    Used as a context manager; outside the main thread it does nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            # A signal that is ignored (nohup, a shell's background job) stays ignored.
            heard = [number for number in self.SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._old = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    def __exit__(self, *_: object) -> None:
        self._restore()


def leave_signals_to_the_main_process(worker: int) -> None:
    """In a process that loads images: whoever stops a whole group (a terminal, systemd, Slurm) means the training.

    The main process still gets the crops of its last step, saves, and then tells the others to end.
    """
    for number in Interrupt.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
