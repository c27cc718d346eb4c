"""How a search on CUDA runs: which screen, over how many blocks, in chunks of how many rows; and the call itself.

Called by ``ops/nearest/native.py`` for tensors on a GPU. Any plan gives the same bits: it is about speed and memory
alone, from counted costs (docs/cuda_nearest.md), nothing measured yet.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vqkernels import _cuda, _cuda_selftest, _native

__all__ = ["Device", "Plan", "best_trusted", "describe", "device_of", "plan", "run", "summary", "supports"]

SCREENS = ("float64, no screen", "mma.sync screen", "wgmma screen")
DIRECT, SM80, SM90 = range(3)
# What VQKERNELS_CUDA_SCREEN leaves in the choice.
FORCED = {"": SM90, "auto": SM90, "wgmma": SM90, "mma": SM80, "float64": DIRECT}
# Up to so many products of a row and a code, by dims, everything is decided in float64: two launches instead of nine.
DIRECT_WORK = 2**24
DIRECT_ROWS = 1024
TILE_CODES = 128
SPLIT_DIMS = 10
MOST_SPLITS = 64
# Elements of packed rows, and rows, that are alive at a time.
SCRATCH_ELEMENTS = 2**26
CHUNK_ROWS = 2**18
# What a block does besides its tiles of codes, in tiles: rows in, results out.
BLOCK_OVERHEAD = 2


class Device(NamedTuple):
    """What planning asks of a GPU."""

    capability: tuple[int, int]
    multiprocessors: int
    # Bytes that a block may have: 227 KB on sm_90, 163 on sm_80, 99 on sm_86, sm_89 and sm_120.
    shared: int = 163 * 1024


# What the tests' build, which runs the kernels on the host, pretends to be.
HOSTED = Device((9, 0), 4, 227 * 1024)


class Plan(NamedTuple):
    """``vqk_cuda_search_plan`` of csrc/capi.h, and what :func:`describe` says."""

    screen: int
    splits: int
    chunk_rows: int
    block_rows: int


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def plan(heads: int, rows: int, codes: int, dim: int, device: Device, direct_work: int | None = None) -> Plan:
    """The plan for (H, N, D) rows and (H, K, D) codes; without a screen up to ``direct_work``.

    Example:
        >>> plan(1, 65536, 16384, 256, Device((9, 0), 132))
        Plan(screen=2, splits=1, chunk_rows=65536, block_rows=256)
        >>> plan(1, 8, 2048, 256, Device((9, 0), 132)).screen
        0
    """
    direct_work = DIRECT_WORK if direct_work is None else direct_work
    if heads * rows <= DIRECT_ROWS and heads * rows * codes * dim <= direct_work:
        return Plan(DIRECT, 1, max(rows, 1), 1)
    screen = SM90 if device.capability == (9, 0) and dim <= 512 else SM80
    block_rows = 256 if screen == SM90 and dim <= 256 else 128
    fit = max(256, min(SCRATCH_ELEMENTS // dim, CHUNK_ROWS) // heads // 256 * 256)
    chunk = min(fit, rows)
    blocks, tiles = _ceil_div(chunk, block_rows) * heads, _ceil_div(codes, TILE_CODES)

    def cost(splits: int) -> int:
        return _ceil_div(blocks * splits, device.multiprocessors) * (_ceil_div(tiles, splits) + BLOCK_OVERHEAD)

    return Plan(screen, min(range(1, min(tiles, MOST_SPLITS) + 1), key=cost), chunk, block_rows)


@functools.cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return Device((properties.major, properties.minor), properties.multi_processor_count, shared)


def device_of(x: Tensor) -> Device:
    """Where the kernels of a call with ``x`` run."""
    return _device(x.device.index) if x.is_cuda else HOSTED


def _best() -> int:
    asked = os.environ.get("VQKERNELS_CUDA_SCREEN", "")
    if asked not in FORCED:
        raise ValueError(f"vqkernels: VQKERNELS_CUDA_SCREEN is {asked!r}, not one of wgmma, mma, float64, auto")
    return FORCED[asked] if has_wgmma() else min(FORCED[asked], SM80)


@functools.cache
def has_wgmma() -> bool:
    """Whether the library was built for sm_90a: with sm_90 alone (VQKERNELS_CUDA_ARCHS) the wgmma screen is a trap."""
    built = _cuda.lib().vqk_build_info().decode()
    return "90a" in built or not built.startswith("nvcc")  # the tests' build, where it is C++


def _plan(x: Tensor, codebook: Tensor, ask: bool) -> tuple[Plan, Device]:
    rows, device = x.shape[1] * x.shape[2], device_of(x)
    planned = functools.partial(plan, x.shape[0], rows, codebook.shape[1], codebook.shape[2])
    return best_trusted(planned, x.device, device, rows, codebook.shape[2], ask), device


def best_trusted(
    planned: Callable[[Device], Plan], where: torch.device, device: Device, rows: int, dim: int, ask: bool
) -> Plan:
    """What ``planned`` makes of a device, of screens that passed their self-test; without a screen if none did."""
    best, chosen = _best(), planned(device)
    for screen, lesser in ((SM90, device._replace(capability=(8, 0))), (SM80, None)):
        if chosen.screen != screen or (screen <= best and trusted(where, screen, dim, ask)):
            continue
        chosen = planned(lesser) if lesser else chosen
        if chosen.screen == screen:
            chosen = Plan(DIRECT, 1, max(rows, 1), 1)
    return chosen


def trusted(device: torch.device, screen: int, dim: int, ask: bool = True) -> bool:
    """Whether a screen passed its self-test, which runs if it has not and ``ask``; the tests' build is not asked."""
    if device.type != "cuda":
        return True
    if not ask:
        return _cuda_selftest.known(device, screen, dim) is not False
    return _cuda_selftest.holds(
        device, screen, dim, _small_search, DIRECT, SCREENS[screen], "using the " + SCREENS[screen - 1]
    )


