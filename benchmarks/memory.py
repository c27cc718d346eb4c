"""Peak memory of one call, measured in a process of its own: how far the resident set rises above where it stood.

``run --op memory`` calls :func:`measure`, which starts ``python -m benchmarks.memory OP CASE CONTESTANT`` once per
contestant. Before the measured call the contestant runs on a tiny problem, so that loading a library, starting threads
or compiling is not counted; parameters and inputs exist already; outputs are counted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.cases import BY_NAME, Case, shrink
from benchmarks.environment import ROOT

__all__ = ["available", "measure"]


def _status(key: str) -> int:
    """A size of /proc/self/status, in bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, key
    return 1024 * int(found.group(1))


def available() -> int:
    """Bytes that can be allocated now without swapping."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return 1024 * int(found.group(1)) if found else 0


def measure(op: str, case: str, contestant: str, threads: int, quick: bool = False) -> tuple[int | None, str | None]:
    """Bytes by which one call raises the peak of the process.

    Returns:
        The bytes, or ``None`` and the reason.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None, "peak memory is read from /proc (Linux)"
    # Every larger block is mapped and unmapped by itself: memory that was freed before cannot hide a new allocation.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.memory", op, case, contestant, str(threads), str(int(quick))]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    if run.returncode != 0:
        lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
        return None, lines[-1][:200]
    result: dict[str, int] = json.loads(run.stdout.splitlines()[-1])
    return result["bytes"], None


def _main(op: str, name: str, contestant: str, threads: str, quick: str) -> None:
    import torch

    from benchmarks import baselines

    torch.set_num_threads(int(threads))
    case: Case = BY_NAME[name]
    if quick == "1":
        case = shrink(case)
    table = baselines.SEARCH if op == "search" else baselines.TRAIN
    make = table[contestant].make
    tiny = replace(case, shape=tuple(2 for _ in case.shape), codes=16)
    for _ in range(2):
        make(tiny, *tiny.make())()
    z, codebook = case.make()
    work = make(case, z, codebook)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS
    before = _status("VmRSS")
    result = work()
    print(json.dumps({"bytes": max(0, _status("VmHWM") - before)}))
    del result


if __name__ == "__main__":
    _main(*sys.argv[1:])
