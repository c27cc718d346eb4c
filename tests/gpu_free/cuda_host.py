"""Builds the CUDA kernels for the host and runs the files hosted_*.py with them; reads what nvcc's library contains.

Called by test_cuda_host.py, test_ptx_cuda.py, test_cuda_library.py and `make asan`. A file hosted_<what>.py holds
ordinary tests: in its process, ``backend="native"`` sends CPU tensors to the kernels of csrc/cuda, whose source
csrc/cuda/host_execution.cpp executes, or whose PTX tests/gpu_free/ptx does.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import ptx_machine
import pytest
from building import ROOT, cmake

from vqkernels import _cuda

FILES = sorted(Path(__file__).parent.glob("hosted_*.py"))
# Orders of execution: ascending, then three mixtures of random, eager and starving threads; others for each round.
ROUND = int(os.environ.get("VQKERNELS_HOST_ROUND", "0"))
SEEDS = (0, 3 * ROUND + 1, 3 * ROUND + 2, 3 * ROUND + 3)


@functools.cache
def build() -> Path:
    """The folder with ``libvqk_cuda_host.so`` and ``vqk_portable_selftest``, up to date."""
    # Every look at threadIdx reads thread-local storage: so it takes no call for its address.
    flags = ["-DVQK_CUDA_HOST=ON", "-DCMAKE_CXX_FLAGS=-ftls-model=initial-exec"]
    return cmake("csrc", "cuda_host", flags, ["vqk_cuda_host", "vqk_portable_selftest"])


@functools.cache
def build_ptx(arch: str) -> Path:
    """The library whose kernels are nvcc's PTX for ``arch``, "80" or "90a", executed on the host; up to date."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if nvcc is None:
        missing("there is no nvcc (looked on the path, in /usr/local/cuda and at CUDACXX)")
    flags = [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DVQK_PTX_MACHINE={ptx_machine.build()}"]
    target = f"vqk_cuda_ptx{arch}"
    return cmake("tests/gpu_free/ptx/library", "ptx_cuda", flags, [target]) / f"lib{target}.so"


def run_hosted(library: Path, *arguments: str | Path, run: tuple[str, ...] = ("-m", "pytest")) -> str:
    """Run hosted tests on a library's kernels; what pytest, or what else starts it, printed."""
    environment = os.environ | {
        "VQKERNELS_CUDA_LIBRARY": str(library),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, *run, "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def set_seed(seed: int) -> None:
    """Choose the order in which the hosted kernels' threads run."""
    import ctypes

    function = _cuda.lib().vqk_cuda_host_seed
    function.restype, function.argtypes = None, [ctypes.c_uint64]
    function(seed)


def launches() -> int:
    """How many kernels the hosted library has started."""
    import ctypes

    function = _cuda.lib().vqk_cuda_host_launches
    function.restype, function.argtypes = ctypes.c_int64, []
    return int(function())


def set_shared(size: int) -> None:
    """Choose how much shared memory a block of the hosted kernels may have."""
    import ctypes

    function = _cuda.lib().vqk_cuda_host_shared
    function.restype, function.argtypes = None, [ctypes.c_uint64]
    function(size)


@dataclass(frozen=True)
class Kernel:
    """What one kernel takes on one architecture."""

    name: str
    arch: str
    registers: int
    stack: int
    local: int


def missing(what: str) -> NoReturn:
    """Skip, or fail with ``VQKERNELS_REQUIRE_CUDA=1``."""
    if os.environ.get("VQKERNELS_REQUIRE_CUDA") == "1":
        pytest.fail(f"VQKERNELS_REQUIRE_CUDA is set, and {what}")
    pytest.skip(what)


def installed() -> Path:
    """The library that nvcc built, or a skip (a failure with ``VQKERNELS_REQUIRE_CUDA=1``)."""
    try:
        return _cuda.path()
    except OSError as e:
        missing(str(e))


def cuobjdump(*arguments: str) -> str:
    """The output of cuobjdump, of CUDA or of Triton's wheel."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton", reason="neither CUDA's cuobjdump nor Triton's")
        tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """Every kernel in the library, once per architecture."""
    found, arch = [], ""
    name = ""
    for line in cuobjdump("-res-usage", str(installed())).splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\w+):", line):
            name = match[1]
        elif "REG:" in line:
            used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
            found.append(Kernel(name, arch, used["REG"], used["STACK"], used["LOCAL"]))
    return tuple(found)