def _small_search(x: Tensor, codebook: Tensor, screen: int) -> tuple[Tensor, Tensor]:
    """One block does it all, so that it goes round its rings."""
    device = device_of(x)
    return _search(x, codebook, "l2", "exact", Plan(screen, 2, 256, 128), device._replace(multiprocessors=1))


def supports(x: Tensor, codebook: Tensor) -> str | None:
    """Why the CUDA kernels cannot search this, or ``None``."""
    for name, tensor in (("x", x), ("codebook", codebook)):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"{name} is {tensor.dtype}, not one of float32, float16, bfloat16 (CUDA)"
    if codebook.shape[1] >= 2**30 or x.shape[0] > 65535 or codebook.shape[2] > 2**20:
        return f"{x.shape[0]} heads, {codebook.shape[1]} codes, {codebook.shape[2]} dims; ids on CUDA are 32-bit"
    return _cuda.unsupported(x)


def describe(x: Tensor, codebook: Tensor) -> str:
    """What :func:`vqkernels.explain` adds to "chosen"."""
    chosen, device = _plan(x, codebook, ask=False)
    wanted = plan(x.shape[0], x.shape[1] * x.shape[2], codebook.shape[1], codebook.shape[2], device)
    return summary(chosen, wanted.screen)


def summary(chosen: Plan, wanted: int) -> str:
    """A plan in words, and that the screen ``wanted`` is left out where it is another one."""
    why = "" if chosen.screen == wanted else f" (the {SCREENS[wanted]} failed its self-test or is ruled out)"
    if chosen.screen == DIRECT:
        return SCREENS[DIRECT] + why
    splits = f", codes split {chosen.splits} times" if chosen.splits > 1 else ""
    return f"{SCREENS[chosen.screen]}, tiles of {chosen.block_rows} rows x {TILE_CODES} codes{splits}{why}"


def run(x: Tensor, codebook: Tensor, metric: str, precision: str) -> tuple[Tensor, Tensor]:
    """Queue the search on torch's current stream; the host waits only for the self-test of a new kind of search."""
    if x.shape[:-1].numel() == 0:
        return _search(x, codebook, metric, precision, Plan(DIRECT, 1, 1, 1), HOSTED)
    return _search(x, codebook, metric, precision, *_plan(x, codebook, ask=True))


def _search(
    x: Tensor, codebook: Tensor, metric: str, precision: str, chosen: Plan, device: Device
) -> tuple[Tensor, Tensor]:
    indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    score = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if indices.numel() == 0:
        return indices, score
    how = _cuda.SearchPlan(chosen.screen, chosen.splits, device.multiprocessors, device.shared, chosen.chunk_rows)
    rows, codes, library = _native.rows(x), _native.codes(codebook), _cuda.lib()
    what = (ctypes.byref(rows), ctypes.byref(codes), _native.METRICS[metric])
    size = library.vqk_cuda_nearest_workspace(*what, ctypes.byref(how))
    if size < 0:
        raise ValueError(f"vqkernels: {library.vqk_last_error().decode()}")
    with _cuda.on_device(x):
        space = _cuda.workspace(x, size)
        _cuda.check(
            library.vqk_cuda_nearest(
                *what,
                _native.PRECISIONS[precision],
                ctypes.byref(how),
                space.data_ptr(),
                indices.data_ptr(),
                score.data_ptr(),
                *_cuda.stream(x),
            )
        )
    return indices, score
