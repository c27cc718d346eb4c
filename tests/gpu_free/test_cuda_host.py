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


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_hosted(path: Path) -> None:
    assert " passed" in run_hosted(build() / "libvqk_cuda_host.so", path)
