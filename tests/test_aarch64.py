"""The CPU library for aarch64, compiled here and executed by qemu: the same indices and scores to the bit.

Needs Debian's ``g++-aarch64-linux-gnu`` and ``qemu-user`` (or what other systems call them).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vqkernels import _native

ROOT = Path(__file__).resolve().parents[1]
COMPILER, EMULATOR, SYSROOT = "aarch64-linux-gnu-g++", "qemu-aarch64", Path("/usr/aarch64-linux-gnu")
TARGET = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"]


def build(folder: Path, compiler: str, options: list[str]) -> Path:
    """The library and the driver, in ``folder``."""
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    for command in (
        [cmake, "-S", ROOT / "csrc", "-B", folder, *options],
        [cmake, "--build", folder, "--target", "vqk_cpu", "--parallel", "2"],
        [
            compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-I", ROOT / "csrc", ROOT / "tests/aarch64/driver.cpp",
            "-o", folder / "driver", "-L", folder, "-lvqk_cpu", f"-Wl,-rpath,{folder}",
        ],
    ):  # fmt: skip
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return folder / "driver"


@pytest.mark.slow
def test_neon_kernels_are_exact(tmp_path: Path) -> None:
    for tool in (COMPILER, EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    driver = build(tmp_path, COMPILER, TARGET)
    run = subprocess.run([EMULATOR, "-L", SYSROOT, driver], capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    names = [_native.ISAS[int(line.split()[1].rstrip(":"))] for line in run.stdout.splitlines()]
    assert names == ["scalar", "neon"]
    assert run.stdout.splitlines()[1].endswith("the best here")
