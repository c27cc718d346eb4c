"""What a number depends on: device, versions, commit, date, command line; and writing results so that they never tear.

Used by ``run``, ``memory`` and ``report``.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "ROOT", "commit", "describe", "device", "now", "results_folder", "write_json"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "numpy", "faiss-cpu", "vector-quantize-pytorch", "transformers", "diffusers")


def now() -> str:
    """UTC, to the minute."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^(model name|cpu family|model|stepping)\s*:\s*(.*)$", text, re.MULTILINE))
    name = " ".join(re.sub(r"\((R|TM)\)", "", found.get("model name", platform.machine())).split())
    numbers = ", ".join(f"{key.removeprefix('cpu ')} {found[key]}" for key in ("cpu family", "model") if key in found)
    return f"{name} ({numbers})" if numbers else name


def device() -> dict[str, Any]:
    """The machine: CPU model, cores that this process may use, memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {"cpu": _cpu_model(), "cores": cores, "memory_gb": round(pages / 1e9, 1), "system": platform.system()}


def results_folder() -> Path:
    """``benchmarks/results/<device>``, the device's name made fit for a path."""
    d = device()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{d['cpu'].split('(')[0]} {d['cores']} cores".lower()).strip("-")
    return RESULTS / slug


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def commit() -> str:
    """Short hash of the code that ran, with ``+`` if sources differ from it; ``unknown`` outside a checkout.

    ``VQKERNELS_COMMIT`` says it where a copy of the tree came without its history.
    """
    if given := os.environ.get("VQKERNELS_COMMIT"):
        return given
    head = _git("rev-parse", "--short=10", "HEAD")
    if head is None:
        return "unknown"
    changed = _git(
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        "vqkernels",
        "csrc",
        "benchmarks/*.py",
        "benchmarks/*.cpp",
    )
    return head + ("+" if changed else "")


def describe(threads: int) -> dict[str, Any]:
    """Everything that a reader needs beside a number. Imports torch and vqkernels."""
    import torch

    import vqkernels
    from vqkernels import _native

    native: dict[str, Any] = {"unavailable": _native.unavailable()}
    if native["unavailable"] is None:
        native = {
            "compiler": _native.lib().vqk_build_info().decode(),
            "isa": _native.ISAS[_native.isa()],
            "isas": _native.supported(),
        }
    return {
        "device": device(),
        "versions": {
            "python": platform.python_version(),
            "vqkernels": getattr(vqkernels, "__version__", None) or _version("vqkernels"),
            **{package: _version(package) for package in PACKAGES},
        },
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native": native,
        "threads": threads,
    }


def write_json(path: Path, data: Any) -> None:
    """Write next to the target and rename: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(data, file, indent=1)
            file.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
