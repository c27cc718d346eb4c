"""The files ``<device>.json``: where they lie, and which of their parts count on a device.

Called by the rest of ``tuned``. The user's file is asked first, the shipped one for what the user's does not have.
"""

from __future__ import annotations

import functools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["SCHEMA", "File", "device_name", "files_of", "folder", "slug", "user_folder"]

# Of the parts that `make gpu` writes, "auto" and "verified"; another number and they are not read.
SCHEMA = 1


def slug(device_name: str) -> str:
    """A device's name as a file name: ``"NVIDIA H200"`` is ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def folder() -> Path:
    """Where shipped files lie."""
    return Path(__file__).parent


def user_folder() -> Path:
    """Where ``vqkernels tune`` writes unless told otherwise; read before the shipped files."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("VQKERNELS_TUNED") or Path(base) / "vqkernels" / "tuned")


@functools.cache
def device_name(device: torch.device) -> str:
    """As ``torch.cuda.get_device_name`` says; asked once, for every call on a GPU wants to know."""
    return str(torch.cuda.get_device_name(device))


@dataclass(frozen=True)
class File:
    """One file of a device.

    Attributes:
        path: where it lies.
        content: what it says; empty if it is about another device.
        stale: why what `make gpu` wrote into it does not count, or ``None``.
    """

    path: Path
    content: dict[str, Any]
    stale: str | None


@functools.cache
def files_of(device_name: str) -> tuple[File, ...]:
    """What is there about a device, the user's first.

    Raises:
        ValueError: a file is no JSON object.
    """
    found = []
    for place in (user_folder(), folder()):
        path = place / f"{slug(device_name)}.json"
        if path.is_file():
            found.append(_read(path, device_name))
    return tuple(found)


def _read(path: Path, device_name: str) -> File:
    try:
        content = json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path} is not a file that `vqkernels tune` wrote ({e}); remove it or tune again") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a file that `vqkernels tune` wrote; remove it or tune again")
    if content.get("device", device_name) != device_name:
        # Copied or renamed: nothing in it was measured here.
        return File(path, {"nearest": {}}, f"{path.name} is about {content['device']}, not about {device_name}")
    stale = None
    if not content.keys().isdisjoint(("auto", "verified")) and content.get("schema") != SCHEMA:
        known = content.get("schema", "none")
        stale = f"{path.name} has schema {known}, this version reads {SCHEMA}: run `make gpu` again"
    return File(path, content, stale)
