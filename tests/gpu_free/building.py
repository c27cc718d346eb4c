"""Builds the tests' own libraries with CMake: once, whichever process wants them first."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def cmake(source: str, folder: str, flags: list[str], targets: list[str]) -> Path:
    """The build folder, below ``build``, with these targets up to date; a skip without CMake or a compiler.

    Args:
        source: folder with a CMakeLists.txt, from the root of the repository.
    """
    into = ROOT / "build" / folder
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    program = shutil.which("cmake", path=path)
    if program is None or shutil.which("c++") is None:
        pytest.skip("cmake or a C++ compiler is missing")
    # Compilers do not run under the sanitizers that the tests may run under.
    environment = os.environ | {"PATH": path, "LD_PRELOAD": ""}
    into.mkdir(parents=True, exist_ok=True)
    configure = ["-S", str(ROOT / source), "-B", str(into), *flags]
    with (into / "lock").open("w") as lock:  # for processes that run tests beside this one
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["--build", str(into), "--parallel", "2", "--target", *targets]):
            done = subprocess.run([program, *command], env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    return into
