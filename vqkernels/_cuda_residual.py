"""How a residual search on CUDA runs: a few rows in one launch, many by the screen of ``nearest``; and the call itself.

Called by ``ops/residual_nearest/native.py`` for tensors on a GPU. Both ways give the same bits; which one is taken is
from counted costs (docs/cuda_nearest.md), nothing measured yet.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from vqkernels import _cuda, _cuda_nearest, _native
from vqkernels._cuda_nearest import DIRECT, Device, Plan

__all__ = ["describe", "plan", "run", "supports"]

# Up to so many products per level, every pair in float64 takes less than the launches of a screened level.
DIRECT_WORK = 2**25
# Machines with 32 or more lanes for float64 per multiprocessor; others have two.
FLOAT64 = ((8, 0), (9, 0), (10, 0))
# What the one launch is built for: its table of codebooks, and the residuals that a block keeps.
MOST_LEVELS = 64
MOST_DIMS = 512
TILE_ROWS = 16


def plan(heads: int, rows: int, sizes: Sequence[int], dim: int, device: Device) -> Plan:
    """The plan for (H, N, D) rows and codebooks of so many codes.

    Example:
        >>> plan(1, 64, [2048] * 32, 256, Device((9, 0), 132)).screen
        0
        >>> plan(1, 48000, [1024] * 8, 128, Device((9, 0), 132)).screen
        2
    """
    work = DIRECT_WORK if device.capability in FLOAT64 else DIRECT_WORK // 32
    fits = _fits(heads, rows, len(sizes), dim, device)
    return _cuda_nearest.plan(heads, rows, max(sizes), dim, device, work if fits else -1)


def _fits(heads: int, rows: int, levels: int, dim: int, device: Device) -> bool:
    # Rows of a tile belong to one block at least, and all blocks must be resident.
    tiles = heads * -(-rows // TILE_ROWS)
    return levels <= MOST_LEVELS and dim <= MOST_DIMS and tiles <= device.multiprocessors


def _plan(x: Tensor, codebooks: Sequence[Tensor], ask: bool) -> tuple[Plan | None, Device]:
    """The plan, of screens that passed their self-test; ``None``: no one launch, and no screen that may be used."""
    (h, b, s, d), device = x.shape, _cuda_nearest.device_of(x)

    def planned(device: Device) -> Plan:
        return plan(h, b * s, [e.shape[1] for e in codebooks], d, device)

    chosen = _cuda_nearest.best_trusted(planned, x.device, device, b * s, d, ask)
    fits = chosen.screen != DIRECT or _fits(h, b * s, len(codebooks), d, device)
    return (chosen if fits else None), device


def supports(x: Tensor, codebooks: Sequence[Tensor]) -> str | None:
    """Why the CUDA kernels cannot search this, or ``None``."""
    for level, codebook in enumerate(codebooks):
        if (reason := _cuda_nearest.supports(x, codebook)) is not None:
            return f"level {level}: {reason}"
    if x.shape[0] * len(codebooks) > 65535:
        return f"{x.shape[0]} heads of {len(codebooks)} levels, at most 65535 in all"
    return None


def describe(x: Tensor, codebooks: Sequence[Tensor]) -> str:
    """What :func:`vqkernels.explain` adds to "chosen"."""
    chosen, device = _plan(x, codebooks, ask=False)
    if chosen is None:
        return "float64, no screen, level by level"
    (h, b, s, d), sizes = x.shape, [e.shape[1] for e in codebooks]
    how = "all levels in one launch" if chosen.screen == DIRECT else "codes of all levels packed together"
    return f"{_cuda_nearest.summary(chosen, plan(h, b * s, sizes, d, device).screen)}, {how}"


def run(x: Tensor, codebooks: Sequence[Tensor], channel_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queue the search of all levels on torch's current stream; the host waits only for self-tests of new searches."""
    (h, b, s, d), levels = x.shape, len(codebooks)
    indices = torch.empty((levels, h, b, s), dtype=torch.int64, device=x.device)
    score = torch.empty((levels, h, b, s), dtype=torch.float32, device=x.device)
    values = torch.empty((h, b, d, s) if channel_first else (h, b, s, d), dtype=torch.float32, device=x.device)
    if indices.numel() == 0:
        return indices, values, score
    chosen, device = _plan(x, codebooks, ask=True)
    if chosen is None:
        _level_by_level(x, codebooks, indices, values.transpose(2, 3) if channel_first else values, score)
        return indices, values, score
    how = _cuda.SearchPlan(chosen.screen, chosen.splits, device.multiprocessors, device.shared, chosen.chunk_rows)
    rows, out = _native.rows(x), _native.rows(values.transpose(2, 3) if channel_first else values)
    table = (_native.Codes * levels)(*map(_native.codes, codebooks))
    what, library = (ctypes.byref(rows), table, levels, ctypes.byref(how)), _cuda.lib()
    size = library.vqk_cuda_residual_nearest_workspace(*what)
    if size < 0:
        raise ValueError(f"vqkernels: {library.vqk_last_error().decode()}")
    with _cuda.on_device(x):
        space = _cuda.workspace(x, size)
        _cuda.check(
            library.vqk_cuda_residual_nearest(
                *what,
                space.data_ptr(),
                indices.data_ptr(),
                ctypes.byref(out),
                score.data_ptr(),
                *_cuda.stream(x),
            )
        )
    return indices, values, score


def _level_by_level(x: Tensor, codebooks: Sequence[Tensor], indices: Tensor, values: Tensor, score: Tensor) -> None:
    """The definition, on ``nearest`` as it runs here: what is left where no screen can be trusted."""
    residual = x.float()
    values.zero_()
    for level, codebook in enumerate(codebooks):
        indices[level], score[level] = _cuda_nearest.run(residual, codebook, "l2", "exact")
        chosen = torch.stack([e[i] for e, i in zip(codebook.float(), indices[level], strict=True)])
        residual = residual - chosen
        values += chosen
