"""Options by name: which were meant by a misspelt one, and configs of models and losses with errors that say so.

Called by :mod:`vqkernels.training.config` and :mod:`vqkernels.training.yaml_config`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["unknown_key"]


def unknown_key(values: Mapping[str, Any], known: Iterable[str] | type[Any], where: str = "") -> str | None:
    """What to say about the first name in ``values`` that is not known; ``None`` if all are.

    Args:
        values: names and values.
        known: names, or a dataclass.
        where: what the names are fields of, as a dotted prefix.

    Example:
        >>> unknown_key({"cods": 3}, ["codes", "dim"], "model_options")
        "unknown option 'model_options.cods'; did you mean 'model_options.codes'?"
    """
    names = [f.name for f in dataclasses.fields(known)] if isinstance(known, type) else list(known)
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1, 0.0)
            return f"unknown option {prefix + str(name)!r}; did you mean {prefix + near[0]!r}?"
    return None
