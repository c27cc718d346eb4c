"""Which third-party quantizers :func:`vqkernels.patch` knows: one small file per family of classes.

A family is a module of this package with a tuple ``ADAPTERS``, and, where it helps, a dict ``IGNORED`` from class
paths to the reason why there is nothing to replace. Families are imported by the first ``patch``, and none of them
imports the library that it is for.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

from vqkernels.recognisers._adapter import Adapter

__all__ = ["FAMILIES", "Adapter", "adapters", "ignored"]

# In the order in which they are asked.
FAMILIES: tuple[str, ...] = (
    "vector_quantize_pytorch",
    "transformers_audio",
    "transformers_image",
    "taming",
    "llamagen",
    "codecs",
    "simvq",
    "var",
    "ibq",
)


def _families() -> Iterator[ModuleType]:
    for name in FAMILIES:
        yield importlib.import_module(f"vqkernels.recognisers.{name}")


def adapters() -> tuple[type[Adapter], ...]:
    """The adapters of all families."""
    return tuple(adapter for family in _families() for adapter in family.ADAPTERS)


def ignored() -> dict[str, str]:
    """Class paths of quantizers that are left alone on purpose, and why."""
    return {path: reason for family in _families() for path, reason in getattr(family, "IGNORED", {}).items()}
