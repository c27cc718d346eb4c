"""Define one op in the ``vqkernels`` torch library: schema, implementation for every device, fake.

Called by each ``ops/<op>/__init__.py``. No autograd here: gradients live in :mod:`vqkernels.functional`, outside the
op, where a call with gradients costs a third of ``custom_op`` + ``register_autograd`` (measured, CONTRIBUTING.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vqkernels import dispatch

library = torch.library.Library("vqkernels", "DEF")  # type: ignore[no-untyped-call]


def register(name: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define ``vqkernels::<name>`` and return the callable op.

    Args:
        name: the op's name, also its folder's.
        schema: arguments and results, the last argument being ``str backend='auto'``.
        fake: shapes and dtypes of the results, for ``torch.compile`` and ``torch.export``.
    """

    # needs_exact_strides: kernels read the strides they are given; Inductor must not lay inputs out anew.
    library.define(name + schema, tags=(torch.Tag.needs_exact_strides,))  # type: ignore[no-untyped-call]
    op: Callable[..., Any] = getattr(torch.ops.vqkernels, name).default
    library.impl(name, _implementation(name, op), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"vqkernels::{name}", fake, lib=library)
    return op


def _implementation(name: str, op: Any) -> Callable[..., Any]:
    """What torch calls. It drops trailing arguments that equal their default: put them back, for backends take all."""
    defaults = tuple(a.default_value for a in op._schema.arguments)
    tensors = [i for i, a in enumerate(op._schema.arguments) if str(a.type) in ("Tensor", "Optional[Tensor]")]

    def run(*args: Any) -> Any:
        args += defaults[len(args) :]
        for i in tensors:
            # (1, H, B, S, D) is (H, B, S, D): what autograd saves for a compiled backward pass must not be a 4-d view,
            # or Inductor for CPU (torch 2.13) asks for channels-last strides and cannot order them when symbolic.
            if args[i] is not None and args[i].dim() == 5:
                args = (*args[:i], args[i].squeeze(0), *args[i + 1 :])
        return dispatch.call(name, args[-1], args[:-1])

    return run
