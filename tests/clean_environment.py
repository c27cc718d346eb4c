"""Virtual environments that see this one's packages but not its vqkernels, and processes that nothing steers.

Used by test_install.py and test_wheel.py. Builds run without isolation and torch is borrowed through a .pth file, so
nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What an installed package says about itself; prints JSON.
PROBE = """
import json, pathlib, torch, vqkernels
from vqkernels import _native, ops
found = ops.nearest(torch.tensor([[[[0.9, 0.2], [0.0, 7.0]]]]), torch.eye(2)[None])
library = None if _native.unavailable() else _native.lib()._name
print(json.dumps({"file": vqkernels.__file__, "path": list(vqkernels.__path__), "reason": _native.unavailable(),
                  "library": library, "indices": found[0].flatten().tolist()}))
"""


def clean_environment(**extra: str) -> dict[str, str]:
    """This process' environment without anything that steers the build, the import or the package."""
    drop = ("VQKERNELS_", "PYTHON", "PYTEST", "LD_PRELOAD", "CC", "CXX", "CMAKE", "SKBUILD")
    # nvcc takes a minute: only where a test is about it.
    return {k: v for k, v in os.environ.items() if not k.startswith(drop)} | {"VQKERNELS_CUDA": "0"} | extra


def run(*command: str | Path, cwd: Path, ok: bool = True, **extra: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=cwd, env=clean_environment(**extra), capture_output=True, text=True, check=False, timeout=570
    )
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    return done


class Environment:
    """A virtual environment that sees the packages of this one, but not its vqkernels."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        self.site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
        # Paths from a .pth come last, and .pth files inside them (an editable vqkernels) are not read.
        borrowed = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
        (self.site / "borrowed.pth").write_text("\n".join(borrowed))

    def pip(self, *arguments: str | Path, ok: bool = True, **extra: str) -> subprocess.CompletedProcess[str]:
        return run(self.python, "-m", "pip", "--no-input", *arguments, cwd=self.folder, ok=ok, **extra)

    def install(self, *what: str | Path, ok: bool = True, **extra: str) -> subprocess.CompletedProcess[str]:
        flags = ("-v", "--ignore-installed", "--no-deps", "--no-index", "--no-build-isolation")
        return self.pip("install", *flags, *what, ok=ok, **extra)

    def probe(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(run(self.python, "-c", PROBE, cwd=self.folder).stdout)
        assert found["indices"] == [0, 1]
        return found
