"""Whether a GPU multiplies as the screens of csrc/cuda take for granted: asked before the first search of each kind.

Called by ``_cuda_nearest``. Worst-case vectors go through the screen's own products (is the bound on their rounding
true here?), then a small search through the screen itself against a search in float64. A screen that fails is not used
again in this process: wgmma falls back to mma.sync, and that to comparing everything in float64, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqkernels import _cuda
from vqkernels._triton.selftest import published

__all__ = ["LAYOUTS", "Verdict", "forget", "holds", "known", "layout", "pack", "products", "verdicts", "worst_cases"]

ROWS = COLUMNS = 128
TRAILER = 1024
CHECKED = 600  # rows of the small search
# By screen (_cuda_nearest.SM80, SM90), the (width, panels) whose products vqk_cuda_nearest_products takes apart.
LAYOUTS = ((16, 1), (32, 1), (32, 3), (64, 1), (64, 4), (64, 8))
Layout = tuple[int, int]
Key = tuple[torch.device, int, int, int, bool]


class Verdict(NamedTuple):
    """Whether a screen holds; the largest rounding seen, as a share of the published bound; what went wrong."""

    holds: bool
    share: float
    what: str


_verdicts: dict[Key, Verdict] = {}


def layout(dim: int) -> Layout:
    """How wide the panels of a search are and how many, as nearest.cu has it, but for numbers that it rounds up."""
    dims = 3 * dim if dim <= 10 else dim
    if dims <= 32:
        return (16 if dims <= 16 else 32), 1
    if 64 < dims <= 96:
        return 32, 3
    return 64, -(-dims // 64)


def pack(matrix: np.ndarray, width: int, block: int) -> np.ndarray:
    """Float16 rows in the order of shared memory, written from the PTX manual alone: bytes, a block of rows at a time.

    Panels of ``width`` elements; the 16-byte units of a panel's rows of 32, 64 or 128 bytes are permuted by an
    exclusive or of address bits 4.. with bits 7.. (1, 2 or 3 of them), over 8 rows at a time.
    """
    pitch = 2 * width
    out = []
    for first in range(0, len(matrix), block):
        for panel in range(0, matrix.shape[1], width):
            source = np.ascontiguousarray(matrix[first : first + block, panel : panel + width], dtype=np.float16)
            units = source.view(np.uint8).reshape(-1, 16)  # in the order of plain rows
            plain = np.arange(len(units)) * 16
            swizzled = plain ^ ((plain >> 7 & (pitch // 16 - 1)) << 4)
            there = np.empty_like(units)
            there[swizzled // 16] = units
            out.append(there.reshape(-1))
    return np.concatenate(out)


class Products(NamedTuple):
    """What came back from :func:`products`."""

    sums: np.ndarray
    copied: bytes | None
    sent: bytes
    late: bool


def products(
    device: torch.device, screen: int, width: int, a: np.ndarray, b: np.ndarray, bits: int = 0, advance: int = 0,
    copies: bool = False,
) -> Products:  # fmt: skip
    """(128, 128) sums of the rows of ``a`` and ``b``, both (128, D) float16, by a screen's building blocks. Waits.

    Args:
        device: where.
        screen: ``_cuda_nearest.SM80`` or ``SM90``.
        width: of the panels; D is a multiple.
        a: rows.
        b: columns.
        bits: descriptors to try instead of the screen's own, without the address ("wgmma" only).
        advance: 16-byte units from one step of 16 dims to the next, likewise.
        copies: also bring back what the bulk copies brought into shared memory.
    """
    library = _cuda.lib()
    rows, codes = pack(a, width, 64), pack(b, width, COLUMNS)
    there = [torch.from_numpy(x).to(device) for x in (rows, np.concatenate([codes, np.zeros(TRAILER, np.uint8)]))]
    sums = torch.full((ROWS, COLUMNS), float("nan"), dtype=torch.float32, device=device)
    copied = torch.zeros(len(rows) + len(codes), dtype=torch.uint8, device=device)
    late = torch.zeros(1, dtype=torch.int32, device=device)
    with _cuda.on_device(sums):
        _cuda.check(
            library.vqk_cuda_nearest_products(
                screen, width, a.shape[1] // width, there[0].data_ptr(), there[1].data_ptr(),
                sums.data_ptr(), copied.data_ptr() if copies else None, late.data_ptr(),
                bits, advance, *_cuda.stream(sums),
            )
        )  # fmt: skip
        found = sums.cpu().numpy()
    arrived = copied.cpu().numpy().tobytes() if copies else None
    return Products(found, arrived, rows.tobytes() + codes.tobytes(), bool(late.item()))


def verdicts() -> dict[Key, Verdict]:
    """What has been found out in this process."""
    return dict(_verdicts)


def known(device: torch.device, screen: int, dim: int) -> bool | None:
    """What is known about searches of ``dim`` dims; ``None``: nothing yet."""
    verdict = _verdicts.get(_key(device, screen, dim))
    return None if verdict is None else verdict.holds


def _key(device: torch.device, screen: int, dim: int) -> Key:
    width, panels = layout(dim)
    folded = panels == 1 and width <= 32 and (3 * dim if dim <= 10 else dim) + 3 <= width  # the bias is in the operands
    return device, screen, width, min(panels, 9), folded


def forget() -> None:
    """Ask again."""
    _verdicts.clear()


def worst_cases(count: int, dim: int, generator: np.random.Generator) -> np.ndarray:
    """One large element, elsewhere small ones whose low bits an accumulator aligned to the large one cuts off."""
    row = np.arange(count)
    small = np.exp2(14.0 - (8 + row % 6))[:, None] * (1 + generator.integers(0, 2, (count, dim)) / 1024)
    small[1::4] *= np.where(generator.random((len(small[1::4]), dim)) < 0.5, -1.0, 1.0)
    small[row, row // 2 % 2 * (dim - 1)] = 2.0**14
    small[3::4] = generator.standard_normal((len(small[3::4]), dim)) * 2.0**12
    half: np.ndarray = small.astype(np.float16)
    return half


def _rounding(device: torch.device, screen: int, width: int, panels: int) -> float:
    """The largest error of worst-case products as a share of the published bound; infinite where one is missing."""
    generator = np.random.default_rng(0)
    dim = width * panels
    a, b = worst_cases(ROWS, dim, generator), worst_cases(COLUMNS, dim, generator)
    b[1] = np.abs(a[0])  # all that is cut off has one sign
    wide = a.astype(np.float64), b.astype(np.float64)  # sums of 22-bit products within 46 bits: no rounding here
    found = products(device, screen, width, a, b)
    error = np.abs(found.sums.astype(np.float64) - wide[0] @ wide[1].T)
    bound = published(dim) * np.linalg.norm(wide[0], axis=1)[:, None] * np.linalg.norm(wide[1], axis=1)[None, :]
    return float("inf") if found.late else float(np.nan_to_num(error / bound, nan=np.inf).max())


Search = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def _wrong_rows(device: torch.device, screen: int, dim: int, search: Search, exact: int) -> int:
    """Rows in which a small search differs from the float64 one: several tiles and blocks, ties, near ties, lengths."""
    generator = np.random.default_rng(0)  # torch's follows default devices and dtypes
    x, codes = (torch.from_numpy(generator.standard_normal((n, dim)).astype(np.float32)) for n in (CHECKED, 700))
    codes[500:520] = codes[100:120]
    x[::3] = codes[torch.from_numpy(generator.integers(0, 700, CHECKED // 3))]
    x[1::3] = (x[::3] + codes[torch.from_numpy(generator.integers(0, 700, CHECKED // 3))]) / 2
    x[2::30] *= 2.0**12
    x[5::30] *= 2.0**-12
    there = x[None, None].to(device), codes[None].to(device)
    found, expected = search(*there, screen), search(*there, exact)
    return int(((found[0] != expected[0]) | (found[1] != expected[1])).sum())


def holds(device: torch.device, screen: int, dim: int, search: Search, exact: int, name: str, instead: str) -> bool:
    """Whether a screen may be trusted with searches of ``dim`` dims here; finds out if that is new.

    Args:
        device: of the search.
        screen: which.
        dim: of the search.
        search: searches x in codes with a screen, without asking this function.
        exact: the number of the search without a screen.
        name: of the screen, for the warning.
        instead: what runs if it fails, for the warning.

    Raises:
        RuntimeError: a CUDA graph is being captured and this is the first search of its kind: to find out has to wait.
    """
    width, panels = layout(dim)
    key = _key(device, screen, dim)
    verdict = _verdicts.get(key)
    if verdict is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "vqkernels: the first search of this size on a GPU checks its tensor cores; a CUDA graph cannot "
                "capture that, so run it once before the capture"
            )
        measured = next(p for w, p in reversed(LAYOUTS) if w == width and (p <= panels or p == 1))
        share = _rounding(device, screen, width, measured)
        what = []
        if share > 1:  # no search then: one that is wrong might never end
            what.append(f"products of {width * measured} dims are off by {share:.3g} times what is allowed")
        elif wrong := _wrong_rows(device, screen, dim, search, exact):
            what.append(f"{wrong} of {CHECKED} rows of a small search of {dim} dims are wrong")
        verdict = _verdicts[key] = Verdict(not what, share, "; ".join(what))
        if not verdict.holds:
            where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
            warnings.warn(
                f"vqkernels: the {name} of the CUDA library fails its self-test on {where} ({verdict.what}); "
                f"{instead} instead: results stay exact, searches become slower. Please report this.",
                RuntimeWarning,
                stacklevel=2,
            )
    return verdict.holds
