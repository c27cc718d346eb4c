"""Checks of what users pass, and the views that turn public shapes into the (H, B, S, D) of the ops.

Called by :mod:`vqkernels.functional` and :mod:`vqkernels.nn`. Every message names the argument, what it was and what
was expected; no view here ever copies a feature map that was only permuted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._subclasses import FakeTensor

from vqkernels.ops.nearest import METRICS
from vqkernels.ops.quantize_grad import GRADIENTS

__all__ = [
    "PRECISIONS",
    "autocast_dtype",
    "autocast_kind",
    "check_choice",
    "check_codebook",
    "check_count",
    "check_float_tensor",
    "check_indices",
    "check_integer",
    "check_mask",
    "check_number",
    "check_range",
    "check_rows",
    "has_values",
    "is_batched",
    "is_channel_first",
    "shape_of",
    "to_codes",
    "to_positions",
    "to_rows",
    "without_autocast",
]

PRECISIONS = ("exact", "fast")
CHOICES = {"metric": METRICS, "gradient": GRADIENTS, "precision": PRECISIONS}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def shape_of(x: Tensor) -> str:
    """``(2, 3)``, also for symbolic sizes."""
    return f"({', '.join(str(s) for s in x.shape)}{',' if x.dim() == 1 else ''})"


def check_choice(name: str, value: str, choices: Sequence[str] | None = None) -> None:
    """``value`` is one of the words that ``name`` may be."""
    allowed = choices or CHOICES[name]
    if not isinstance(value, str) or value not in allowed:  # an array would compare elementwise
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")


def check_number(name: str, value: float, *, low: float = 0.0, high: float = math.inf) -> None:
    """``value`` is a finite number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; expected a number")
    if not (low <= value <= high and value < math.inf):  # NaN compares false; math.isfinite does not trace
        bounds = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"of at least {low:g}"
        raise ValueError(f"{name} is {value!r}; expected a finite number {bounds}")


def check_count(name: str, value: int) -> None:
    """``value`` is a positive integer (or a symbolic one)."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} is {value!r}; expected an integer")
    if value < 1:
        raise ValueError(f"{name} is {value}; expected at least 1")


def check_integer(name: str, value: int, low: int | None = None) -> None:
    """``value`` is an integer, of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; expected an integer")
    if low is not None and value < low:
        raise ValueError(f"{name} is {value}; expected at least {low}")


def check_float_tensor(name: str, x: Tensor) -> None:
    """``x`` is a tensor of a dtype that the ops read."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a torch.Tensor")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {x.dtype}; expected float32, bfloat16, float16 or float64")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name} is a {_kind(x)} tensor; expected a dense one")


def _kind(x: Tensor) -> str:
    return "nested" if x.is_nested else str(x.layout).removeprefix("torch.")


def check_codebook(codebook: Tensor, name: str = "codebook") -> None:
    """``codebook`` is (K, D) or (H, K, D), floating, with no size 0."""
    check_float_tensor(name, codebook)
    if codebook.dim() not in (2, 3):
        raise ValueError(f"{name} has shape {shape_of(codebook)}; expected (K, D), or (H, K, D) with heads")
    if any(s == 0 for s in codebook.shape):
        raise ValueError(f"{name} is empty: its shape is {shape_of(codebook)}; expected at least one code and one dim")


def check_rows(name: str, x: Tensor, codebook: Tensor) -> None:
    """``x`` (..., D) or (H, ..., D) fits ``codebook``, which was checked already."""
    check_float_tensor(name, x)
    heads = codebook.dim() == 3
    if x.dim() < 1 + heads or x.shape[-1] != codebook.shape[-1]:
        wanted = f"(H, ..., {codebook.shape[-1]})" if heads else f"(..., {codebook.shape[-1]})"
        raise ValueError(
            f"{name} has shape {shape_of(x)}; expected {wanted} to fit the codebook of shape {shape_of(codebook)}"
        )
    if heads and x.shape[0] != codebook.shape[0]:
        raise ValueError(
            f"{name} has shape {shape_of(x)}, so {x.shape[0]} heads; the codebook of shape {shape_of(codebook)} has "
            f"{codebook.shape[0]} heads"
        )
    if x.device != codebook.device:
        raise ValueError(f"{name} is on {x.device}, codebook on {codebook.device}; expected one device")


def check_indices(indices: Tensor, name: str = "indices") -> None:
    """``indices`` is a tensor of integers."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"{name} is a {type(indices).__name__}; expected a torch.Tensor")
    if indices.dtype not in INTEGERS:
        raise TypeError(f"{name} has dtype {indices.dtype}; expected an integer dtype such as int64")
    if indices.layout != torch.strided or indices.is_nested:
        raise TypeError(f"{name} is a {_kind(indices)} tensor; expected a dense one")


