"""Define one op in the ``vqkernels`` torch library: schema, implementation for every device, fake.

Called by each ``ops/<op>/__init__.py``. No autograd here: gradients live in :mod:`vqkernels.functional`, outside the
op, where a call with gradients costs a third of ``custom_op`` + ``register_autograd`` (measured, CONTRIBUTING.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vqkernels import dispatch

_library = torch.library.Library("vqkernels", "DEF")  # type: ignore[no-untyped-call]


def register(name: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define ``vqkernels::<name>`` and return the callable op.

    Args:
        name: the op's name, also its folder's.
        schema: arguments and results, the last argument being ``str backend='auto'``.
        fake: shapes and dtypes of the results, for ``torch.compile`` and ``torch.export``.
    """

    def run(*args: Any) -> Any:
        return dispatch.call(name, args[-1], args[:-1])

    # needs_exact_strides: kernels read the strides they are given; Inductor must not lay inputs out anew.
    _library.define(name + schema, tags=(torch.Tag.needs_exact_strides,))  # type: ignore[no-untyped-call]
    _library.impl(name, _fill_defaults(name, run), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"vqkernels::{name}", fake, lib=_library)
    op: Callable[..., Any] = getattr(torch.ops.vqkernels, name).default
    return op


def _fill_defaults(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """The dispatcher drops trailing arguments that equal their default: put them back, so that ``run`` sees all."""
    defaults: list[Any] = []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not defaults:
            schema = getattr(torch.ops.vqkernels, name).default._schema
            defaults.extend(a.default_value for a in schema.arguments)
            names.extend(a.name for a in schema.arguments)
        full = [*args, *defaults[len(args) :]]
        for key, value in kwargs.items():
            full[names.index(key)] = value
        # (1, H, B, S, D) is (H, B, S, D): what autograd saves for a compiled backward pass must not be a 4-d view, or
        # Inductor for CPU (torch 2.13) asks for channels-last strides and cannot order them when they are symbolic.
        for i, value in enumerate(full):
            if isinstance(value, torch.Tensor) and value.dim() == 5:
                full[i] = value.squeeze(0)
        return run(*full)

    names: list[str] = []
    return wrapper
