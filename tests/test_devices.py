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


def run(*arguments: str, **environment: str) -> None:
    """pytest in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    found = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, cwd=HERE.parent,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert " passed" in found.stdout


needs_devices = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="torch has no devices in Python",
)


@pytest.mark.slow
@needs_devices
def test_a_device_without_float64() -> None:
    run(str(HERE / "standin_checks.py"))


@pytest.mark.slow
@needs_devices
def test_the_suite_of_gpus_on_a_device_that_is_not_the_cpu() -> None:
    """What `make gpu` runs on a GPU (benchmarks/gpu.py), in part: here it meets a second device for the first time."""
    files = ["test_functional.py", "test_nn_state.py"]
    chosen = ["-m", "not slow", "-k", "not opcheck and not compile"]
    run(*chosen, *(str(HERE / file) for file in files), VQKERNELS_TEST_DEVICE="standin")
