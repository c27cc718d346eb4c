"""Builds the PTX machine of the folder ptx and launches kernels on it: tensors of the CPU are its global memory."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from building import cmake

# Orders of execution: in turns, then mixtures in which anyone goes on, the same ones do, or others starve.
SEEDS = (0, 1, 2, 3, 4, 5)


@functools.cache
def build(sanitize: bool = False) -> Path:
    """The folder with ``libvqk_ptx.so`` and ``libvqk_ptx_machine.a``, up to date."""
    flags = [f"-DVQK_SANITIZE={'ON' if sanitize else 'OFF'}"]
    return cmake("tests/gpu_free/ptx", "ptx_asan" if sanitize else "ptx", flags, ["vqk_ptx"])


@functools.cache
def library() -> ctypes.CDLL:
    """The functions of api.cpp, with the sanitizers if the process has AddressSanitizer (``make asan``)."""
    lib = ctypes.CDLL(str(build("libasan" in os.environ.get("LD_PRELOAD", "")) / "libvqk_ptx.so"))
    text, pointer, number = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint64
    for name, result, arguments in (
        ("ptx_load", pointer, [text]),
        ("ptx_unload", None, [pointer]),
        ("ptx_kernels", text, [pointer]),
        ("ptx_parameters", text, [pointer, text]),
        ("ptx_launch", ctypes.c_int, [pointer, text, pointer, pointer, number, pointer, ctypes.c_int]),
        ("ptx_error", text, []),
        ("ptx_seed", None, [number]),
        ("ptx_races", None, [ctypes.c_int]),
        ("ptx_shared_limit", None, [number]),
        ("ptx_global", None, [ctypes.POINTER(number), number]),
        ("ptx_launches", number, []),
        ("ptx_instructions", number, []),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class PtxError(RuntimeError):
    """What the machine found wrong: it names kernel, line, block and thread."""


Argument = Any  # a tensor, an int, a float, bytes, or an object of ctypes
_INTEGERS = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}
_FLOATS = {4: ctypes.c_float, 8: ctypes.c_double}


def _converted(value: Argument, size: int) -> Any:
    """A parameter of ``size`` bytes; tensors are their address, bytes a struct."""
    if isinstance(value, torch.Tensor):
        return ctypes.c_uint64(value.data_ptr())
    if isinstance(value, int):
        return _INTEGERS[size](value)
    if isinstance(value, float):
        return _FLOATS[size](value)
    if isinstance(value, bytes):
        return ctypes.create_string_buffer(value, len(value))
    return value


class Module:
    """The kernels of a PTX text."""

    def __init__(self, text: str) -> None:
        self._unload = library().ptx_unload
        self._handle = library().ptx_load(text.encode())
        if not self._handle:
            raise PtxError(library().ptx_error().decode())

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._unload(self._handle)

    def kernels(self) -> list[str]:
        """Their names, as in the text."""
        names: bytes = library().ptx_kernels(self._handle)
        return names.decode().split()

    def parameters(self, kernel: str) -> list[int]:
        """How many bytes each parameter has."""
        sizes = library().ptx_parameters(self._handle, kernel.encode())
        if sizes is None:
            raise PtxError(library().ptx_error().decode())
        return [int(size) for size in sizes.split()]

    def launch(
        self,
        kernel: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        *arguments: Argument,
        shared: int = 0,
        cooperative: bool = False,
        programmatic: bool = False,
        memory: Sequence[torch.Tensor] = (),
    ) -> None:
        """Run a grid to its end. Integers and floats get the size of their parameter.

        Args:
            memory: outside of these tensors' storages, accesses of global memory are errors; none: not checked.
        """
        sizes = self.parameters(kernel)
        values = [_converted(value, size) for value, size in zip(arguments, sizes, strict=True)]
        assert [ctypes.sizeof(value) for value in values] == sizes
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        library().ptx_global(*ranges(storages(memory)))
        failed = library().ptx_launch(
            self._handle, kernel.encode(), _three(grid), _three(block), shared, pointers, cooperative + 2 * programmatic
        )
        library().ptx_global(None, 0)
        if failed:
            raise PtxError(library().ptx_error().decode())


def storages(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """Address and bytes of what tensors lie in."""
    return [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors]


def ranges(storages: Iterable[tuple[int, int]]) -> tuple[ctypes.Array[ctypes.c_uint64], int]:
    """The arguments of ``ptx_global``."""
    bounds = [bound for address, size in storages for bound in (address, address + size)]
    return (ctypes.c_uint64 * len(bounds))(*bounds), len(bounds) // 2


def _three(size: int | Sequence[int]) -> ctypes.Array[ctypes.c_uint32]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return (ctypes.c_uint32 * 3)(*sizes, *(1,) * (3 - len(sizes)))


def set_seed(seed: int) -> None:
    """Choose the order in which warps run, for all launches from now on."""
    library().ptx_seed(seed)


def set_races(on: bool) -> None:
    """Choose whether races for shared memory, and between blocks for global memory, are looked for; costs time."""
    library().ptx_races(on)


def set_shared_limit(size: int) -> None:
    """Choose how much shared memory a block may have."""
    library().ptx_shared_limit(size)


def launches() -> int:
    """How many kernels have been started."""
    return int(library().ptx_launches())


def instructions() -> int:
    """How many instructions warps have executed."""
    return int(library().ptx_instructions())
