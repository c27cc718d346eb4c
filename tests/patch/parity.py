"""Patched against original: the same state, inputs and seeds must give the same results, or better indices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import vqkernels

TOLERANCE = 1e-5


def pair(make: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, nn.Module]:
    """An original and a patched copy of it, which must be replaced without remark."""
    torch.manual_seed(3)
    original = make()
    twin = copy.deepcopy(original)
    report = vqkernels.patch(twin, strict=True, **options)
    assert report.replaced, str(report)
    return original, twin


def tensors(result: Any) -> list[Tensor]:
    """All tensors of a nested result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in tensors(part)] if isinstance(result, (tuple, list)) else []


def assert_near(actual: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Integers are equal; floats differ by less than ``tolerance`` of the largest value."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, original {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, original {expected.dtype}"
    if not actual.is_floating_point():
        wrong = int((actual != expected).sum())
        assert wrong == 0, f"{what}: {wrong} of {actual.numel()} differ from the original"
        return
    scale = max(float(expected.detach().abs().max()), 1e-3) if expected.numel() else 1.0
    error = float((actual.detach().double() - expected.detach().double()).abs().max()) if expected.numel() else 0.0
    assert error <= tolerance * scale, f"{what}: differs by {error:.3g}, largest value {scale:.3g}"


def step(model: nn.Module, x: Tensor, seed: int, call: dict[str, Any]) -> dict[str, list[Tensor]]:
    """One forward and backward pass: results, gradients."""
    model.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad)
    torch.manual_seed(seed)
    results = tensors(model(x, **call))
    total = sum(((i + 1.0) * t.float().sin().sum() for i, t in enumerate(results) if t.requires_grad), torch.zeros(()))
    if total.requires_grad:
        total.backward()
    names = [n for n, p in model.named_parameters() if p.grad is not None]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {"result": results, **{f"gradient of {n}": [g] for n, g in zip(names, gradients, strict=True)}} | (
        {"gradient of the input": [x.grad]} if x.grad is not None else {}
    )


def assert_same_step(
    original: nn.Module, twin: nn.Module, x: Tensor, seed: int, call: dict[str, Any], tolerance: float = TOLERANCE
) -> None:
    expected, actual = step(original, x, seed, call), step(twin, x, seed, call)
    assert list(actual) == list(expected)
    for name, values in expected.items():
        assert len(values) == len(actual[name]), name
        for i, (a, e) in enumerate(zip(actual[name], values, strict=True)):
            assert a.requires_grad == e.requires_grad, f"{name} {i}: requires_grad {a.requires_grad}"
            assert_near(a, e, f"{name} {i}", tolerance)


def assert_same_state(original: nn.Module, twin: nn.Module, tolerance: float = TOLERANCE) -> None:
    expected, actual = original.state_dict(), twin.state_dict()
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert_near(actual[name], value, name, tolerance)


def assert_state_loads_both_ways(original: nn.Module, twin: nn.Module, make: Callable[[], nn.Module]) -> None:
    """``state_dict`` of either loads into a fresh module of the other kind."""
    for source, patched in ((original, True), (twin, False)):
        fresh = make()
        if patched:
            vqkernels.patch(fresh)
        missing = fresh.load_state_dict(source.state_dict(), strict=False)
        # Upstream registers affine statistics late: batch_mean and batch_variance are in no fresh module.
        assert not missing.missing_keys
        assert all("batch_" in key for key in missing.unexpected_keys)
        for name, value in fresh.state_dict().items():
            assert torch.equal(value, source.state_dict()[name]), name
