"""Find, load and version-check the native library, and hand torch's thread pool to it.

Called by ``dispatch`` (is it there?) and by every ``ops/<op>/native.py`` (call it). A missing or broken library is
never an error at import: the reason is kept for :func:`vqkernels.info` and for explicit requests.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import struct
import sys
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["ABI_VERSION", "ISAS", "Codes", "Rows", "codes", "isa", "lib", "rows", "unavailable"]

log = logging.getLogger("vqkernels")

ABI_VERSION = 5
ISAS = ("scalar", "avx2", "avx512", "avx512bf16", "amx", "neon")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
METRICS = {"l2": 0, "cosine": 1, "dot": 2}
PRECISIONS = {"exact": 0, "fast": 1}
GRADIENTS = {"straight_through": 0, "rotation": 1, "none": 2}


class Rows(Structure):
    """``vqk_rows`` of csrc/capi.h: (H, B, S, D) with strides in elements."""

    _fields_ = [
        ("data", c_void_p),
        ("size", c_int64 * 4),
        ("stride", c_int64 * 4),
        ("dtype", c_int32),
        ("reserved", c_int32),
    ]


class Codes(Structure):
    """``vqk_codes`` of csrc/capi.h: (H, K, D) with strides in elements."""

    _fields_ = [
        ("data", c_void_p),
        ("size", c_int64 * 3),
        ("stride", c_int64 * 3),
        ("dtype", c_int32),
        ("reserved", c_int32),
    ]


# One `pack` and one copy fill a struct in a third of the time of ctypes' own conversion of two arrays.
_ROWS, _CODES = struct.Struct("@P4q4qii"), struct.Struct("@P3q3qii")
_rows, _codes = POINTER(Rows), POINTER(Codes)
_int32, _int64, _float, _double = POINTER(c_int32), POINTER(c_int64), POINTER(c_float), POINTER(c_double)
# tests/test_native.py compares this table with csrc/capi.h and with the exported symbols.
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "vqk_abi_version": (c_int32, []),
    "vqk_last_error": (c_char_p, []),
    "vqk_cpu_set_parallel_for": (None, [c_void_p]),
    "vqk_cpu_set_num_threads": (None, [c_int32]),
    "vqk_cpu_has_isa": (c_int32, [c_int32]),
    "vqk_cpu_best_isa": (c_int32, []),
    "vqk_build_info": (c_char_p, []),
    "vqk_cpu_nearest_isa": (c_int32, [c_int64, c_int64]),
    "vqk_cpu_nearest_needs_packing": (c_int32, [_rows, _codes]),
    "vqk_cpu_nearest_fingerprint": (c_int32, [_codes, POINTER(c_uint64)]),
    "vqk_cpu_nearest_packed_bytes": (c_int64, [_codes, c_int32, c_int32]),
    "vqk_cpu_nearest_pack": (c_int32, [_codes, c_int32, c_int32, c_void_p]),
    "vqk_cpu_nearest": (
        c_int32,
        [_rows, _codes, c_int32, c_int32, c_int32, c_void_p, POINTER(c_int64), POINTER(c_float)],
    ),
    "vqk_cpu_residual_nearest_needs_packing": (c_int32, [_rows, _codes, c_int32]),
    "vqk_cpu_residual_nearest": (
        c_int32,
        [_rows, _codes, c_int32, c_int32, POINTER(c_void_p), POINTER(c_int64), POINTER(c_float), _rows],
    ),
    "vqk_cpu_lookup": (c_int32, [_codes, POINTER(c_int64), _rows]),
    "vqk_cpu_codebook_sum": (c_int32, [_rows, POINTER(c_int64), c_int64, c_void_p, POINTER(c_float)]),
    "vqk_cpu_ema_update": (
        c_int32,
        [
            POINTER(c_float),
            POINTER(c_float),
            POINTER(c_float),
            POINTER(c_float),
            POINTER(c_float),
            c_int64,
            c_int64,
            c_int64,
            c_double,
            c_double,
            c_int32,
        ],
    ),
    "vqk_cpu_quantize_grad": (c_int32, [_rows, _rows, _codes, POINTER(c_int64), c_double, c_int32, _rows]),
    "vqk_cpu_quantize_output": (
        c_int32,
        [_rows, _codes, POINTER(c_int64), POINTER(c_float), _rows, c_void_p, c_void_p, POINTER(c_double)],
    ),
    "vqk_cpu_soft_assign": (
        c_int32,
        [_rows, _codes, POINTER(c_float), c_int32, c_double, c_int32, POINTER(c_float), POINTER(c_float)],
    ),
    "vqk_cpu_soft_assign_grad": (
        c_int32,
        [
            _rows,
            _codes,
            POINTER(c_float),
            POINTER(c_float),
            POINTER(c_float),
            _rows,
            _codes,
            c_int32,
            c_double,
            c_int32,
            _rows,
            POINTER(c_float),
        ],
    ),
}


def _library_path() -> Path:
    name = {"darwin": "libvqk_cpu.dylib", "win32": "vqk_cpu.dll"}.get(sys.platform, "libvqk_cpu.so")
    if override := os.environ.get("VQKERNELS_LIBRARY"):
        return Path(override)
    import vqkernels

    # An editable install keeps the library in site-packages and the sources elsewhere: both are on __path__.
    for root in vqkernels.__path__:
        if (path := Path(root) / "lib" / name).exists():
            return path
    raise OSError(f"{name} was not built (no working C++ compiler at install time, or VQKERNELS_PURE=1)")


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or the reason why there is none."""
    try:
        path = _library_path()
    except OSError as e:
        return None, str(e)
    library, reason = _open(path)
    if library is None:
        # Unlike a library that was never built, this one was expected to work.
        log.warning("the native library is not used, which is slow: %s", reason)
    return library, reason


