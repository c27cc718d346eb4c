"""What the PTX machine checks while the CUDA library runs on it: a pytest plugin, loaded by test_ptx_cuda.py.

Races for shared memory and between blocks, accesses of global memory. The library gets addresses, some in structures.
Whoever hands one over has asked the tensor for it: from then on, and for as long as it lives, its storage may be
accessed by kernels, and nothing else.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from ptx_machine import ranges
from torch.multiprocessing.reductions import StorageWeakRef

from vqkernels import _cuda

# Storages that were asked for, by address.
handed: dict[int, tuple[StorageWeakRef, int]] = {}


def pytest_configure(config: pytest.Config) -> None:
    """From here on a tensor that is asked for its address is accessible."""
    _cuda.lib().vqk_cuda_ptx_races(1)
    tell = _cuda.lib().vqk_cuda_ptx_global
    tell.restype, tell.argtypes = None, [ctypes.POINTER(ctypes.c_uint64), ctypes.c_uint64]
    data_ptr = torch.Tensor.data_ptr

    def recorded(tensor: torch.Tensor) -> int:
        address = data_ptr(tensor)
        storage = tensor.untyped_storage()
        handed[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        for start in [start for start, (kept, _) in handed.items() if kept.expired()]:
            del handed[start]
        tell(*ranges((start, size) for start, (_, size) in handed.items()))
        return address

    torch.Tensor.data_ptr = recorded  # type: ignore[method-assign]
