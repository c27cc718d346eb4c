"""Triton's interpreter, quicker: what it looks up anew for every call of a function is kept. A plugin of pytest.

In each call of a function in a kernel it lists all members of ``triton.language`` to find the builtins, and for each
type it makes a table of all types, much of its time on small tiles. Answers are the same.
Loaded by test_triton_interpreter.py; the files interpreted_*.py pass without it.
"""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any

from triton.language import core
from triton.runtime import interpreter


@functools.cache
def builtins(of: Any) -> tuple[str, ...]:
    """Names of a module's or class' builtins, as they are before the first launch replaces them."""
    return tuple(name for name, member in inspect.getmembers(of) if core.is_builtin(member))


def getmembers(of: Any) -> list[tuple[str, Any]]:
    """The builtins among the members, all that the interpreter wants."""
    return [(name, getattr(of, name)) for name in builtins(of)]


interpreter.inspect = SimpleNamespace(**vars(inspect) | {"getmembers": getmembers})

find, known = interpreter._get_np_dtype, {}


def np_dtype(of: Any) -> Any:
    """NumPy's dtype for a type of Triton's."""
    if of.name not in known:
        known[of.name] = find(of)
    return known[of.name]


interpreter._get_np_dtype = np_dtype
