"""The building blocks of the CUDA screens one by one, on a tile of known integers: which one is to blame, in seconds.

``python -m benchmarks.gpu_blocks``; the first step of ``make gpu`` that runs a kernel. Bulk copies and barriers, then
for every dim alone the place of every row and column (descriptors, swizzles, steps along the contraction, fragments),
then whole products and their rounding, then a small search. A screen that fails is left out of the steps that follow.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

__all__ = ["CRASHED", "FAILED", "check", "main"]

# What the driver looks for in the last line: a screen that crashes, or never ends, is ruled out for what comes after.
# One that is merely wrong is left out by the library itself.
FAILED, CRASHED = "SCREENS FAILED:", "crashed"
NAMES, LONGEST = {1: "mma.sync", 2: "wgmma"}, {1: 2**20, 2: 512}
SIZE = 128


class Finding(NamedTuple):
    """What is wrong with the products of a layout, by the first block that is."""

    layout: str
    what: str


def _one_dim(d: int, dims: int, values: np.ndarray) -> np.ndarray:
    matrix = np.zeros((SIZE, dims), np.float16)
    matrix[:, d] = values
    return matrix


def _places(products: Callable[..., np.ndarray], dims: int) -> tuple[np.ndarray, np.ndarray]:
    """For every dim alone, which row and which column each sum came from, counted from 0; -1 where it is from none."""
    ones, numbers = np.ones(SIZE), np.arange(1.0, SIZE + 1)
    rows = np.stack([products(_one_dim(d, dims, numbers), _one_dim(d, dims, ones)) for d in range(dims)])
    columns = np.stack([products(_one_dim(d, dims, ones), _one_dim(d, dims, numbers)) for d in range(dims)])
    rows, columns = (np.where((p >= 1) & (p <= SIZE) & (p == np.round(p)), p - 1, -1) for p in (rows, columns))
    return rows.astype(int), columns.astype(int)


def _describe(found: np.ndarray, axis: int, width: int) -> str | None:
    """Where products take an operand from, if not from where it was put; ``found`` is (dims, rows, columns)."""
    name = ("rows (first operand)", "columns (second operand)")[axis]
    expected = np.arange(SIZE)[:, None] if axis == 0 else np.arange(SIZE)[None, :]
    wrong = found != expected
    if not wrong.any():
        return None
    by_dim = wrong.any(axis=(1, 2))
    bad = np.flatnonzero(by_dim)
    place = wrong[bad[0]]
    lines = np.flatnonzero(place.any(axis=1 - axis))
    example = tuple(int(i) for i in np.argwhere(place)[0])
    got = int(found[bad[0]][example])
    told = f"{name}: {len(bad)} of {len(by_dim)} dims misplaced, first dim {bad[0]}"
    told += f"; there sum {example} has {'nothing' if got < 0 else got} instead of {example[axis]}"
    told += f"; {len(lines)} of {SIZE} wrong, first {lines[:8].tolist()}"
    same = all((found[d] == found[0]).all() for d in range(len(found)))
    if not by_dim[:8].any():
        if width > 16 and by_dim[:width].any():
            guess = "the first dims are right: ADVANCING THE DESCRIPTOR ALONG K inside a swizzled row is wrong"
        else:
            guess = "the first panel is right: the OFFSET OF THE NEXT PANEL is wrong"
    elif same:
        guess = "every dim is misplaced alike: the FRAGMENT LAYOUT (or the operands' order) is wrong"
    elif not place[:8].any() if axis == 0 else not place[:, :8].any():
        guess = "the first 8 are right: the STRIDE between groups of 8 (descriptor bits 32-45) is wrong"
    else:
        guess = "dims and places are mixed: the SWIZZLE (descriptor bits 62-63, or the packing) is wrong"
    return f"{told}. {guess}"


FIELDS = {
    "kind": "the SWIZZLE (descriptor bits 62-63, or the packing)",
    "stride": "the STRIDE between groups of 8 rows (bits 32-45)",
    "leading": "the LEADING offset (bits 16-29)",
    "advance": "ADVANCING THE DESCRIPTOR along the contraction",
}


def _alternatives(attempt: Callable[..., np.ndarray], width: int, dims: int, bits: int, advance: int) -> str | None:
    """Other descriptors that are right on this machine, and in what they differ from the one that was used."""
    generator = np.random.default_rng(1)
    a, b = (generator.integers(-8, 9, (SIZE, dims)).astype(np.float16) for _ in range(2))
    wanted = a.astype(np.float64) @ b.astype(np.float64).T
    used = (bits >> 62, bits >> 32 & 0x3FFF, bits >> 16 & 0x3FFF, advance or 2)
    if bits == 0:  # the screen's own
        used = ({16: 3, 32: 2, 64: 1}[width], width, 1, advance or 2)
    right = []
    for new in itertools.product((1, 2, 3), (16, 32, 64), (1, 0, 64), (2, 1, 4)):
        tried = new[0] << 62 | new[1] << 32 | new[2] << 16
        if (attempt(a, b, bits=tried, advance=new[3]) == wanted).all():
            right.append([f"{name} {n} instead of {u}" for name, n, u in zip(FIELDS, new, used, strict=True) if n != u])
    if not right:
        return None
    least = min(right, key=len)
    blamed = " and ".join(FIELDS[change.split()[0]] for change in least)
    return f"{blamed} is wrong: right with {', '.join(least)}"


def check(device: torch.device, screen: int, width: int, panels: int, **descriptor: int) -> Finding | None:
    """The first thing that is wrong with one layout's products, or ``None``.

    Args:
        device: where.
        screen: 1 (mma.sync) or 2 (wgmma).
        width: dims of a panel.
        panels: how many.
        descriptor: ``bits`` and ``advance`` of :func:`vqkernels._cuda_selftest.products`, to plant a mistake.
    """
    from vqkernels import _cuda_selftest as selftest

    dims = width * panels
    name = f"{NAMES[screen]} {width} dims x {panels} (rows of {2 * width} bytes)"
    generator = np.random.default_rng(0)
    a, b = (generator.integers(-8, 9, (SIZE, dims)).astype(np.float16) for _ in range(2))

    def attempt(a: np.ndarray, b: np.ndarray, **others: int) -> np.ndarray:
        return selftest.products(device, screen, width, a, b, **(descriptor | others)).sums

    first = selftest.products(device, screen, width, a, b, copies=screen == 2, **descriptor)
    if first.late:
        return Finding(name, "BULK COPY or MBARRIER: nothing arrived in shared memory within the time")
    if first.copied is not None and first.copied != first.sent:
        at = next(i for i, (x, y) in enumerate(zip(first.copied, first.sent, strict=True)) if x != y)
        return Finding(name, f"BULK COPY: byte {at} of {len(first.sent)} in shared memory is not what was sent")
    if np.isnan(first.sums).all():
        return Finding(name, "no sum was written, or SCALE-D is wrong: the first product added to what was there")
    if (first.sums == a.astype(np.float64) @ b.astype(np.float64).T).all():
        return None
    told = [t for axis, found in enumerate(_places(attempt, dims)) if (t := _describe(found, axis, width))]
    what = "; ".join(told) or "each dim alone is right and their sum is not: ACCUMULATION between steps is wrong"
    better = None
    if screen == 2:
        better = _alternatives(attempt, width, dims, descriptor.get("bits", 0), descriptor.get("advance", 0))
    return Finding(name, f"{better}. By places: {what}" if better else what)


def _rounding(device: torch.device, screen: int, dim: int) -> str | None:
    from vqkernels import _cuda_nearest, _cuda_selftest

    good = _cuda_selftest.holds(
        device, screen, dim, _cuda_nearest._small_search, _cuda_nearest.DIRECT, NAMES[screen], "the next one is used"
    )
    key = _cuda_selftest._key(device, screen, dim)
    verdict = _cuda_selftest.verdicts()[key]
    print(f"  {NAMES[screen]}, search of {dim} dims: {'as the float64 search' if good else 'WRONG: ' + verdict.what}; "
          f"rounding at most {verdict.share:.3f} of the published bound", flush=True)  # fmt: skip
    return None if good else verdict.what


def _screen(device: torch.device, screen: int, dims: list[int]) -> bool:
    from vqkernels import _cuda_selftest

    good = True
    for width, panels in _cuda_selftest.LAYOUTS:
        found = check(device, screen, width, panels)
        print(f"  {NAMES[screen]} {width} x {panels}: {found.what if found else 'ok'}", flush=True)
        good &= found is None
    # Only what multiplies right is asked whether it searches: the ring of a broken one might never end.
    return good and not [dim for dim in dims if dim <= LONGEST[screen] and _rounding(device, screen, dim) is not None]


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status 1 if a screen failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_blocks", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dims", type=int, nargs="+", default=[4, 5, 8, 30, 64, 90, 128, 190, 256, 384, 512, 600])
    options = parser.parse_args(arguments)
    from vqkernels import _cuda, _cuda_nearest

    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device(options.device)
    if (reason := _cuda._load()[1]) is not None or (device.type == "cuda" and (reason := _cuda.unavailable())):
        print(f"no CUDA library here: {reason}")
        return 1
    os.environ.pop("VQKERNELS_CUDA_SCREEN", None)
    hopper = device.type == "cpu" or torch.cuda.get_device_capability(device) == (9, 0)
    if hopper and not _cuda_nearest.has_wgmma():
        print("the library was built without sm_90a: no wgmma screen")
        hopper = False
    failed = []
    for screen in (1, 2) if hopper else (1,):
        start = time.monotonic()
        try:
            bad = "" if _screen(device, screen, options.dims) else "wrong"
        except Exception:
            traceback.print_exc()
            bad = CRASHED
        print(f"{NAMES[screen]}: {bad or 'ok'} ({time.monotonic() - start:.1f} s)", flush=True)
        failed += [f"{NAMES[screen]} {bad}"] if bad else []
    print(f"{FAILED} {', '.join(failed)}" if failed else "every screen multiplies and searches as it should")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
