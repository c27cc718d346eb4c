"""Builds the package into ``build/gpu`` for the GPU driver, without network; the machine's environment stays as it is.

Called by ``gpu --build``. Once per state of the sources, by their contents: copies of a tree have new dates, and a
build that was made elsewhere may come along with them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.environment import ROOT

__all__ = ["architectures", "build", "state"]

FOLDER, OBJECTS, LOG = (ROOT / "build" / name for name in ("gpu", "gpu_objects", "gpu.log"))
# Lines of the compilers' output that are shown where something went wrong.
SHOWN = 60


def architectures() -> str:
    """What the CUDA library is built for: the GPU that is there alone, which takes a third of the time.

    ``VQKERNELS_CUDA_ARCHS`` wins; where neither says it, the list of csrc/cuda/build.cmake.
    """
    import torch

    if given := os.environ.get("VQKERNELS_CUDA_ARCHS"):
        return given
    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    return "90a-real" if (major, minor) == (9, 0) else "80-real" if major == 8 else ""


def state(archs: str, root: Path = ROOT) -> str:
    """A hash of what is built, and how."""
    found = [root / "pyproject.toml"]
    found += [p for folder in ("csrc", "vqkernels") for p in (root / folder).rglob("*") if p.is_file()]
    digest = hashlib.sha256(f"{archs} {os.environ.get('VQKERNELS_CUDA', '')}".encode())
    for path in sorted(found):
        if "__pycache__" not in path.parts and path.suffix != ".so":
            digest.update(f"\n{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()


def _has_cuda() -> bool:
    return any((FOLDER / "vqkernels" / "lib").glob("libvqk_cuda*.so"))


def build(needs_cuda: bool) -> int:
    """The exit status. A missing CUDA library is said and no error: Triton's kernels can do without."""
    archs, stamp = architectures(), FOLDER / ".built"
    wanted = state(archs)
    if stamp.is_file() and stamp.read_text() == wanted and (_has_cuda() or not needs_cuda):
        return 0
    start = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-index", "--no-build-isolation", "--no-deps"]
    command.append(f"--config-settings=build-dir={OBJECTS}")  # a change in one file is compiled alone
    environment = os.environ | ({"VQKERNELS_CUDA_ARCHS": archs} if archs else {})
    with LOG.open("w") as log:
        done = subprocess.run(
            [*command, "--target", str(FOLDER), "."], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            check=False,
        )  # fmt: skip
    print(f"built for {archs or 'all architectures'} in {time.monotonic() - start:.0f} s", flush=True)
    if done.returncode != 0 or (needs_cuda and not _has_cuda()):
        print("\n".join(LOG.read_text(errors="replace").splitlines()[-SHOWN:]))
    if done.returncode != 0:
        print(f"THE BUILD FAILED: nothing can be tested (all of it: {LOG})", flush=True)
        return 1
    if needs_cuda and not _has_cuda():
        print(f"!!! NO CUDA LIBRARY WAS BUILT: only Triton's kernels are tested (all of it: {LOG})", flush=True)
    stamp.write_text(wanted)
    return 0
