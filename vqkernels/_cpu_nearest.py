"""What a search on the CPU needs before its call: the instruction set, and packed codebooks, which are kept.

Called by ``ops/nearest/native.py`` and ``ops/residual_nearest/native.py``. Packing costs O(K*D); a packed codebook is
served again only if a 128-bit fingerprint of the *content*, read anew on every call, still matches: in-place updates,
``.data`` swaps and optimiser steps are seen because nothing but the values is trusted.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections import OrderedDict

import torch
from torch import Tensor

from vqkernels import _native

__all__ = ["clear", "isa", "packed"]

_lock = threading.Lock()
_cache: OrderedDict[tuple[object, ...], tuple[tuple[int, int], Tensor]] = OrderedDict()
_kept = 0  # bytes in it


def isa(lib: ctypes.CDLL, num_codes: int, dim: int) -> int:
    """The instruction set that was asked for, else the fastest for these sizes."""
    if os.environ.get("VQKERNELS_ISA", "auto") not in ("", "auto"):
        return _native.isa()
    return _fastest(lib, num_codes, dim)


@functools.cache
def _fastest(lib: ctypes.CDLL, num_codes: int, dim: int) -> int:
    return int(lib.vqk_cpu_nearest_isa(num_codes, dim))


def _budget() -> int:
    # The default holds 32 levels of 2048 x 256 in float32, 67 MB: a codec's levels would push each other out of less.
    return int(float(os.environ.get("VQKERNELS_CACHE_MB", "128")) * 2**20)


def packed(lib: ctypes.CDLL, given: Tensor, codes: _native.Codes, metric: int, isa: int) -> Tensor:
    """``codes``, which describe the contiguous form of the codebook ``given``, packed for this instruction set."""
    found = (ctypes.c_uint64 * 2)()
    _native.check(lib.vqk_cpu_nearest_fingerprint(ctypes.byref(codes), found))
    fingerprint = (int(found[0]), int(found[1]))
    # The key only says which entry to replace when a codebook changes; the fingerprint decides whether it serves.
    key = (given.data_ptr(), given.dtype, given.shape, given.stride(), metric, isa)
    with _lock:
        entry = _cache.get(key)
        if entry is not None and entry[0] == fingerprint:
            _cache.move_to_end(key)
            return entry[1]
    size = lib.vqk_cpu_nearest_packed_bytes(ctypes.byref(codes), metric, isa)
    storage = torch.empty(size + 64, dtype=torch.uint8)
    result = storage[-storage.data_ptr() % 64 :][:size]
    _native.check(lib.vqk_cpu_nearest_pack(ctypes.byref(codes), metric, isa, result.data_ptr()))
    with _lock:
        _forget(key)
        _keep(key, fingerprint, result)
    return result


def _keep(key: tuple[object, ...], fingerprint: tuple[int, int], packed: Tensor) -> None:
    global _kept
    size, budget = packed.untyped_storage().nbytes(), _budget()
    if size > budget:
        return
    _cache[key] = (fingerprint, packed)
    _kept += size
    while _kept > budget:
        _forget(next(iter(_cache)))


def _forget(key: tuple[object, ...]) -> None:
    global _kept
    if (entry := _cache.pop(key, None)) is not None:
        _kept -= entry[1].untyped_storage().nbytes()


def clear() -> None:
    """Forget every packed codebook."""
    global _kept
    with _lock:
        _cache.clear()
        _kept = 0
