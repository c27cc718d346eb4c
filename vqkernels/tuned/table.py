"""Measured times of every backend, op and named size, and which backend they speak for.

Called by ``dispatch``; the table is the part ``"auto"`` of ``<device>.json``, and `make gpu` writes it
(``benchmarks/gpu_table.py``).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from vqkernels.tuned.files import files_of

__all__ = ["Choice", "choice"]


@dataclass(frozen=True)
class Choice:
    """The fastest backend at the measured size that is nearest to a call's.

    Attributes:
        milliseconds: of every backend that was measured, the fastest first.
        case: the name of the measured size.
        sizes: its rows, codes and dims.
        exact: are they the call's own?
    """

    milliseconds: dict[str, float]
    case: str
    sizes: tuple[int, int, int]
    exact: bool

    @property
    def backend(self) -> str:
        """The fastest."""
        return next(iter(self.milliseconds))

    @property
    def why(self) -> str:
        """For :func:`vqkernels.explain`."""
        rows, codes, dim = self.sizes
        size = f"{rows} rows x {codes} codes x {dim} dims" if rows else f"{codes} codes x {dim} dims"
        times = ", ".join(f"{name} {ms:.4g} ms" for name, ms in self.milliseconds.items())
        return f"measured at {size} ({self.case}{'' if self.exact else ', the nearest in the table'}): {times}"


def _distance(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Doublings between two sizes."""
    return sum(abs(math.log2(max(x, 1) / max(y, 1))) for x, y in zip(a, b, strict=True))


@functools.lru_cache(4096)
def choice(device_name: str, op: str, rows: int, codes: int, dim: int) -> Choice | None:
    """What was measured nearest to a call, or ``None`` if there is no table, or nothing in it about the op.

    The file of a device may have ``"auto": {op: [entry, ...]}`` with entries ``{"case", "rows", "codes", "dim",
    "milliseconds": {backend: ms}}``. Sizes are compared by the doublings between them, over rows, codes and dims
    together; of two that are equally near, and of two backends that are equally fast, the first written wins.

    Raises:
        ValueError: the table is not what it should be.
    """
    sizes = (rows, codes, dim)
    for file in files_of(device_name):
        if file.stale is not None or "auto" not in file.content:
            continue
        try:
            entries = [_entry(e) for e in file.content["auto"].get(op, [])]
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise ValueError(f'{file.path}: the table "auto" for {op} is malformed ({e!r}); remove it') from e
        if entries:
            case, measured, times = min(entries, key=lambda e: _distance(e[1], sizes))
            return Choice(dict(sorted(times.items(), key=lambda t: t[1])), case, measured, measured == sizes)
    return None


def _entry(entry: dict[str, Any]) -> tuple[str, tuple[int, int, int], dict[str, float]]:
    times = {str(name): float(ms) for name, ms in entry["milliseconds"].items()}
    if not times or not all(math.isfinite(ms) and ms > 0 for ms in times.values()):
        raise ValueError(f"milliseconds is {entry['milliseconds']!r}, expected a positive time per backend")
    return str(entry["case"]), (int(entry["rows"]), int(entry["codes"]), int(entry["dim"])), times
