"""Every op of the package, in one table: opcheck, fake results like real ones, a contract to read, files in place."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from on_device import DEVICE, place
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from vqkernels import dispatch

H, B, S, K, D = 2, 3, 5, 7, 4
Arguments = tuple[Any, ...]


def rows(layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """(H, B, S, D)."""
    if layout == "compact":
        return torch.randn(H, B, S, D, dtype=dtype)
    if layout == "permuted":  # a channel-first map of heads
        return torch.randn(B, H, D, S, dtype=dtype).permute(1, 0, 3, 2)
    return torch.randn(H, B, 2 * S, D + 1, dtype=dtype)[:, :, ::2, 1:]


def codes(layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """(H, K, D)."""
    if layout == "compact":
        return torch.randn(H, K, D, dtype=dtype)
    if layout == "permuted":
        return torch.randn(H, D, K, dtype=dtype).mT
    return torch.randn(H, 2 * K, D + 1, dtype=dtype)[:, ::2, 1:]


def indices(layout: str) -> Tensor:
    """(H, B, S), -1 among them."""
    if layout == "compact":
        return torch.randint(-1, K, (H, B, S))
    if layout == "permuted":
        return torch.randint(-1, K, (B, S, H)).permute(2, 0, 1)
    return torch.randint(-1, K, (H, B, 2 * S))[:, :, ::2]


def state(layout: str) -> Arguments:
    """What ``ema_update`` writes to and reads: (H, K) and (H, K, D) in turns."""
    sizes = codes(layout).abs()[..., 0] + 1
    return sizes, codes(layout), codes(layout), torch.randint(0, 9, (H, K)).float(), codes(layout)


def gradient(layout: str, name: str, channel_first: bool, dtype: torch.dtype = torch.float32) -> Arguments:
    """For ``quantize_grad``."""
    commitment = torch.tensor(0.5)
    return rows(layout), rows(layout, dtype), codes(layout), indices(layout), commitment, name, channel_first


def scored(layout: str, dtype: torch.dtype = torch.float32) -> Arguments:
    """For ``soft_assign``; one row in five counts nowhere."""
    return rows(layout, dtype)[:, 0], codes(layout), torch.arange(H * S).view(H, S) % S / S


half = torch.bfloat16
# Arguments without the backend, by op. Every kind of result that an op has is here: layouts, dtypes, options.
CALLS: dict[str, dict[str, Callable[[str], Arguments]]] = {
    "nearest": {
        "l2": lambda lay: (rows(lay), codes(lay), "l2", "exact"),
        "cosine": lambda lay: (rows(lay), codes(lay), "cosine", "exact"),
        "dot": lambda lay: (rows(lay), codes(lay), "dot", "exact"),
        "fast": lambda lay: (rows(lay), codes(lay), "l2", "fast"),
        "bfloat16": lambda lay: (rows(lay, half), codes(lay), "l2", "exact"),
        "float64": lambda lay: (rows(lay, torch.float64), codes(lay, torch.float64), "l2", "exact"),
    },
    "residual_nearest": {
        "rows": lambda lay: (rows(lay), [codes(lay), codes(lay)[:, :3], codes(lay)], False),
        "channel first": lambda lay: (rows(lay), [codes(lay)], True),
        "bfloat16": lambda lay: (rows(lay, half), [codes(lay, half), codes(lay)], True),
        "float64": lambda lay: (rows(lay, torch.float64), [codes(lay), codes(lay)], False),
    },
    "lookup": {
        "rows": lambda lay: (codes(lay), indices(lay), False, None),
        "channel first": lambda lay: (codes(lay), indices(lay), True, None),
        "bfloat16": lambda lay: (codes(lay), indices(lay), False, half),
        "float64": lambda lay: (codes(lay, torch.float64), indices(lay), True, None),
    },
    "codebook_sum": {
        "float32": lambda lay: (rows(lay), indices(lay), K),
        "bfloat16": lambda lay: (rows(lay, half), indices(lay), K),
        "float64": lambda lay: (rows(lay, torch.float64), indices(lay), K),
    },
    "ema_update": {
        "plain": lambda lay: (*state(lay), 0.9, 1e-5, False),
        "normalize": lambda lay: (*state(lay), 0.9, 1e-5, True),
    },
    "quantize_output": {
        "measured": lambda lay: (rows(lay), codes(lay), indices(lay), torch.rand(H, B, S), True, False),
        "compared": lambda lay: (rows(lay), codes(lay), indices(lay).clamp(min=0), None, False, True),
        "bfloat16": lambda lay: (rows(lay, half), codes(lay), indices(lay), None, True, False),
        "float64": lambda lay: (rows(lay, torch.float64), codes(lay), indices(lay), None, True, True),
    },
    "quantize_grad": {
        "straight through": lambda lay: gradient(lay, "straight_through", False),
        "rotation": lambda lay: gradient(lay, "rotation", True),
        "none": lambda lay: gradient(lay, "none", False),
        "bfloat16": lambda lay: gradient(lay, "straight_through", True, half),
    },
    "soft_assign": {
        "squared": lambda lay: (*scored(lay), True, 0.5),
        "bfloat16": lambda lay: (*scored(lay, half), False, 0.5),
        "float64": lambda lay: (*scored(lay, torch.float64), True, 0.5),
    },
    "soft_assign_grad": {
        "squared": lambda lay: (*scored(lay), torch.randn(H), codes(lay)[..., 0], None, None, True, 0.5),
        "soft codes": lambda lay: (*scored(lay), None, None, rows(lay)[:, 0], codes(lay), False, 0.5),
        "bfloat16": lambda lay: (*scored(lay, half), None, None, rows(lay)[:, 0], codes(lay, half), False, 0.5),
        "float64": lambda lay: (*scored(lay, torch.float64), torch.randn(H), None, None, None, True, 0.5),
    },
}
TABLE = [(op, name) for op, calls in CALLS.items() for name in calls]
LAYOUTS = ["compact", "permuted", "strided"]


def overload(op: str) -> Any:
    return getattr(torch.ops.vqkernels, op).default


def able(op: str, backend: str, arguments: Arguments) -> str:
    """``backend``, or "reference" where it says that it cannot run this (native ``ema_update`` needs dense state)."""
    (candidate,) = (b for b in dispatch.BACKENDS if b.name == backend)
    given = tuple(map(place, arguments)) if DEVICE != "cpu" else arguments
    reason = dispatch._reason(op, candidate, dispatch._place(given), given)
    if reason is None:
        return backend
    with pytest.raises(dispatch.Unsupported, match=re.escape(reason)):
        overload(op)(*arguments, backend)
    return "reference"


def test_every_op_is_in_the_table() -> None:
    assert set(CALLS) == set(dispatch.OPS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "name"), TABLE)
def test_opcheck(backend: str, op: str, name: str, layout: str) -> None:
    # Only what the schema says is written to; autograd is registered; fake is like real, with symbolic sizes too.
    arguments = CALLS[op][name](layout)
    torch.library.opcheck(overload(op), (*arguments, able(op, backend, arguments)))


def results(value: Any) -> list[Tensor]:
    return [] if value is None else [value] if isinstance(value, Tensor) else list(value)


def described(value: Any) -> list[tuple[Any, ...]]:
    return [(tuple(v.shape), v.stride(), v.dtype, v.device) for v in results(value)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "name"), TABLE)
def test_fake_results_are_like_real_ones(backend: str, op: str, name: str, layout: str) -> None:
    arguments = CALLS[op][name](layout)
    backend = able(op, backend, arguments)
    with FakeTensorMode() as mode:
        fake = overload(op)(*tree_map_only(Tensor, mode.from_tensor, arguments), backend)
    assert described(fake) == described(overload(op)(*arguments, backend))


@pytest.mark.parametrize(("op", "name"), TABLE)
def test_meta_tensors_have_results(op: str, name: str) -> None:
    arguments = CALLS[op][name]("compact")
    meta = overload(op)(*tree_map_only(Tensor, lambda a: a.to("meta"), arguments))
    assert [d[:3] for d in described(meta)] == [d[:3] for d in described(overload(op)(*arguments))]


@pytest.mark.parametrize(("op", "name"), TABLE)
def test_strides_do_not_change_a_bit(backend: str, op: str, name: str) -> None:
    for layout in LAYOUTS[1:]:
        strided = CALLS[op][name](layout)
        chosen = able(op, backend, strided)
        compact = tree_map_only(Tensor, lambda a: a.contiguous().clone(), strided)
        found = results(overload(op)(*strided, chosen)), results(overload(op)(*compact, chosen))
        # What an op writes to counts as a result.
        written = overload(op)._schema.arguments
        for places, arguments in zip(found, (strided, compact), strict=True):
            places += [v for v, a in zip(arguments, written, strict=False) if a.alias_info and a.alias_info.is_write]
        assert len(found[0]) > 0
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("op", dispatch.OPS)
def test_the_schema_ends_with_the_backend(op: str) -> None:
    last = overload(op)._schema.arguments[-1]
    assert last.name == "backend"
    assert last.default_value == "auto"


@pytest.mark.parametrize("op", dispatch.OPS)
def test_the_contract_names_every_tensor_and_its_shape(op: str) -> None:
    contract = importlib.import_module(f"vqkernels.ops.{op}").__doc__
    assert contract is not None
    assert "Contract" in contract
    assert contract.startswith(f"``{op}``: ")
    for argument in overload(op)._schema.arguments:
        if "Tensor" in str(argument.type):
            assert f"``{argument.name}``" in contract, argument.name
    assert "(H, " in contract


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_backend_file_has_its_two_names(op: str) -> None:
    for name in ("native", "reference"):
        module = importlib.import_module(f"vqkernels.ops.{op}.{name}")
        assert callable(module.supports)
        assert callable(module.run)
        assert module.__doc__
