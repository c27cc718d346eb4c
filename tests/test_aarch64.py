"""The CPU library for aarch64, compiled here and executed by qemu: the same indices and scores to the bit.

Needs Debian's ``g++-aarch64-linux-gnu`` and ``qemu-user`` (or what other systems call them).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vqkernels import _native

ROOT = Path(__file__).resolve().parents[1]
COMPILER, OBJDUMP = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump"
EMULATOR, SYSROOT = "qemu-aarch64", Path("/usr/aarch64-linux-gnu")
TARGET = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library, and the driver."""
    for tool in (COMPILER, EMULATOR, OBJDUMP):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    folder = tmp_path_factory.mktemp("aarch64")
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    for command in (
        [cmake, "-S", ROOT / "csrc", "-B", folder, *TARGET],
        [cmake, "--build", folder, "--target", "vqk_cpu", "--parallel", "2"],
        [
            COMPILER, "-std=c++17", "-O1", "-ffp-contract=off", "-I", ROOT / "csrc", ROOT / "tests/aarch64/driver.cpp",
            "-o", folder / "driver", "-L", folder, "-lvqk_cpu", f"-Wl,-rpath,{folder}",
        ],
    ):  # fmt: skip
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return folder


@pytest.mark.slow
def test_neon_kernels_are_exact(built: Path) -> None:
    command = [EMULATOR, "-L", SYSROOT, built / "driver"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    names = [_native.ISAS[int(line.split()[1].rstrip(":"))] for line in run.stdout.splitlines()]
    assert names == ["scalar", "neon"]
    assert run.stdout.splitlines()[1].endswith("the best here")


def inner_loop(built: Path, file: str) -> list[str]:
    """Instructions of the innermost loop of ``screen_simd``."""
    binary = built / "CMakeFiles" / "vqk_cpu.dir" / "cpu" / f"{file}.cpp.o"
    text = subprocess.run(
        [OBJDUMP, "-d", "--no-show-raw-insn", binary], capture_output=True, text=True, check=True
    ).stdout
    (body,) = re.findall(r"screen_simd[^\n]*>:\n(.*?)\n\n", text + "\n\n", re.DOTALL)
    code = [(int(at, 16), rest) for at, rest in re.findall(r"^\s*([0-9a-f]+):\t(.*)$", body, re.MULTILINE)]
    loops = []
    for at, rest in code:
        jump = re.match(r"b\.\w+\s+([0-9a-f]+) ", rest)
        if jump and int(jump[1], 16) < at:
            loops.append([op for place, op in code if int(jump[1], 16) <= place <= at])
    return min((x for x in loops if any("\tv" in op for op in x)), key=len)


@pytest.mark.slow
def test_the_screen_has_the_instructions_that_were_counted(built: Path) -> None:
    # benchmarks/NOTES.md; two dims of 4 codes and 4 (portable: 2) vectors of rows.
    neon, portable = inner_loop(built, "nearest_neon"), inner_loop(built, "nearest_scalar")
    assert sum(op.startswith("fmla") for op in neon) == 32
    assert sum(op.startswith(("fmul", "fadd")) for op in portable) == 32
    assert not [op for op in neon if op.startswith("st") and "\tq" in op], "a sum is kept in memory"
    assert len(neon) / 32 < 0.75 * len(portable) / 16
