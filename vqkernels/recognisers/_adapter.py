"""What every recogniser is made of: an adapter, a mixin that replaces methods of a class it knows by name.

Subclassed by the families beside this file, read by :mod:`vqkernels.patch`, which swaps an instance's class for
``(Adapter, OriginalClass)``. An adapter holds no state of its own: parameters and buffers stay the module's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

__all__ = ["Adapter", "class_path"]


def class_path(cls: type) -> str:
    """``package.module.Class``."""
    return f"{cls.__module__}.{cls.__qualname__}"


class Adapter(nn.Module):
    """Base of all adapters: what it is for, what it replaces, and when it steps back.

    A subclass is a mixin that goes before the original class, so ``super().forward(...)`` is the original. Inside a
    method, ``self.fixes`` holds the names of the upstream bugs that the user asked to have fixed.

    Attributes:
        targets: class paths, ``"package.module.Class"``; ``"*.module.Class"`` matches any prefix, none included, for
            classes that people copy into their own repositories.
        overrides: methods that the adapter replaces.
        relies_on: methods whose behaviour it inlines. A subclass or an instance that replaces one of these, or of
            ``overrides``, is left alone: its author wanted something else than what the adapter would do.
        signatures: method -> parameter names (without ``self``) that it must have: another version may differ.
        attributes: names that the instance must have.
        parts: attribute -> adapter of a submodule that is switched together with this module, or not at all.
        available_fixes: name -> one line, upstream bugs that ``patch(..., fix=...)`` can mend.
        fixes: those that are on; set on the generated class.
    """

    targets: ClassVar[tuple[str, ...]] = ()
    overrides: ClassVar[tuple[str, ...]] = ("forward",)
    relies_on: ClassVar[tuple[str, ...]] = ()
    signatures: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    attributes: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[Mapping[str, type[Adapter]]] = {}
    available_fixes: ClassVar[Mapping[str, str]] = {}
    fixes: ClassVar[frozenset[str]] = frozenset()

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # attributes are the original's

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        """Why this instance must keep its own code (an option that cannot be served), or ``None``."""
        return None

    @classmethod
    def describe(cls, module: Any) -> str:
        """Options worth a column in the report, and when a call falls back to the original code."""
        return ""

    @classmethod
    def target_of(cls, module_class: type) -> type | None:
        """The class among ``module_class`` and its bases that this adapter is for, or ``None``."""
        for base in module_class.__mro__:
            path = class_path(base)
            for target in cls.targets:
                if path == target or (target.startswith("*.") and f".{path}".endswith(target[1:])):
                    return base
        return None

    @classmethod
    def original_of(cls, module_class: type) -> type:
        """The original class among the bases of a patched one, whose file may hold what a method needs."""
        found = (base for base in module_class.__mro__ if not issubclass(base, Adapter))
        return next(base for base in found if cls.target_of(base) is base)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why a module that is a target, or a subclass of one, is left alone, or ``None``."""
        target = cls.target_of(type(module))
        if target is None:
            return f"is a {class_path(type(module))}; expected {' or '.join(cls.targets)}"
        names = (*cls.overrides, *cls.relies_on)
        for base in type(module).__mro__[: type(module).__mro__.index(target)]:
            if found := [name for name in names if name in vars(base)]:
                return f"{base.__name__} replaces {_calls(found)} of {target.__name__}"
        if found := [name for name in names if name in vars(module)]:
            return f"{_calls(found)} was replaced on this instance"
        for name, expected in cls.signatures.items():
            method = getattr(target, name, None)
            actual = None if method is None else tuple(inspect.signature(method).parameters)[1:]
            if actual != expected:
                shown = "is missing" if actual is None else f"takes ({', '.join(actual)})"
                return f"{target.__name__}.{name} {shown}; expected ({', '.join(expected)}): another version?"
        if missing := [name for name in cls.attributes if not hasattr(module, name)]:
            return f"has no attribute {', '.join(missing)}: another version?"
        for name, adapter in cls.parts.items():
            part = getattr(module, name, None)
            if not isinstance(part, nn.Module):
                return f"{name} is a {type(part).__name__}; expected a module"
            if not isinstance(part, Adapter) and (reason := adapter.refusal(part)) is not None:
                return f"{name}: {reason}"
        return cls.unsupported(module)


def _calls(names: list[str]) -> str:
    return ", ".join(f"{name}()" for name in names)
