"""``nearest`` on the kernels of csrc/cpu/nearest*.cpp, with a cache of packed codebooks, and of csrc/cuda/nearest*.

Called by ``dispatch``. Packing costs O(K*D); a packed codebook is kept and served again only if a 128-bit fingerprint
of the *content*, read anew on every call, still matches: in-place updates, ``.data`` swaps and optimiser steps are
seen because nothing but the values is trusted. Tensors on a GPU go to ``_cuda_nearest``, which packs on every call.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections import OrderedDict

import torch
from torch import Tensor

from vqkernels import _cuda, _cuda_nearest, _native


def supports(x: Tensor, codebook: Tensor, metric: str, precision: str) -> str | None:
    """Every shape and dtype that the public function lets through; on CUDA no float64."""
    return _cuda_nearest.supports(x, codebook) if _cuda.serves(x) else None


def describe(x: Tensor, codebook: Tensor, metric: str, precision: str) -> str:
    """What :func:`vqkernels.explain` adds to "chosen"."""
    if _cuda.serves(x):
        return _cuda_nearest.describe(x, codebook)
    return f"{_native.ISAS[_isa(_native.lib(), codebook)]} kernels, {torch.get_num_threads()} threads"


def _isa(lib: ctypes.CDLL, codebook: Tensor) -> int:
    """The instruction set that was asked for, else the fastest for these sizes."""
    if os.environ.get("VQKERNELS_ISA", "auto") not in ("", "auto"):
        return _native.isa()
    return _fastest(lib, codebook.shape[1], codebook.shape[2])


@functools.cache
def _fastest(lib: ctypes.CDLL, codes: int, dim: int) -> int:
    return int(lib.vqk_cpu_nearest_isa(codes, dim))


_lock = threading.Lock()
_cache: OrderedDict[tuple[object, ...], tuple[tuple[int, int], Tensor]] = OrderedDict()
_kept = 0  # bytes in it


def _budget() -> int:
    return int(float(os.environ.get("VQKERNELS_CACHE_MB", "64")) * 2**20)


def _packed(lib: ctypes.CDLL, key: tuple[object, ...], codes: _native.Codes, metric: int, isa: int) -> Tensor:
    found = (ctypes.c_uint64 * 2)()
    _native.check(lib.vqk_cpu_nearest_fingerprint(ctypes.byref(codes), found))
    fingerprint = (int(found[0]), int(found[1]))
    # The key only says which entry to replace when a codebook changes; the fingerprint decides whether it serves.
    with _lock:
        entry = _cache.get(key)
        if entry is not None and entry[0] == fingerprint:
            _cache.move_to_end(key)
            return entry[1]
    size = lib.vqk_cpu_nearest_packed_bytes(ctypes.byref(codes), metric, isa)
    storage = torch.empty(size + 64, dtype=torch.uint8)
    packed = storage[-storage.data_ptr() % 64 :][:size]
    _native.check(lib.vqk_cpu_nearest_pack(ctypes.byref(codes), metric, isa, packed.data_ptr()))
    with _lock:
        _forget(key)
        _keep(key, fingerprint, packed)
    return packed


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


def run(x: Tensor, codebook: Tensor, metric: str, precision: str) -> tuple[Tensor, Tensor]:
    """Pack (or reuse) the codebook and search."""
    if _cuda.serves(x):
        return _cuda_nearest.run(x, codebook, metric, precision)
    lib = _native.lib()
    h, b, s, _ = x.shape
    indices = torch.empty((h, b, s), dtype=torch.int64)
    score = torch.empty((h, b, s), dtype=torch.float32)
    if indices.numel() == 0:
        return indices, score
    isa, given = _isa(lib, codebook), codebook
    codebook = codebook.contiguous()
    rows, codes = _native.rows(x), _native.codes(codebook)
    rows_at, codes_at = ctypes.byref(rows), ctypes.byref(codes)
    # A few rows are searched in the codebook itself: packing it, or checking that it is unchanged, would cost more.
    packed = None
    if precision == "fast" or lib.vqk_cpu_nearest_needs_packing(rows_at, codes_at):
        key = (given.data_ptr(), given.dtype, given.shape, given.stride(), metric, isa)
        packed = _packed(lib, key, codes, _native.METRICS[metric], isa)
    _native.check(
        lib.vqk_cpu_nearest(
            rows_at,
            codes_at,
            _native.METRICS[metric],
            _native.PRECISIONS[precision],
            isa,
            None if packed is None else packed.data_ptr(),
            indices.data_ptr(),
            score.data_ptr(),
        )
    )
    return indices, score


def clear_cache() -> None:
    """Forget every packed codebook."""
    global _kept
    with _lock:
        _cache.clear()
        _kept = 0
