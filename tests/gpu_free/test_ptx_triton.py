"""The Triton kernels as compiled for sm_80 and sm_90, on the PTX machine: what is not slow in compiled_triton.py.

One process has one driver, so each target has a process. `make emulate` runs all of compiled_triton.py there, and the
files interpreted_*.py, which test_triton_interpreter.py runs in the interpreter: too many for every change.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

import ptx_machine
from launches import defined

HERE = Path(__file__).parent
TARGETS = ("sm_80", "sm_90")
# Kernels that read rows or codes, in whatever dtype they are.
READERS = {"_backward", "_chunk_sums", "_code_gradients", "_few", "_gather", "_output", "_row_gradients", "_row_means",
           "_row_softmax", "_subtract", "_usage", "code_centre", "code_stats", "decide", "pack_codes", "pack_rows",
           "resolve", "scan"}  # fmt: skip


# More than none: everything, `make emulate ROUNDS=1`.
ROUNDS = int(os.environ.get("VQKERNELS_EMULATE", "0"))


def run_compiled(target: str, *arguments: str | Path) -> dict[str, set[str]]:
    """Run tests with the compiler's kernels for a target; the kernels that ran, with the kinds of their tensors."""
    ptx_machine.build()
    with tempfile.TemporaryDirectory() as folder:
        executed = Path(folder) / "executed.json"
        environment = os.environ | {
            "VQKERNELS_TEST_PTX": target,
            "VQKERNELS_TEST_PTX_EXECUTED": str(executed),
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("PYTEST_XDIST_WORKER", None)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
                   "-p", "triton_on_ptx", *map(str, arguments)]  # fmt: skip
        run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1], check=False)
        assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
        assert " passed" in run.stdout
        return {kernel: set(kinds) for kernel, kinds in json.loads(executed.read_text()).items()}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_executed(target: str) -> None:
    executed = run_compiled(target, "-m", "not slow", HERE / "compiled_triton.py")
    assert executed.keys() == defined()
    for kernel in READERS:
        assert {"*fp32", "*fp16", "*bf16"} <= executed[kernel], kernel


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(HERE.glob("interpreted_*.py")) if ROUNDS else [], ids=lambda path: path.stem)
@pytest.mark.parametrize("target", TARGETS)
def test_what_the_interpreter_runs_runs_compiled(target: str, path: Path) -> None:
    run_compiled(target, path)


@pytest.mark.slow
@pytest.mark.skipif(not ROUNDS, reason="only by `make emulate ROUNDS=1`")
@pytest.mark.parametrize("target", TARGETS)
def test_slow_ones(target: str) -> None:
    run_compiled(target, "-m", "slow", HERE / "compiled_triton.py")
