"""The CUDA kernels' own source, executed on the host: the files hosted_*.py, and what the execution must notice."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cuda_host import FILES, build, run_hosted


@pytest.mark.slow
def test_missing_barriers_and_waits_show_up_in_every_order() -> None:
    done = subprocess.run([build() / "vqk_portable_selftest", "16"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


# A process takes seconds to start. The longest file has its own, so that two can run at a time; the others share one.
LONGEST = [path for path in FILES if path.stem == "hosted_nearest"]
OTHERS = [path for path in FILES if path not in LONGEST]


@pytest.mark.slow
@pytest.mark.parametrize("paths", [LONGEST, OTHERS], ids=["nearest", "others"])
def test_hosted(paths: list[Path]) -> None:
    assert " passed" in run_hosted(build() / "libvqk_cuda_host.so", *paths)
