"""Launch configurations: measured ones from ``<device>.json`` beside this file, else a heuristic.

Called by ``ops/<op>/triton.py`` and ``dispatch``; written by ``vqkernels tune`` and `make gpu`. Nothing has been
measured yet, so no file is shipped and every configuration comes from the heuristic.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

__all__ = [
    "HEURISTIC",
    "Choice",
    "Config",
    "choice",
    "clear_cache",
    "folder",
    "load",
    "nearest_config",
    "override",
    "slug",
    "user_folder",
    "verified",
]


@dataclass(frozen=True)
class Config:
    """How the search kernels are launched.

    Attributes:
        block_m: rows per program.
        block_n: codes per tile; also the unit of the error bound.
        block_d: dims per step of the contraction; rows stay on chip for all tiles where one step covers them.
        num_warps: warps per program.
        num_stages: tiles in flight.
    """

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int

    def with_rows(self, block_m: int) -> Config:
        """The same with fewer rows per program."""
        return replace(self, block_m=min(self.block_m, block_m))

    def to_dict(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)


# Padded dims up to the key use the config; chosen from shared memory and register budgets, not measured.
HEURISTIC: dict[int, Config] = {
    16: Config(128, 64, 16, 4, 3),
    32: Config(128, 64, 32, 4, 3),
    64: Config(128, 64, 64, 4, 3),
    128: Config(128, 64, 128, 8, 3),
    2**31: Config(128, 128, 64, 8, 3),
}


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
def _content(device_name: str) -> tuple[Path, dict[str, Any]] | None:
    for place in (user_folder(), folder()):
        path = place / f"{slug(device_name)}.json"
        if path.is_file():
            content = json.loads(path.read_text())
            _parse(path, content)
            return path, content
    return None


def clear_cache() -> None:
    """Read the files again."""
    _content.cache_clear()


def load(device_name: str) -> dict[int, Config]:
    """Measured configurations of a device by the largest padded dim that they serve; empty if there are none.

    Args:
        device_name: as ``torch.cuda.get_device_name`` says.

    Raises:
        ValueError: a file is there and is not what ``vqkernels tune`` writes.
    """
    found = _content(device_name)
    return {} if found is None else _parse(*found)


def verified(device_name: str) -> dict[str, str] | None:
    """Commit, date and versions of the green `make gpu` on this kind of GPU, or ``None`` if none is on record.

    With it, ``backend="auto"`` chooses the Triton kernels there.
    """
    found = _content(device_name)
    record = None if found is None else found[1].get("verified")
    return record if isinstance(record, dict) else None


@dataclass(frozen=True)
class Choice:
    """The fastest backend for a call, and what it was measured against.

    Attributes:
        backend: its name.
        milliseconds: of every backend that was measured, by name.
        rule: the sizes that the measurement stands for.
    """

    backend: str
    milliseconds: dict[str, float]
    rule: str

    @property
    def why(self) -> str:
        """For :func:`vqkernels.explain`."""
        times = ", ".join(f"{name} {ms:g} ms" for name, ms in sorted(self.milliseconds.items(), key=lambda p: p[1]))
        return f"measured for {self.rule or 'every size'}: {times}"


def choice(device_name: str, op: str, rows: int, codes: int, dim: int) -> Choice | None:
    """The measured table's choice for a call, or ``None`` if there is no table, or nothing in it about such sizes.

    The file of a device may have ``"auto": {op: [rule, ...]}``; the first rule that fits counts. A rule has
    ``"backend"``, ``"milliseconds": {backend: ms}``, and bounds ``"rows"``, ``"codes"`` and ``"dim"``, each
    ``[least, most]`` and none of them obligatory.

    Raises:
        ValueError: the table is not what it should be.
    """
    found = _content(device_name)
    if found is None:
        return None
    path, content = found
    sizes = {"rows": rows, "codes": codes, "dim": dim}
    try:
        for rule in content.get("auto", {}).get(op, []):
            bounds = {name: rule[name] for name in sizes if name in rule}
            if all(least <= sizes[name] <= most for name, (least, most) in bounds.items()):
                times = {str(name): float(ms) for name, ms in rule["milliseconds"].items()}
                text = ", ".join(f"{least} to {most} {name}" for name, (least, most) in bounds.items())
                return Choice(str(rule["backend"]), times, text)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f'{path}: the table "auto" for {op} is malformed ({e!r}); remove it') from e
    return None


def _parse(path: Path, content: Any) -> dict[int, Config]:
    try:
        return {int(dim): Config(**config) for dim, config in content["nearest"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path} is not a file that `vqkernels tune` wrote ({e!r}); remove it or tune again") from e


_override: contextvars.ContextVar[Config | None] = contextvars.ContextVar("vqkernels_config", default=None)


@contextlib.contextmanager
def override(config: Config) -> Iterator[None]:
    """Launch with ``config`` inside a ``with`` block; the tuner measures with it."""
    token = _override.set(config)
    try:
        yield
    finally:
        _override.reset(token)


def nearest_config(padded_dim: int, device_name: str = "") -> Config:
    """The measured configuration for a contraction of ``padded_dim`` dims, else the heuristic's.

    >>> nearest_config(32).block_d
    32
    """
    if (config := _override.get()) is not None:
        return config
    for table in (load(device_name) if device_name else {}, HEURISTIC):
        for largest in sorted(table):
            if padded_dim <= largest:
                return table[largest]
    return HEURISTIC[max(HEURISTIC)]
