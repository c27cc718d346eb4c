"""Find, load and version-check the CUDA library, ``libvqk_cuda<major>``, and hand it tensors and streams.

Called by ``dispatch`` (is it there?) and by every ``ops/<op>/native.py`` when tensors are on a GPU. Nothing is
loaded before that: a machine without a GPU never touches the library.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
from contextlib import AbstractContextManager
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqkernels import _native, tuned

__all__ = [
    "SearchPlan",
    "check",
    "held_back",
    "hosted",
    "lib",
    "on_device",
    "path",
    "serves",
    "sources",
    "stream",
    "unavailable",
]


class SearchPlan(Structure):
    """``vqk_cuda_search_plan`` of csrc/capi.h; ``vqkernels/_cuda_nearest.py`` fills it."""

    _fields_ = [
        ("screen", c_int32),
        ("splits", c_int32),
        ("multiprocessors", c_int32),
        ("shared", c_int32),
        ("chunk_rows", c_int64),
    ]


_rows, _codes = POINTER(_native.Rows), POINTER(_native.Codes)
_float, _int64 = POINTER(c_float), POINTER(c_int64)
# tests/test_native.py compares this table with csrc/capi.h and with the exported symbols.
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "vqk_abi_version": (c_int32, []),
    "vqk_last_error": (c_char_p, []),
    "vqk_build_info": (c_char_p, []),
    "vqk_cuda_host_executed": (c_int32, []),
    "vqk_cuda_device_status": (c_int32, [c_int32]),
    "vqk_cuda_lookup": (c_int32, [_codes, _int64, _rows, c_int32, c_void_p]),
    "vqk_cuda_codebook_sum_workspace": (c_int64, [_rows, c_int64]),
    "vqk_cuda_codebook_sum": (
        c_int32,
        [_rows, _int64, c_int64, c_void_p, _float, c_void_p, c_int32, c_void_p],
    ),
    "vqk_cuda_ema_update_workspace": (c_int64, [c_int64, c_int64]),
    "vqk_cuda_ema_update": (
        c_int32,
        [_float] * 5 + [c_int64] * 3 + [c_double, c_double, c_int32, c_void_p, c_int32, c_void_p],
    ),
    "vqk_cuda_quantize_grad": (
        c_int32,
        [_rows, _rows, _codes, _int64, c_void_p, c_int32, _rows, c_int32, c_void_p],
    ),
    "vqk_cuda_quantize_output_workspace": (c_int64, [_rows]),
    "vqk_cuda_quantize_output": (
        c_int32,
        [_rows, _codes, _int64, _float, _rows, c_void_p, c_void_p, POINTER(c_double), c_void_p, c_int32, c_void_p],
    ),
    "vqk_cuda_nearest_workspace": (c_int64, [_rows, _codes, c_int32, POINTER(SearchPlan)]),
    "vqk_cuda_nearest": (
        c_int32,
        [_rows, _codes, c_int32, c_int32, POINTER(SearchPlan), c_void_p, _int64, _float, c_int32, c_void_p],
    ),
    "vqk_cuda_residual_nearest_workspace": (c_int64, [_rows, _codes, c_int32, POINTER(SearchPlan)]),
    "vqk_cuda_residual_nearest": (
        c_int32,
        [_rows, _codes, c_int32, POINTER(SearchPlan), c_void_p, _int64, _rows, _float, c_int32, c_void_p],
    ),
    "vqk_cuda_nearest_products": (
        c_int32,
        [c_int32] * 3 + [c_void_p] * 2 + [_float, c_void_p, POINTER(c_int32), c_uint64, c_int32, c_int32, c_void_p],
    ),
}


def path() -> Path:
    """The library to load: ``VQKERNELS_CUDA_LIBRARY``, else the installed one for torch's CUDA major, else any.

    Raises:
        OSError: there is none.
    """
    if override := os.environ.get("VQKERNELS_CUDA_LIBRARY"):
        return Path(override)
    import vqkernels

    major = (torch.version.cuda or "").partition(".")[0]
    for root in vqkernels.__path__:
        if found := sorted((Path(root) / "lib").glob("libvqk_cuda[0-9]*.so")):
            # The library brings its CUDA runtime along, so another major works too where the driver is new enough.
            return next((p for p in found if p.stem == f"libvqk_cuda{major}"), found[-1])
    raise OSError("libvqk_cuda was not built (no working nvcc at install time, or VQKERNELS_CUDA=0)")


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or the reason why there is none."""
    try:
        where = path()
        library = ctypes.CDLL(str(where))
        library.vqk_abi_version.restype = c_int32
        if (found := library.vqk_abi_version()) != _native.ABI_VERSION:
            expected = _native.ABI_VERSION
            return None, f"{where.name} has ABI version {found}, this package needs {expected}: install it again"
        for name, (restype, argtypes) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = restype, _native.addresses(argtypes)
    except (OSError, AttributeError) as e:
        return None, str(e)
    return library, None


@functools.cache
def _device_reason(index: int) -> str | None:
    library, reason = _load()
    if library is None:
        return reason
    return None if library.vqk_cuda_device_status(index) == 0 else str(library.vqk_last_error().decode())


def lib() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RuntimeError: there is none; the message says why.
    """
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"vqkernels: the CUDA library is not available: {reason}")
    return library


@functools.cache
def hosted() -> bool:
    """CPU tensors go to the CUDA kernels: ``VQKERNELS_CUDA_LIBRARY`` names the tests' build, which runs them there."""
    if not os.environ.get("VQKERNELS_CUDA_LIBRARY"):
        return False
    library, _ = _load()
    return library is not None and bool(library.vqk_cuda_host_executed())


def serves(tensor: Tensor) -> bool:
    """Does a call with this tensor go to the CUDA library?"""
    return tensor.is_cuda or hosted()


def unavailable() -> str | None:
    """Why CUDA kernels cannot run on the current device, or ``None``. Loads the library if there is a device."""
    if torch.version.hip is not None:
        return "no native kernels for AMD GPUs"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _device_reason(torch.cuda.current_device())


def unsupported(tensor: Tensor) -> str | None:
    """Why the library cannot serve this tensor's device, or ``None``."""
    return _device_reason(tensor.device.index) if tensor.is_cuda else None


def check(status: int) -> None:
    """Raise what the library reported."""
    if status != 0:
        message = lib().vqk_last_error().decode()
        raise {1: ValueError, 2: MemoryError}.get(status, RuntimeError)(f"vqkernels: {message}")


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def stream(tensor: Tensor) -> tuple[int, int | None]:
    """The last two arguments of every call: the device's ordinal and torch's current stream there."""
    if not tensor.is_cuda:
        return 0, None
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def workspace(tensor: Tensor, size: int) -> Tensor:
    """``size`` bytes beside ``tensor``. torch's allocator gives them to nobody else before the stream has passed."""
    # 64-bit elements, because tests fill new memory with what must not be read.
    return torch.empty(-(-size // 8), dtype=torch.int64, device=tensor.device)


@functools.cache
def sources() -> str | None:
    """The hash of csrc/cuda as it was when the library was built; ``None`` for the tests' build."""
    found = re.search(r"sources ([0-9a-f]{16})", lib().vqk_build_info().decode())
    return None if found is None else found[1]


def held_back(device: torch.device) -> str | None:
    """Why these kernels are not chosen on a device unless asked for: no green `make gpu` speaks for them."""
    return tuned.untrusted(tuned.device_name(device), "native", sources()) if device.type == "cuda" else None
