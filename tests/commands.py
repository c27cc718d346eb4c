"""Our commands in processes of their own, some of them killed at a random moment.

They are forked from a process that has imported what they need (conftest.py says what): importing takes longer than the
little that they do in tests. Interpreters that start from nothing are in test_info.py and test_training.py.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch

from vqkernels.cli import main


class Command:
    """A command that runs, as soon as it is made.

    Args:
        arguments: of ``vqkernels``.
        variables: of the environment, beside those of this process.
        threads: of torch, one by default; what OpenMP reads in the environment it has read before the fork.
    """

    def __init__(self, arguments: Sequence[str], variables: dict[str, str] | None = None, threads: int = 1) -> None:
        forking = multiprocessing.get_context("forkserver")
        self.stdout, out = forking.Pipe(duplex=False)
        self.stderr, err = forking.Pipe(duplex=False)
        environment = dict(os.environ) | (variables or {})
        given = (list(arguments), environment, threads, out, err)
        self.process = forking.Process(target=_run, args=given, daemon=True)
        self.process.start()
        for end in (out, err):
            end.close()

    def finish(self) -> tuple[int | None, str, str]:
        """Wait for it: its exit status, and what it wrote to stdout and stderr (the latter has to fit into a pipe)."""
        out, err = ("".join(iter(lambda end=end: _read(end), "")) for end in (self.stdout, self.stderr))
        self.process.join()
        return self.process.exitcode, out, err


def _read(end: Connection) -> str:
    return os.read(end.fileno(), 4096).decode(errors="replace")


def _run(arguments: list[str], environment: dict[str, str], threads: int, out: Connection, err: Connection) -> None:
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is one between processes, which nobody removes after a kill
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    torch.set_num_threads(threads)
    sys.exit(main(arguments))


def kill_at_random(arguments: list[str], draw: random.Random, longest: float, *, working: bool) -> bool:
    """Run ``vqkernels`` and kill it with SIGKILL.

    Args:
        arguments: of the command; it shows a progress bar once it works.
        draw: for the moment.
        longest: seconds that it may have; a share of what a whole run takes on this machine now.
        working: counted from when the bar appeared; else from the start.

    Returns:
        Whether it was still running.
    """
    command, seen = Command(arguments), ""
    while working and "%|" not in seen and (part := _read(command.stderr)):
        seen += part
    command.process.join(draw.uniform(0.0, longest))
    running = command.process.is_alive()
    command.process.kill()
    command.process.join()
    return running
