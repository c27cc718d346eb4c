"""Which backend runs an op: the order per device, the three scopes of override, and the reasons.

Called by every op implementation in ``vqkernels.ops`` (on real tensors, never while tracing), and by
:func:`vqkernels.explain` and :func:`vqkernels.info`. A backend is a file name: ``ops/<op>/<backend>.py`` exposes
``supports(*args) -> reason | None`` and ``run(*args)``, where ``args`` are the op's arguments without ``backend``.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from vqkernels import _cuda, _devices, _native, _triton, tuned

__all__ = ["BACKENDS", "OPS", "Backend", "Unsupported", "call", "explain", "missing", "requested", "use_backend"]

log = logging.getLogger("vqkernels")

# Registration order; the one line to add for a new op (CONTRIBUTING.md, "Add an op").
OPS = (
    "nearest",
    "residual_nearest",
    "lookup",
    "codebook_sum",
    "ema_update",
    "quantize_grad",
    "quantize_output",
    "soft_assign",
    "soft_assign_grad",
)


# Searches decide in float64, and a sum of rows in one fixed order is many small steps: what a device without float64
# leaves to the kernels of the CPU, whose memory an Apple GPU shares. Rows go there, indices or K x D sums come back.
ON_CPU = ("nearest", "residual_nearest", "codebook_sum")


class Unsupported(RuntimeError):
    """A backend that was asked for explicitly cannot run this call; the message says why."""


@dataclass(frozen=True)
class Backend:
    """One entry of the backend table.

    Attributes:
        name: also the name of the file in ``ops/<op>``.
        probe: takes a kind of device; why the backend cannot run on it here, or ``None``.
        held_back: takes a device; why the backend is not chosen there unless it is asked for, or ``None``.
        by_table: chosen on a GPU only for ops that were measured there.
    """

    name: str
    probe: Callable[[str], str | None]
    held_back: Callable[[torch.device], str | None] = lambda device: None
    by_table: bool = False


def _probe_native(device: str) -> str | None:
    return _cuda.unavailable() if device == "cuda" else _native.unavailable(device)


def _native_held_back(device: torch.device) -> str | None:
    return _cuda.held_back(device)


def _probe_triton(device: str) -> str | None:
    return _triton.unavailable(device)


def _triton_held_back(device: torch.device) -> str | None:
    return _triton.held_back(device)


def _probe_reference(device: str) -> str | None:
    return None


# Order of preference. "auto" takes the first that can run the call.
BACKENDS: tuple[Backend, ...] = (
    # On GPUs both are automatic only where a green `make gpu` is on record for these very kernels (vqkernels/tuned);
    # the fastest in its measured table comes first (_measured).
    Backend("native", _probe_native, _native_held_back, by_table=True),
    Backend("triton", _probe_triton, _triton_held_back),
    Backend("reference", _probe_reference),
)

_NAMES = tuple(b.name for b in BACKENDS)
_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("vqkernels_backend", default=None)


def _check_name(name: str, where: str) -> str:
    if name != "auto" and name not in _NAMES:
        raise ValueError(f"{where} is {name!r}; expected 'auto' or one of {', '.join(map(repr, _NAMES))}")
    return name


def requested(backend: str = "auto") -> str:
    """The backend asked for: argument, else :func:`use_backend`, else ``VQKERNELS_BACKEND``, else ``"auto"``."""
    if backend != "auto":
        return _check_name(backend, "backend")
    if (name := _override.get()) is not None:
        return name
    name = os.environ.get("VQKERNELS_BACKEND")
    return _check_name(name, "VQKERNELS_BACKEND") if name else "auto"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Ask for one backend inside a ``with`` block (this thread only); an explicit argument still wins.

    Args:
        name: ``"reference"``, ``"native"``, ``"triton"`` or ``"auto"``.

    Raises:
        ValueError: the name is no backend.

    Example:
        >>> import torch, vqkernels
        >>> with vqkernels.use_backend("reference"):
        ...     indices, score = vqkernels.nearest(torch.zeros(2, 3), torch.eye(3))
        >>> indices.tolist()
        [0, 0]
    """
    token = _override.set(_check_name(name, "use_backend(name)"))
    try:
        yield
    finally:
        _override.reset(token)


@functools.cache
def _module(op: str, backend: str) -> ModuleType | None:
    name = f"vqkernels.ops.{op}.{backend}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name == name:
            return None
        raise


def missing(op: str, backend: Backend, device: str) -> str | None:
    """Why ``backend`` has nothing for ``op`` on this kind of device, whatever the arguments, or ``None``."""
    if (reason := backend.probe(device)) is not None:
        return reason
    return None if _module(op, backend.name) is not None else f"no {backend.name} implementation of {op}"


def _reason(op: str, backend: Backend, device: torch.device, args: tuple[Any, ...]) -> str | None:
    """Why ``backend`` cannot run ``op`` on these arguments, which are on ``device``, or ``None``."""
    if (reason := missing(op, backend, device.type)) is not None:
        return reason
    module = _module(op, backend.name)
    assert module is not None
    reason = module.supports(*args)
    return reason if reason is None else str(reason)


def _place(args: tuple[Any, ...]) -> torch.device:
    for a in args:
        if isinstance(a, torch.Tensor):
            return a.device
    raise TypeError("an op has at least one tensor among its arguments")


