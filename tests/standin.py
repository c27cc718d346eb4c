"""A stand-in for a GPU without float64, such as Apple's: its tensors live in the CPU's memory, and can't be float64.

What runs inside of ``with standin.device():`` is the real code of the package; torch's operators are carried out on the
CPU one by one. It shows where float64 is asked for and where tensors of two devices meet, not how Metal computes. A
process has at most one such device, and keeps it: test_devices.py starts one for it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from vqkernels import _devices, dispatch

NAME = "standin"


@functools.cache
def _place() -> torch.device:
    """The device, from now on in this process. Not on import: pytest imports every file, in search of examples."""
    module = backend_registration._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]  # autocast asks
    backend_registration._setup_privateuseone_for_python_backend(NAME, module)
    return torch.device(NAME, 0)


class Tensor(torch.Tensor):
    """On the stand-in for all who ask; ``raw`` holds the values."""

    raw: torch.Tensor
    float64 = False

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Tensor:
        if raw.dtype == torch.float64 and not cls.float64:
            raise TypeError(f"{NAME} has no float64")
        new = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=_place()
        )
        new.raw = raw
        return new  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carry_out(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.raw.tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{NAME}:{self.raw!r}"


class _Device(TorchDispatchMode):
    """Catches what has no tensor among its arguments, such as ``torch.zeros(3, device="standin")``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "vqkernels":
            return _carry_out(func, args, kwargs or {})
        # An op of this package is Python: its operators come here one by one.
        args = (*args, *(a.default_value for a in func._schema.arguments[len(args) :]))
        with self:
            return dispatch.call(func._schema.name.split("::")[1], args[-1], args[:-1])


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.raw if isinstance(value, Tensor) else value


def _carry_out(func: Any, args: Any, kwargs: Any) -> Any:
    given = tree_leaves((args, kwargs))
    ours = [a for a in given if isinstance(a, Tensor)]
    others = [a for a in given if isinstance(a, torch.Tensor) and not isinstance(a, Tensor)]
    places = [a for a in given if isinstance(a, torch.device)]
    here = places[0].type == NAME if places else bool(ours)
    copies = func is torch.ops.aten.copy_.default
    if ours and not copies and any(t.dim() > 0 for t in others):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {NAME} and cpu")
    arguments, options = tree_map(_on_cpu, (args, kwargs))
    if func is torch.ops.aten.convolution_overrideable.default:  # torch's name for "the device has one of its own"
        func = torch.ops.aten.convolution.default
    result = func(*arguments, **options)
    if copies:
        return args[0]
    known = {id(a.raw): a for a in ours}

    def outer(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        same = known.get(id(value))
        if not here:
            return value if same is None else value.clone()
        return Tensor(value) if same is None else same  # written in place

    return tree_map(outer, result)


@contextlib.contextmanager
def device(float64: bool = False) -> Iterator[torch.device]:
    """The device, which the package takes for one without float64 inside; its tensors are of no use outside.

    Args:
        float64: it has float64 all the same, like any other device that is not the CPU.
    """
    place, known = _place(), _devices.lacks_float64
    if not float64:
        _devices.lacks_float64 = lambda other: other.type == NAME or known(other)
    Tensor.float64 = float64
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is then moved by an operator
    try:
        with _Device():
            yield place
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        _devices.lacks_float64 = known
