"""What the records of sizes share: plain values for json and back, and checks that name the field.

Used by the configs of :mod:`vqkernels.models`; no torch here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["Config", "WithCodebook", "check_choice", "check_int", "check_ints", "check_number"]

C = TypeVar("C", bound="Config")


@dataclass(frozen=True)
class Config:
    """A frozen record that json can hold."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """The reverse of :meth:`to_dict`; lists become tuples.

        Raises:
            ValueError: a name is unknown, or a value is out of range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(
                f"unknown {cls.__name__} field {unknown[0]!r}; expected some of {', '.join(sorted(known))}"
            )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def replace(self: C, **changes: Any) -> C:
        """The same record with some fields changed.

        Raises:
            ValueError: as in :meth:`from_dict`.
        """
        return type(self).from_dict(self.to_dict() | changes)


class WithCodebook:
    """What the configs of models with a codebook share; ``dim`` and ``quantizer`` are their fields."""

    dim: int
    quantizer: dict[str, Any]

    def check_quantizer(self) -> None:
        """``quantizer`` sets nothing that has its own field."""
        if taken := sorted(self.quantizer.keys() & {"num_embeddings", "embedding_dim", "channel_dim"}):
            raise ValueError(f"quantizer sets {taken[0]!r}; use codes and dim, the channel axis is always 1")

    @property
    def heads(self) -> int:
        """Independent codebooks per grid and level (product quantization)."""
        return int(self.quantizer.get("heads", 1))

    @property
    def latent_channels(self) -> int:
        """Channels that are quantized, per grid."""
        return self.dim * self.heads


def check_int(name: str, value: Any, least: int) -> None:
    """``value`` is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; expected an integer >= {least}")


def check_ints(name: str, value: Any, least: int, *, empty: bool = False) -> None:
    """``value`` is a tuple of integers of at least ``least``."""
    if not isinstance(value, tuple) or not (value or empty):
        raise ValueError(f"{name} is {value!r}; expected a tuple of integers >= {least}")
    for v in value:
        check_int(name, v, least)


def check_number(name: str, value: Any, low: float = 0.0, high: float = float("inf")) -> None:
    """``value`` is a number in [low, high]; infinity and NaN are refused."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not low <= value <= high
        or value == float("inf")
    ):
        bounds = f">= {low:g}" if high == float("inf") else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} is {value!r}; expected a number {bounds}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