def _left_to_cpu(op: str, device: torch.device) -> bool:
    return op in ON_CPU and _devices.lacks_float64(device)


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors, and sequences of them, on ``device``; anything else as it is."""
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(v, device) for v in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


# Per op: the arguments that say how many rows, codes and dims a call has.
_SIZES: dict[str, Callable[..., tuple[int, int, int]]] = {
    "nearest": lambda x, codebook, *_: (x.shape[:-1].numel(), codebook.shape[1], codebook.shape[2]),
    "residual_nearest": lambda x, codebooks, *_: (
        x.shape[:-1].numel(),
        sum(c.shape[1] for c in codebooks),
        x.shape[3],
    ),
    "lookup": lambda codebook, indices, *_: (indices.numel(), codebook.shape[1], codebook.shape[2]),
    "codebook_sum": lambda x, indices, num_codes: (indices.numel(), num_codes, x.shape[3]),
    "ema_update": lambda size, average, codebook, *_: (0, codebook.shape[1], codebook.shape[2]),
    "quantize_grad": lambda grad, z, codebook, *_: (z.shape[:-1].numel(), codebook.shape[1], codebook.shape[2]),
    "quantize_output": lambda z, codebook, *_: (z.shape[:-1].numel(), codebook.shape[1], codebook.shape[2]),
    "soft_assign": lambda x, codes, *_: (x.shape[:-1].numel(), codes.shape[1], codes.shape[2]),
    "soft_assign_grad": lambda x, codes, *_: (x.shape[:-1].numel(), codes.shape[1], codes.shape[2]),
}


def _measured(op: str, name: str, device: torch.device, args: tuple[Any, ...]) -> tuned.Choice | None:
    """What the measured table of this GPU says about a call of this size; only where the choice is free."""
    if device.type != "cuda" or name != "auto" or op not in _SIZES:
        return None
    return tuned.choice(tuned.device_name(device), op, *_SIZES[op](*args))


def _candidates(choice: tuned.Choice | None) -> tuple[Backend, ...]:
    """Backends in order of preference: the measured ones by time, then the others."""
    if choice is None:
        return BACKENDS
    return tuple(sorted(BACKENDS, key=lambda b: choice.milliseconds.get(b.name, float("inf"))))


def _held_back(candidate: Backend, choice: tuned.Choice | None, device: torch.device) -> str | None:
    if (reason := candidate.held_back(device)) is not None:
        return reason
    if candidate.by_table and device.type == "cuda" and (choice is None or candidate.name not in choice.milliseconds):
        return "no measured table of this GPU names it"
    return None


@functools.cache
def _log_fallback(op: str, device: str, skipped: str, chosen: str) -> None:
    # Once per op, device and reason: visible in a log, never a flood.
    log.info("%s on %s uses the %s backend (%s)", op, device, chosen, skipped)


def call(op: str, backend: str, args: tuple[Any, ...]) -> Any:
    """Run ``op``: the backend that was asked for, or the first that can.

    Raises:
        Unsupported: a backend was named (argument, context or environment) and cannot run this call.
    """
    name, device = requested(backend), _place(args)
    if _left_to_cpu(op, device):
        return _moved(call(op, name, _moved(args, torch.device("cpu"))), device)
    skipped: list[str] = []
    choice = _measured(op, name, device, args)
    for candidate in _candidates(choice):
        if name not in ("auto", candidate.name):
            continue
        reason = _reason(op, candidate, device, args)
        if reason is None and name == "auto":
            reason = _held_back(candidate, choice, device)
        if reason is None:
            if skipped:
                _log_fallback(op, device.type, "; ".join(skipped), candidate.name)
            module = _module(op, candidate.name)
            assert module is not None
            return module.run(*args)
        if name != "auto":
            raise Unsupported(f"{op}: backend {name!r} cannot run this call: {reason}")
        skipped.append(f"{candidate.name}: {reason}")
    raise Unsupported(f"{op}: no backend can run this call ({'; '.join(skipped)})")


def explain(op: str, args: tuple[Any, ...], backend: str = "auto") -> str:
    """One line per backend: whether it can run this call, and which one would."""
    name, device = requested(backend), _place(args)
    if _left_to_cpu(op, device):
        _, *lines = explain(op, _moved(args, torch.device("cpu")), name).splitlines()
        return "\n".join([f"{op} on {device.type}: on the CPU, because {device.type} has no float64", *lines])
    lines, chosen = [], None
    choice = _measured(op, name, device, args)
    for candidate in _candidates(choice):
        reason = _reason(op, candidate, device, args)
        if name not in ("auto", candidate.name):
            note = f"not asked for (backend={name!r})" if reason is None else reason
        elif reason is None and name == "auto" and (held_back := _held_back(candidate, choice, device)) is not None:
            note = f"available on request (backend={candidate.name!r}): {held_back}"
        elif reason is None and chosen is None:
            chosen = candidate.name
            module = _module(op, candidate.name)
            detail = getattr(module, "describe", None)
            note = "chosen" + (f": {detail(*args)}" if detail else "")
            note += f" ({choice.why})" if choice is not None and candidate.name in choice.milliseconds else ""
        else:
            note = "available" if reason is None else reason
        lines.append(f"  {candidate.name:<10} {note}")
    head = f"{op} on {device.type}: {chosen or 'nothing can run this call'}"
    return "\n".join([head, *lines])
