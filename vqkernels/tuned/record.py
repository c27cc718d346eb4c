"""The record of a green `make gpu`, and whether it speaks for the kernels that are here now.

Called by ``_triton`` and ``_cuda``, which hold their kernels back from ``backend="auto"`` without one.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from vqkernels.tuned.files import files_of, slug

__all__ = ["digest", "triton_sources", "untrusted", "verified"]


def digest(root: Path, paths: list[Path]) -> str:
    """A hash of files and their names, as csrc/cuda/library/CMakeLists.txt makes it: of ``sha256sum``-like lines."""
    lines = [f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in paths]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()[:16]


@functools.cache
def triton_sources() -> str:
    """The hash of the Triton kernels and of what launches them."""
    package = Path(__file__).resolve().parents[1]
    return digest(package, [*(package / "_triton").glob("*.py"), *(package / "ops").glob("*/triton.py")])


@functools.lru_cache(64)
def untrusted(device_name: str, backend: str, sources: str | None) -> str | None:
    """Why no green `make gpu` speaks for a backend on a kind of GPU, or ``None`` if one does.

    Args:
        device_name: as ``torch.cuda.get_device_name`` says.
        backend: ``"triton"`` or ``"native"``.
        sources: the hash of the kernels that would run; the record has the hash of those that did.
    """
    reason = None
    for file in files_of(device_name):
        record = file.content.get("verified")
        if file.stale is not None:
            reason = reason or file.stale
        elif isinstance(record, dict):
            known = record.get("sources")
            found = known.get(backend) if isinstance(known, dict) else None
            when = f"on {device_name} ({record.get('date')}, commit {record.get('commit')})"
            if found is None:
                reason = reason or f"the green `make gpu` {when} did not run it"
            elif found != sources:
                reason = reason or f"its kernels are not those that `make gpu` found green {when}: run it again"
            else:
                return None
    return reason or f"not verified on {device_name} (a green `make gpu` there writes tuned/{slug(device_name)}.json)"


def verified(device_name: str) -> dict[str, Any] | None:
    """The record that lets ``backend="auto"`` choose Triton on a kind of GPU - commit, date, versions - or ``None``."""
    sources = triton_sources()
    if untrusted(device_name, "triton", sources) is not None:
        return None
    records = (file.content.get("verified") for file in files_of(device_name) if file.stale is None)
    found = [r for r in records if isinstance(r, dict) and r.get("sources", {}).get("triton") == sources]
    return dict(found[0])
