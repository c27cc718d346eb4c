"""What was found on kinds of GPU, in ``<device>.json`` beside this file: how to launch, which backend, the proof.

Called by ``ops/<op>/triton.py`` and ``dispatch``; written by ``vqkernels tune`` and `make gpu`. Nothing has been
measured yet, so no file is shipped: configurations come from the heuristic below, and nothing is chosen by a table.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vqkernels.tuned.files import SCHEMA, device_name, files_of, folder, slug, user_folder
from vqkernels.tuned.record import digest, triton_sources, untrusted, verified
from vqkernels.tuned.table import Choice, choice

__all__ = [
    "HEURISTIC",
    "SCHEMA",
    "Choice",
    "Config",
    "choice",
    "clear_cache",
    "device_name",
    "digest",
    "folder",
    "load",
    "nearest_config",
    "override",
    "slug",
    "triton_sources",
    "untrusted",
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


def clear_cache() -> None:
    """Read the files again."""
    for function in (device_name, files_of, choice, untrusted, triton_sources):
        function.cache_clear()


def load(device_name: str) -> dict[int, Config]:
    """Measured configurations of a device by the largest padded dim that they serve; empty if there are none.

    Args:
        device_name: as ``torch.cuda.get_device_name`` says.

    Raises:
        ValueError: a file is there and is not what ``vqkernels tune`` writes.
    """
    parsed = (_parse(file.path, file.content) for file in files_of(device_name))
    return next((table for table in parsed if table), {})


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
