"""Original and patched side by side: the same state, the same inputs, and the float64 oracle between them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import vqkernels
from vqkernels.testing import oracle_nearest


def pair(module: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A module and a patched deep copy of it."""
    other = copy.deepcopy(module)
    report = vqkernels.patch(other, strict=True, **options)
    assert report.replaced, report
    return module, other


def wrong_rows(original: Tensor, patched: Tensor, x: Tensor, codebook: Tensor, metric: str = "l2") -> int:
    """Assert that the patched indices are the exact answer; return how many of the original's are not."""
    expected, _ = oracle_nearest(x.reshape(-1, x.shape[-1]), codebook, metric)
    assert torch.equal(patched.reshape(-1), expected)
    return int((original.reshape(-1) != expected).sum())


def close(a: Tensor | None, b: Tensor | None, tolerance: float = 1e-5, least: float = 1e-30) -> None:
    """Equal within ``tolerance`` of the largest value (or of ``least``); the same shape and dtype."""
    if a is None or b is None:
        assert a is b
        return
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    if not a.is_floating_point():
        assert torch.equal(a, b)
        return
    scale = max(least, float(a.detach().abs().max())) if a.numel() else 1.0
    torch.testing.assert_close(b / scale, a / scale, rtol=0, atol=tolerance)


def tensors(out: Any) -> list[Tensor]:
    """All tensors of a nested result, in order."""
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, dict):
        return [t for value in out.values() for t in tensors(value)]
    return [t for value in out for t in tensors(value)] if isinstance(out, list | tuple) else []


def same_structure(a: Any, b: Any) -> None:
    """The same nesting, types, shapes and dtypes."""
    if isinstance(a, Tensor):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    elif isinstance(a, list | tuple):
        assert type(a) is type(b)
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            same_structure(left, right)
    else:
        assert type(a) is type(b)
        assert a == b


def run(module: nn.Module, call: Callable[[nn.Module, Tensor], Any], x: Tensor, grad: bool) -> tuple[Any, list[Any]]:
    """Result, and gradients of input and parameters for a fixed weighting of all floating outputs."""
    x = x.detach().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        out = call(module, x)
    leaves = [x, *module.parameters()]
    for leaf in leaves:
        leaf.grad = None
    parts = [t for t in tensors(out) if t.is_floating_point() and t.requires_grad]
    if grad and parts:
        total = torch.zeros((), dtype=torch.float64)
        for i, part in enumerate(parts):
            weights = torch.linspace(-1, 1 + i, part.numel(), dtype=torch.float64).reshape(part.shape)
            total = total + (part.double() * weights).sum()
        total.backward()
    return out, [leaf.grad for leaf in leaves]


def compare(
    original: nn.Module, patched: nn.Module, call: Callable[[nn.Module, Tensor], Any], x: Tensor, grad: bool
) -> tuple[Any, Any]:
    """Results, losses and gradients are equal within 1e-5, indices exactly; both results."""
    expected, expected_grads = run(original, call, x, grad)
    out, grads = run(patched, call, x, grad)
    same_structure(expected, out)
    for a, b in zip(tensors(expected), tensors(out), strict=True):
        assert a.requires_grad == b.requires_grad
        if a.is_floating_point():
            close(a, b)
        else:
            assert torch.equal(a, b)
    for a, b in zip(expected_grads, grads, strict=True):
        close(a, b)
    return expected, out


def same_buffers(a: nn.Module, b: nn.Module, least: float = 1e-30) -> None:
    """Buffers and parameters agree within 1e-5, by name."""
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for name, value in left.items():
        close(value, right[name], least=least)


def round_trip(original: nn.Module, patched: nn.Module) -> None:
    """A state_dict of either loads into the other, strictly."""
    for source, target in ((original, patched), (patched, original)):
        state = {k: v.clone() for k, v in source.state_dict().items()}
        target.load_state_dict(state, strict=True)
        assert all(torch.equal(v, target.state_dict()[k]) for k, v in state.items())


def permuted(x: Tensor, order: Iterable[int]) -> Tensor:
    """The same values in another memory order."""
    order = list(order)
    inverse = [order.index(i) for i in range(len(order))]
    return x.permute(order).contiguous().permute(inverse)


class LargestTensor(TorchFunctionMode):
    """Remembers the number of elements of the largest result while it is on."""

    largest = 0

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out