def has_values(x: Tensor) -> bool:
    """Whether there is something to look at: not in meta and fake tensors, nor while a graph is traced, nor in vmap."""
    return not (torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor) or is_batched(x))


def is_batched(x: Tensor) -> bool:
    """Whether ``x`` stands for the samples of a ``torch.vmap``, whatever other transforms it is in.

    Or for the gradients of ``torch.autograd.grad(..., is_grads_batched=True)``, which is torch's older vmap.
    """
    if torch.compiler.is_compiling():
        return False
    if functorch.is_legacy_batchedtensor(x):
        return True
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def check_range(name: str, x: Tensor, low: int, high: int) -> None:
    """The integers ``x`` lie in [low, high]; asked on the CPU only, elsewhere looking takes a wait."""
    if not has_values(x) or x.device.type != "cpu" or x.numel() == 0:
        return
    least, most = (int(t) for t in x.aminmax())
    if least < low or most > high:
        raise ValueError(f"{name} contains {least if least < low else most}; expected integers in [{low}, {high}]")


def autocast_kind(x: Tensor) -> str:
    """The kind of device to switch autocast off for: meta tensors know no autocast, and any other kind leaves them."""
    return "cpu" if x.is_meta else x.device.type


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of a matrix product with ``x``, ``None`` where it is off; it leaves meta tensors alone."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def without_autocast(x: Tensor) -> torch.autocast:
    """A block in which autocast leaves alone what is done with ``x``."""
    return torch.autocast(autocast_kind(x), enabled=False)


def check_mask(mask: Tensor, rows: Sequence[int], like: Tensor, heads: bool) -> None:
    """``mask`` is bool, of shape ``rows`` (or, with heads, the same without the first dim)."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask has dtype {found}; expected torch.bool, True for valid rows")
    allowed = [tuple(rows)] + ([tuple(rows[1:])] if heads else [])
    if tuple(mask.shape) not in allowed:
        raise ValueError(f"mask has shape {shape_of(mask)}; expected {' or '.join(map(str, allowed))}")
    if mask.device != like.device:
        raise ValueError(f"mask is on {mask.device}, the rows on {like.device}; expected one device")


def to_codes(codebook: Tensor) -> Tensor:
    """(K, D) or (H, K, D) as (H, K, D)."""
    return codebook if codebook.dim() == 3 else codebook.unsqueeze(0)


def to_rows(x: Tensor, heads: bool) -> Tensor:
    """(..., D), or (H, ..., D) with heads, as (H, B, S, D).

    The first dim becomes B and the dims between are flattened: a view for contiguous tensors and for feature maps
    with the channel dim moved to the end, which then stay where they are in memory.
    """
    return _grouped(x, heads, 1)


def to_positions(x: Tensor, heads: bool) -> Tensor:
    """What belongs to rows (a mask, indices): (...) or (H, ...) as (H, B, S), like :func:`to_rows`."""
    return _grouped(x, heads, 0)


def _grouped(x: Tensor, heads: bool, kept: int) -> Tensor:
    """(H, B, S) and ``kept`` dims more, in as few views as possible: each takes longer than all checks of a call."""
    missing = heads + 2 + kept - x.dim()
    if missing > 0:  # dims of size 1 are a view whatever the strides are
        return x.view((*(x.shape[:1] if heads else (1,)), *(1,) * missing, *x.shape[heads:]))
    x = x if heads else x.unsqueeze(0)
    return x if missing == 0 else x.flatten(2, -1 - kept)


def is_channel_first(rows: Tensor) -> bool:
    """Whether ``rows`` (H, B, S, D) lies in memory as (..., D, S): outputs then do too, and no permute copy is made."""
    return bool(rows.stride(-1) != 1 and rows.stride(-2) == 1 and rows.shape[-1] != 1)
