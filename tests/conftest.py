"""Fixtures that every test shares: backends, seeds, and outputs that start as NaN."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

import on_device
import pytest
import torch
from on_device import DEVICE, KIND

from vqkernels import _native, dispatch, ops

if os.environ.get("VQKERNELS_REQUIRE_NATIVE") == "1" and (_reason := _native.unavailable()) is not None:
    # Tests are parametrised over what is there: without this, a library that does not load would leave the suite green.
    raise RuntimeError(f"VQKERNELS_REQUIRE_NATIVE=1, but the native library is not available: {_reason}")


# What processes that tests fork (multiprocessing's "forkserver") need: imported once, in the process that forks them.
FOR_FORKS = [
    "torch", "torch._dynamo", "torch.distributed", "accelerate", "jinja2", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "PIL.Image", "safetensors.torch", "skimage.data", "sklearn.datasets",
    "torchmetrics.functional.image", "tqdm", "vqkernels.training.evaluate", "vqkernels.training.loop",
]  # fmt: skip


def keep_bytecode() -> None:
    """Where Python shall write none, it goes to a folder of its own.

    Tests start many processes that import torch and more: each would compile the sources of all that anew, which takes
    longer than most of what is tested there.
    """
    if sys.dont_write_bytecode:
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        sys.dont_write_bytecode = False
        if sys.pycache_prefix is None:
            sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = str(temporary("bytecode"))


def temporary(name: str) -> Path:
    """A folder of this user alone that outlives the session: code is loaded from there."""
    if not hasattr(os, "getuid"):
        return Path(tempfile.gettempdir()) / f"vqkernels-{name}"  # the user's own already
    folder = Path(tempfile.gettempdir()) / f"vqkernels-{name}-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
        raise RuntimeError(f"{folder} is not a folder of this user: remove it, or set TMPDIR")
    folder.chmod(0o700)
    return folder


def pytest_configure() -> None:
    """Inductor compiles into a folder for this version of the operators, which workers and later sessions share.

    Its own folder belongs to the user. What it finds there for a graph it takes, also if our operators have come to
    lay out their results differently since: then a test fails because of another version, tested earlier or beside it.
    """
    keep_bytecode()
    multiprocessing.set_forkserver_preload(FOR_FORKS)
    # One process compiles what several want, and the others wait: on a busy machine for more than the usual 600 s.
    os.environ.setdefault("TORCHINDUCTOR_FILE_LOCK_TIMEOUT", "3600")
    version = hashlib.sha256()
    for path in sorted(Path(ops.__path__[0]).rglob("*.py")):
        version.update(path.read_bytes())
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(temporary("inductor") / version.hexdigest()[:16]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the PTX machine, and on it, are marked by their files' names: `make emulate` runs them.

    Files with slow tests come first: quick ones are left for the end, so that no process waits long for another. A file
    stays together, as its tests share what they built.
    """
    for item in items:
        if item.path.name.startswith("test_ptx_"):
            item.add_marker("emulated")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def available_backends() -> list[str]:
    """Backends that can run on the tested device; `make check` requires the native one (VQKERNELS_REQUIRE_NATIVE=1)."""
    return [b.name for b in dispatch.BACKENDS if b.probe(KIND) is None]


@pytest.fixture(params=available_backends())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can run here."""
    return str(request.param)


@pytest.fixture(params=_native.supported() if DEVICE == "cpu" and _native.unavailable() is None else [])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set of the native library that this machine runs, forced one by one."""
    monkeypatch.setenv("VQKERNELS_ISA", str(request.param))
    return str(request.param)


@pytest.fixture(autouse=True)
def _on_the_tested_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With VQKERNELS_TEST_DEVICE, every op that a test calls on CPU tensors runs on copies there."""
    if DEVICE == "cpu" or "gpu" in request.keywords:
        return
    original = dispatch.call
    monkeypatch.setattr(dispatch, "call", lambda op, backend, args: on_device.call(original, op, backend, args))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` called from the package returns NaN (or a wild integer): an output left unwritten fails at once."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args: Any, _original: Any = original, **kwargs: Any) -> torch.Tensor:
            out: torch.Tensor = _original(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if (
                caller.startswith("vqkernels")
                and not torch.compiler.is_compiling()
                and out.numel()
                and type(out) is torch.Tensor
            ):
                out.fill_(float("nan") if out.is_floating_point() else -(2**31) if out.dtype == torch.int64 else 0)
            return out

        monkeypatch.setattr(torch, name, poisoned)
