"""Steps of the GPU driver as processes: each with a budget, none that can stop the others or be waited for in vain.

Called by ``gpu``, which has the list of them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.gpu_blocks import CRASHED

__all__ = ["UNCHECKED", "Outcome", "Step", "run_steps", "say", "summary"]

# In the note of a step that was skipped although it matters: the summary repeats it.
UNCHECKED = "NOTHING WAS CHECKED"
# After a kill: what a process that hangs in a driver may take, and what it left in the pipe.
GRACE = 10.0


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: what ``--steps`` takes.
        seconds: its budget.
        command: its arguments after the options are known; a string is the reason why there is nothing to run.
        about: for ``--help`` and the summary.
        elastic: it takes what the steps before it left over.
        cannot: what it prints where it cannot work at all; then it was skipped and has found nothing.
    """

    name: str
    seconds: float
    command: Callable[[argparse.Namespace, float], list[str] | str]
    about: str
    elastic: bool = False
    cannot: str | None = None


@dataclass
class Outcome:
    """What became of a step: ``ok``, ``FAILED``, ``OUT OF TIME`` or ``skipped``."""

    step: str
    status: str
    seconds: float
    note: str


def _ruled_out(outcome: Outcome) -> str | None:
    """What VQKERNELS_CUDA_SCREEN must be after "blocks": a screen that hangs or crashes would end every step."""
    if outcome.status == "OUT OF TIME":
        return "mma"  # mma.sync has no barriers that could wait for ever
    if CRASHED not in outcome.note:
        return None  # one that is wrong is left out by the library's own self-test
    return "float64" if f"mma.sync {CRASHED}" in outcome.note else "mma"


def run_steps(
    steps: list[Step],
    options: argparse.Namespace,
    log: Any,
    total: float,
    save: Callable[[list[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Run the steps in order; one that fails does not stop the others, one that is cut off says so.

    Args:
        steps: what to run.
        options: handed to their commands.
        log: an open file; everything goes there and to the terminal.
        total: seconds for all of them together; a step gets its own budget or what is left of that.
        save: called after each step with what is known by then.
    """
    begin = time.monotonic()
    outcomes: list[Outcome] = []
    environment = os.environ | {"VQKERNELS_TEST_DEVICE": options.device, "PYTHONUNBUFFERED": "1"}
    if (options.output / "tuned").is_dir() or any(s.name == "tune" for s in steps):
        environment["VQKERNELS_TUNED"] = str(options.output / "tuned")
    for i, step in enumerate(steps):
        left = total - (time.monotonic() - begin)
        spare = max(0.0, left - sum(s.seconds for s in steps[i:])) if step.elastic else 0.0
        left = min(step.seconds + spare, left)
        if step.name == "report":  # seconds, and without it the rest is hard to read
            left = step.seconds
        command = step.command(options, left) if left > 1 else "no time left"
        if isinstance(command, str):
            status = "OUT OF TIME" if left <= 1 else "skipped"
            say(log, f"\n=== {step.name}: {status}: {command}")
            outcomes.append(Outcome(step.name, status, 0.0, command))
            save(outcomes)
            continue
        say(log, f"\n=== {step.name}: {step.about} (at most {left:.0f} s)")
        start = time.monotonic()
        status, note = _run(command, environment, left, log, step.cannot)
        outcomes.append(Outcome(step.name, status, time.monotonic() - start, note))
        save(outcomes)
        if step.name == "blocks" and (best := _ruled_out(outcomes[-1])) is not None:
            environment["VQKERNELS_CUDA_SCREEN"] = best
            say(log, f"!!! {note}: every step from here on runs with VQKERNELS_CUDA_SCREEN={best}")
    return outcomes


def _run(
    command: list[str], environment: dict[str, str], seconds: float, log: Any, cannot: str | None = None
) -> tuple[str, str]:
    """One process and those that it starts; its last line is the note."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        errors="replace", start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    out, last, refused = process.stdout, [""], [""]

    def read() -> None:
        with contextlib.suppress(ValueError):  # the pipe was closed
            for line in out:
                say(log, line.rstrip("\n"))
                last[0] = line.strip() or last[0]
                if cannot is not None and cannot in line:
                    refused[0] = line.strip()

    # A reader of its own: a process that left the group, or that the driver holds, may keep the pipe open for ever.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
    with contextlib.suppress(ProcessLookupError):  # children too, also of a process that has ended
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    reader.join(GRACE)
    if code is None:
        return "OUT OF TIME", f"killed after {seconds:.0f} s"
    if code == 0:
        return "ok", last[0]
    if refused[0]:
        return "skipped", f"{refused[0]}: {UNCHECKED}"
    return "FAILED", f"exit status {code}: {last[0]}"


def say(log: Any, text: str) -> None:
    """To the terminal and the log."""
    with contextlib.suppress(BrokenPipeError):
        print(text, flush=True)
    with contextlib.suppress(ValueError):  # a reader that was given up, after the log was closed
        log.write(text + "\n")
        log.flush()


def summary(outcomes: list[Outcome]) -> str:
    """A line for each step."""
    lines = [f"  {o.step:<10} {o.status:<12} {o.seconds:6.0f} s  {o.note[:100]}" for o in outcomes]
    loud = [f"  !!! {o.step}: {o.note}" for o in outcomes if UNCHECKED in o.note]
    return "\n".join(["", "summary", *lines, *loud])
