"""Devices without float64, on a stand-in: standin_checks.py, in a process that has such a device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

from vqkernels import _devices

HERE = Path(__file__).parent


def test_which_devices() -> None:
    assert _devices.widest(torch.device("mps")) == torch.float32
    for name in ("cpu", "cuda", "meta"):
        assert _devices.widest(torch.device(name)) == torch.float64


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="torch has no devices in Python",
)
def test_a_device_without_float64() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "standin_checks.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
