"""Runs the suite's op calls on another device: tests stay on the CPU, every op's tensors go there and come back.

Called by tests/conftest.py when ``VQKERNELS_TEST_DEVICE`` names a device (`make gpu`: cuda). Strides and offsets are
kept, so that the kernels see the layouts that the tests made.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from vqkernels import dispatch

# "cpu:0" rehearses on copies on the CPU (with TRITON_INTERPRET=1 on Triton's kernels), "standin" on a device that is
# another than the CPU, where only the reference runs (standin.py).
DEVICE = os.environ.get("VQKERNELS_TEST_DEVICE", "cpu") or "cpu"
KIND = DEVICE.partition(":")[0]

# On a GPU an index that is no code is no error, or (to the reference) one after which the process cannot use the GPU.
needs_cpu = pytest.mark.skipif(KIND != "cpu", reason="nobody waits for a GPU to look at indices (docs/gpu.md)")


def place(value: Any, device: str = DEVICE) -> Any:
    """A tensor (or each of a list) on the device with its strides, over a copy of its storage; else unchanged."""
    if isinstance(value, list):
        return [place(v, device) for v in value]
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return value
    storage = value.detach().untyped_storage()
    flat = torch.empty(0, dtype=value.dtype).set_(storage)
    moved = flat.to(device, copy=True)
    return torch.as_strided(moved, value.shape, value.stride(), value.storage_offset())


def back(value: Any) -> Any:
    """The same on the CPU, through tuples."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    return type(value)(back(v) for v in value) if isinstance(value, tuple | list) else value


def call(original: Any, op: str, backend: str, args: tuple[Any, ...], device: str = DEVICE) -> Any:
    """``dispatch.call`` on the device; what a backend cannot run there, and could not on the CPU either, is skipped."""
    if KIND != "standin":
        return _call(original, op, backend, args, device)
    from tests import standin

    with standin.device(float64=True):
        return _call(original, op, backend, args, device)


def _call(original: Any, op: str, backend: str, args: tuple[Any, ...], device: str) -> Any:
    if not all(a.device.type == "cpu" for a in args if isinstance(a, torch.Tensor)):
        return original(op, backend, args)
    there = tuple(place(a, device) for a in args)
    name = dispatch.requested(backend)
    chosen = next((b for b in dispatch.BACKENDS if b.name == name), None)
    if chosen is not None and (reason := dispatch._reason(op, chosen, dispatch._place(there), there)) is not None:
        pytest.skip(f"{op}, {name} on {device}: {reason}")
    result = original(op, backend, there)
    schema = getattr(torch.ops.vqkernels, op).default._schema.arguments
    for here, moved, argument in zip(args, there, schema, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            here.copy_(moved)
    return back(result)