def _open(path: Path) -> tuple[ctypes.CDLL | None, str | None]:
    try:
        library = ctypes.CDLL(str(path))
        library.vqk_abi_version.restype = c_int32
        if (found := library.vqk_abi_version()) != ABI_VERSION:
            return None, f"{path.name} has ABI version {found}, this package needs {ABI_VERSION}: install it again"
        for name, (restype, argtypes) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = restype, addresses(argtypes)
    except (OSError, AttributeError) as e:
        return None, str(e)
    library.vqk_cpu_set_parallel_for(_torch_parallel_for())
    return library, None


def _torch_parallel_for() -> int | None:
    """Address of libtorch's exported thread pool (torch >= 2.10), so that ``torch.set_num_threads`` rules here too."""
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    prefix = "" if sys.platform == "win32" else "lib"
    try:
        libtorch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"{prefix}torch_cpu.{suffix}"))
        return ctypes.cast(libtorch.torch_parallel_for, c_void_p).value
    except (OSError, AttributeError):
        return None


def addresses(argtypes: list[Any]) -> list[Any]:
    """``argtypes`` for calls: ``data_ptr()`` is a number, and to cast it to a typed pointer would take time."""
    return [c_void_p if t in (_int32, _int64, _float, _double) else t for t in argtypes]


def lib() -> ctypes.CDLL:
    """The loaded library, told the current number of threads.

    Raises:
        RuntimeError: there is none; the message says why.
    """
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"vqkernels: the native library is not available: {reason}")
    library.vqk_cpu_set_num_threads(torch.get_num_threads())
    return library


def unavailable(device: str = "cpu") -> str | None:
    """Why the CPU library cannot serve this kind of device, or ``None``; CUDA has a library of its own (``_cuda``)."""
    if device != "cpu":
        return f"no native kernels for {device} devices"
    return _load()[1]


def isa() -> int:
    """The instruction set to use: ``VQKERNELS_ISA`` if set, else the best of this machine.

    Raises:
        ValueError: ``VQKERNELS_ISA`` names none, or one that this machine or build lacks.
    """
    library = lib()
    name = os.environ.get("VQKERNELS_ISA", "")
    if not name or name == "auto":
        return int(library.vqk_cpu_best_isa())
    if name not in ISAS:
        raise ValueError(f"VQKERNELS_ISA is {name!r}; expected one of {', '.join(ISAS)}")
    if not library.vqk_cpu_has_isa(ISAS.index(name)):
        raise ValueError(f"VQKERNELS_ISA is {name!r}, which this machine or build cannot run; it has {supported()}")
    return ISAS.index(name)


def supported() -> list[str]:
    """Names of the instruction sets that this machine and build can run."""
    return [name for i, name in enumerate(ISAS) if lib().vqk_cpu_has_isa(i)]


def check(status: int) -> None:
    """Raise what the library reported."""
    if status != 0:
        message = lib().vqk_last_error().decode()
        raise {1: ValueError, 2: MemoryError}.get(status, RuntimeError)(f"vqkernels: {message}")


def rows(x: Tensor) -> Rows:
    """Describe ``x`` (H, B, S, D) to the library. The caller keeps ``x`` alive."""
    return Rows.from_buffer_copy(_ROWS.pack(x.data_ptr(), *x.shape, *x.stride(), DTYPES[x.dtype], 0))


def codes(codebook: Tensor) -> Codes:
    """Describe ``codebook`` (H, K, D) to the library. The caller keeps it alive."""
    return Codes.from_buffer_copy(
        _CODES.pack(codebook.data_ptr(), *codebook.shape, *codebook.stride(), DTYPES[codebook.dtype], 0)
    )
