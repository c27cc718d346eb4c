"""Kill a command of ours at a random moment: while it starts, or in the middle of its work."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time


def kill_at_random(arguments: list[str], draw: random.Random, *, working: bool) -> bool:
    """Run ``vqkernels`` and kill it with SIGKILL.

    Args:
        arguments: of the command; it shows a progress bar once it works.
        draw: for the moment.
        working: up to a second after the bar appeared; else up to two seconds after the start.

    Returns:
        Whether it was still running.
    """
    command = [sys.executable, "-m", "vqkernels", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    seen = b""
    while working and b"%|" not in seen and (part := process.stderr.read1(4096)):  # type: ignore[attr-defined]
        seen += part
    deadline = time.monotonic() + draw.uniform(0.0, 1.0 if working else 2.0)
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return running
