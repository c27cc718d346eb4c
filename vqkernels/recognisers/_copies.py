"""Copies of a class that were changed: what their methods use that the original's don't.

Called by the families of classes that exist as repositories, whose files people copy and extend. An added option
shows as an attribute that an adapter knows nothing of: such a copy keeps its own code.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["unknown_attributes"]


def unknown_attributes(module: Any, methods: Iterable[str], known: Iterable[str]) -> str | None:
    """Why the class is not the one that an adapter knows, or ``None``.

    Args:
        module: an instance.
        methods: those that the adapter replaces.
        known: attributes and methods of ``self`` that they may use, beside those of every module.
    """
    own = {*vars(module), *module._buffers, *module._parameters, *module._modules}
    own |= {name for base in type(module).__mro__ if base not in nn.Module.__mro__ for name in vars(base)}
    foreign = own - set(known) - set(dir(nn.Module)) - set(vars(nn.Module())) - set(methods)
    for method in methods:
        code = getattr(inspect.unwrap(getattr(type(module), method)), "__code__", None)
        if found := [] if code is None else [name for name in code.co_names if name in foreign]:
            return f"{method}() uses self.{found[0]}, which the class that this adapter knows does not have: a copy?"
    return None
