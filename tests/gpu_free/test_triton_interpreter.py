"""The Triton backend without a GPU: the files interpreted_*.py, in a process where Triton's interpreter is on.

Triton reads ``TRITON_INTERPRET`` when a kernel is defined, so one process cannot have both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")
HERE = Path(__file__).parent
FILES = sorted(HERE.glob("interpreted_*.py"))
# A process takes seconds to start. The longest file has its own, so that two can run at a time; the others share one.
LONGEST = [path for path in FILES if path.stem == "interpreted_nearest"]
OTHERS = [path for path in FILES if path not in LONGEST]


@pytest.mark.slow
@pytest.mark.parametrize("paths", [LONGEST, OTHERS], ids=["nearest", "others"])
def test_interpreted(paths: list[Path]) -> None:
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
    }
    # Answers stay right where products are wrong: then every row is compared in float64.
    strict = ["-W", "error:vqkernels. the tensor cores of:RuntimeWarning"]
    plugins = ["-p", "no:cacheprovider", "-p", "interpreter_caches"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, *strict, *map(str, paths)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1], check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
