"""The machine's ceilings, measured: fp32 FMA, int16 and AVX512-BF16 dot, AMX tiles, running maximum, read bandwidth.

Compiles ``peak.cpp`` into a temporary folder; called by ``run``, which prints every speed as a fraction of these.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["LABELS", "fraction", "measure", "merge"]

LABELS = {
    "avx2": "fp32 FMA, AVX2",
    "avx2int16": "int16 multiply and add, AVX2",
    "avx512": "fp32 FMA, AVX-512",
    "avx512bf16": "bf16 dot, AVX512-BF16",
    "amx": "bf16 tiles, AMX",
    "max": "running maximum, AVX-512 (elements/s)",
    "bytes": "memory read (bytes/s)",
}


@functools.cache
def _program() -> tuple[Path | None, str | None]:
    """The compiled probe, once per process, or the reason why there is none."""
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        return None, f"peaks are measured on x86-64 Linux only, this is {platform.system()} {platform.machine()}"
    names = [name for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if name]
    compiler = next((path for name in names if (path := shutil.which(name))), None)
    if compiler is None:
        return None, "no C++ compiler found (g++, clang++, c++ or $CXX)"
    folder = tempfile.mkdtemp(prefix="vqkernels-peak-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program = Path(folder) / "peak"
    source = Path(__file__).with_name("peak.cpp")
    build = [compiler, "-O3", "-std=c++17", "-pthread", str(source), "-o", str(program)]
    try:
        subprocess.run(build, check=True, capture_output=True, text=True, timeout=120)
    except subprocess.CalledProcessError as e:
        return None, f"{Path(compiler).name} failed: {(e.stderr or 'no message').strip().splitlines()[0]}"
    except (subprocess.TimeoutExpired, OSError) as e:
        return None, f"{Path(compiler).name} did not run: {type(e).__name__}"
    return program, None


def measure(threads: int, seconds: float = 0.03) -> tuple[dict[str, float], str | None]:
    """Operations per second of all threads together, best of five windows.

    Args:
        threads: how many.
        seconds: length of a window.

    Returns:
        The rates by the keys of ``LABELS`` (instruction sets that this machine lacks are left out), and the reason if
        nothing could be measured.
    """
    program, reason = _program()
    if program is None:
        return {}, reason
    try:
        run = subprocess.run(
            [str(program), str(threads), str(seconds)], check=True, capture_output=True, text=True, timeout=120
        )
    except (subprocess.SubprocessError, OSError) as e:
        return {}, f"the probe did not run: {type(e).__name__}"
    rates: dict[str, float] = json.loads(run.stdout)
    return rates, None


def merge(*runs: dict[str, float]) -> dict[str, float]:
    """The best of several measurements: a busy neighbour can only lower a rate."""
    return {name: max(r.get(name, 0.0) for r in runs) for name in LABELS if any(name in r for r in runs)}


def fraction(flops: float, seconds: float, isa: str, peaks: dict[str, float]) -> float | None:
    """Share of the peak of the instruction set that ran, or ``None`` if that was not measured."""
    return flops / seconds / peaks[isa] if peaks.get(isa) else None
