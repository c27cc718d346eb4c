"""Whether Triton can run here, and how kernels are launched; beside it, the kernels of ``nearest``.

Called by ``dispatch`` (is it there?) and by every ``ops/<op>/triton.py``. Nothing here imports Triton: the kernels do,
and they are imported by the first call that runs them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from vqkernels import tuned

__all__ = [
    "DTYPES",
    "SCREEN_DTYPES",
    "ceil_div",
    "check_indices",
    "held_back",
    "interpreted",
    "on_device",
    "power_of_two",
    "strides",
    "unavailable",
    "unsupported_dtype",
    "version",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# What the tensor cores' screen can bring into float16 parts.
SCREEN_DTYPES = DTYPES[:3]


def interpreted() -> bool:
    """Triton's interpreter runs the kernels, on CPU tensors too; set ``TRITON_INTERPRET=1`` before the first call."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable(device: str) -> str | None:
    """Why Triton kernels cannot run on this kind of device here, or ``None``."""
    if device == "cpu" and not interpreted():
        return "Triton kernels run on GPUs (on CPU tensors only in Triton's interpreter: TRITON_INTERPRET=1)"
    if device not in ("cpu", "cuda"):
        return f"no Triton kernels for {device} devices"
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'vqkernels[triton]')"
    return None


@functools.cache
def version() -> tuple[int, int]:
    """Triton's, major and minor; imports it, whatever the package that brought it is called."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def held_back(device: torch.device) -> str | None:
    """Why these kernels are not chosen on a device unless asked for: no green `make gpu` speaks for them."""
    if device.type != "cuda":
        return "the interpreter is for tests"
    return tuned.untrusted(tuned.device_name(device), "triton", tuned.triton_sources())


def unsupported_dtype(dtypes: tuple[torch.dtype, ...], **tensors: Tensor | torch.dtype) -> str | None:
    """The reason to leave a call to another backend because of a dtype, or ``None``."""
    for name, value in tensors.items():
        dtype = value if isinstance(value, torch.dtype) else value.dtype
        if dtype not in dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            return f"{name} is {dtype}, not one of {names}"
    return None


def check_indices(op: str, indices: Tensor, num_codes: int) -> None:
    """Raise ``ValueError`` for an index outside of [-1, num_codes), on CPU only: elsewhere looking takes a wait."""
    if indices.device.type == "cpu" and indices.numel() and (indices.min() < -1 or indices.max() >= num_codes):
        wrong = indices[(indices < -1) | (indices >= num_codes)][0].item()
        raise ValueError(f"vqkernels: {op}: indices contains {wrong}, expected -1 or a code in [0, {num_codes})")


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def strides(x: Tensor) -> tuple[int, ...]:
    """The strides of ``x`` with those of single elements made the usual ones: no kernel compiles anew for them."""
    last = x.dim() - 1
    pairs = enumerate(zip(x.shape, x.stride(), strict=True))
    return tuple(int(i == last) if size == 1 else step for i, (size, step) in pairs)
