"""The Triton kernels as compiled for sm_80 and sm_90, on the PTX machine: what is not slow in compiled_triton.py.

One process has one driver, so each target has a process. `make emulate` runs all of compiled_triton.py there, and the
files interpreted_*.py, which test_triton_interpreter.py runs in the interpreter: too many for every change.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

import ptx_machine
from launches import defined

HERE = Path(__file__).parent
# Kernels that read rows or codes, in whatever dtype they are.
READERS = {"_backward", "_chunk_sums", "_few", "_gather", "_output", "_subtract", "code_centre", "code_stats", "decide",
           "pack_codes", "pack_rows", "resolve", "scan"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_kernel_is_executed(target: str, tmp_path: Path) -> None:
    ptx_machine.build()
    environment = os.environ | {
        "VQKERNELS_TEST_PTX": target,
        "VQKERNELS_TEST_PTX_EXECUTED": str(tmp_path / "executed.json"),
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "triton_on_ptx",
               "-m", "not slow", str(HERE / "compiled_triton.py")]  # fmt: skip
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1], check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    executed = {kernel: set(kinds) for kernel, kinds in json.loads((tmp_path / "executed.json").read_text()).items()}
    assert executed.keys() == defined()
    for kernel in READERS:
        assert {"*fp32", "*fp16", "*bf16"} <= executed[kernel], kernel
