"""A plugin of pytest for suites on a lent GPU: what is known is printed at once, and the end comes before the budget's.

``-p benchmarks.gpu_suite --suite-until TIME``, by the step "tests" of ``gpu``. Without it a suite that is killed leaves
a row of dots: pytest prints failures at its end. And a kernel that breaks a process' CUDA context would fail all that
follow.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

# Before the budget ends: for xdist to end workers that hang, and for pytest to print.
MARGIN = 20.0
# Lines of a failure that are printed at once; pytest prints all of it at its end.
SHOWN = 25


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--suite-until", type=float, default=None, help="when to have ended, with a report: seconds since 1970"
    )


def pytest_configure(config: pytest.Config) -> None:
    worker = hasattr(config, "workerinput")
    config.pluginmanager.register(Contexts(worker), "gpu-suite-contexts")
    if not worker:
        config.pluginmanager.register(Progress(config.getoption("--suite-until")), "gpu-suite-progress")


def broken() -> str | None:
    """Why the device takes no more calls from this process, or ``None``."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as e:
        return str(e).partition("\n")[0]
    return None


class Contexts:
    """Ends a process whose CUDA context is broken: xdist starts another, and other tests go on."""

    def __init__(self, worker: bool) -> None:
        self.worker, self.failed = worker, False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.failed = False
        result = yield
        if self.failed and (why := broken()) is not None:
            if self.worker:
                os._exit(3)
            item.session.shouldstop = f"the device takes no more calls after {item.nodeid}: {why}"
        return result


class Progress:
    """Prints failures as they come, and counts when time is up."""

    def __init__(self, until: float | None) -> None:
        self.until = until
        self.counts: Counter[str] = Counter()
        self.timer: threading.Timer | None = None
        self.terminal = os.dup(1)  # while a test runs, 1 is what pytest captures

    def say(self, text: str) -> None:
        os.write(self.terminal, f"{text}\n".encode())

    def pytest_sessionstart(self) -> None:
        # A shell's background job ignores Ctrl-C, and so would what it starts.
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.until is not None:
            self.timer = threading.Timer(max(1.0, self.until - MARGIN - time.time()), self.stop)
            self.timer.daemon = True
            self.timer.start()

    def pytest_sessionfinish(self) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
        if report.failed:
            lines = report.longreprtext.splitlines()
            self.say("\n".join([f"\nFAILED {report.nodeid} ({report.when})", *lines[-SHOWN:]]))

    def stop(self) -> None:
        """In the timer's thread: pytest and xdist end as after Ctrl-C."""
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(self.counts.items())) or "no test had ended"
        self.say(f"\nTIME IS UP: {counts}")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
