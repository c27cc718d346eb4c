"""``residual_nearest`` on csrc/cpu/residual_nearest.cpp: all levels in one call, on the kernels of ``nearest``.

Called by ``dispatch``. Packed codebooks come from the same cache as those of ``nearest``; tensors on a GPU go to
``_cuda_residual``.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from vqkernels import _cpu_nearest, _cuda, _native


@functools.cache
def _on_cuda() -> ModuleType | None:
    try:
        return importlib.import_module("vqkernels._cuda_residual")
    except ModuleNotFoundError as e:
        if e.name == "vqkernels._cuda_residual":
            return None
        raise


def supports(x: Tensor, codebooks: Sequence[Tensor], channel_first: bool) -> str | None:
    """Every shape and dtype that the public function lets through."""
    if not _cuda.serves(x):
        return None
    if (module := _on_cuda()) is None:
        return "no CUDA kernel of residual_nearest"
    reason: str | None = module.supports(x, codebooks)
    return reason


def describe(x: Tensor, codebooks: Sequence[Tensor], channel_first: bool) -> str:
    """What :func:`vqkernels.explain` adds to "chosen"."""
    if _cuda.serves(x) and (module := _on_cuda()) is not None:
        return str(module.describe(x, codebooks))
    return f"{_native.ISAS[_isa(_native.lib(), codebooks)]} kernels, {torch.get_num_threads()} threads"


def _isa(lib: ctypes.CDLL, codebooks: Sequence[Tensor]) -> int:
    """One instruction set for all levels: that of the largest."""
    return _cpu_nearest.isa(lib, max(c.shape[1] for c in codebooks), codebooks[0].shape[2])


def run(x: Tensor, codebooks: Sequence[Tensor], channel_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Pack (or reuse) the codebooks and search."""
    if _cuda.serves(x) and (module := _on_cuda()) is not None:
        found: tuple[Tensor, Tensor, Tensor] = module.run(x, codebooks, channel_first)
        return found
    lib = _native.lib()
    (h, b, s, d), levels = x.shape, len(codebooks)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    indices = torch.empty((levels, h, b, s), dtype=torch.int64)
    score = torch.empty((levels, h, b, s), dtype=torch.float32)
    values = torch.empty((h, b, d, s) if channel_first else (h, b, s, d), dtype=dtype)
    if indices.numel() == 0:
        return indices, values, score
    isa = _isa(lib, codebooks)
    dense = [c.contiguous() for c in codebooks]
    codes = (_native.Codes * levels)(*map(_native.codes, dense))
    rows, out = _native.rows(x), _native.rows(values.transpose(2, 3) if channel_first else values)
    rows_at = ctypes.byref(rows)
    # By codebook, so that one which serves several levels is read once; and to keep them alive during the call.
    kept: dict[int, Tensor] = {}
    packed = None
    # As in nearest: a few rows are searched in the codebooks themselves.
    if lib.vqk_cpu_residual_nearest_needs_packing(rows_at, codes, levels):
        for given, described in zip(codebooks, codes, strict=True):
            if id(given) not in kept:
                kept[id(given)] = _cpu_nearest.packed(lib, given, described, _native.METRICS["l2"], isa)
        packed = (ctypes.c_void_p * levels)(*[kept[id(given)].data_ptr() for given in codebooks])
    _native.check(
        lib.vqk_cpu_residual_nearest(
            rows_at,
            codes,
            levels,
            isa,
            packed,
            _native.int64_pointer(indices),
            _native.float_pointer(score),
            ctypes.byref(out),
        )
    )
    return indices, values, score
