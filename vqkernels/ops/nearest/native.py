"""``nearest`` on the kernels of csrc/cpu/nearest*.cpp, with a cache of packed codebooks, and of csrc/cuda/nearest*.

Called by ``dispatch``. ``_cpu_nearest`` keeps what was packed; tensors on a GPU go to ``_cuda_nearest``, which packs
on every call.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vqkernels import _cpu_nearest, _cuda, _cuda_nearest, _native


def supports(x: Tensor, codebook: Tensor, metric: str, precision: str) -> str | None:
    """Every shape and dtype that the public function lets through; on CUDA no float64."""
    return _cuda_nearest.supports(x, codebook) if _cuda.serves(x) else None


def describe(x: Tensor, codebook: Tensor, metric: str, precision: str) -> str:
    """What :func:`vqkernels.explain` adds to "chosen"."""
    if _cuda.serves(x):
        return _cuda_nearest.describe(x, codebook)
    return f"{_native.ISAS[_isa(_native.lib(), codebook)]} kernels, {torch.get_num_threads()} threads"


def _isa(lib: ctypes.CDLL, codebook: Tensor) -> int:
    return _cpu_nearest.isa(lib, codebook.shape[1], codebook.shape[2])


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
        packed = _cpu_nearest.packed(lib, given, codes, _native.METRICS[metric], isa)
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
    _cpu_nearest.clear()
