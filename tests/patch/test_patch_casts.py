"""Patched modules cast, on meta and fake tensors, copied, pickled and changed: what the original gives there."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pairs import close, pair, permuted, tensors
from table import ROWS, batch, build, group_for
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrize

import vqkernels


@pytest.fixture(params=ROWS)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    with group_for(request.param):
        yield str(request.param)


def described(out: Any) -> list[tuple[Any, ...]]:
    return [(tuple(t.shape), t.dtype) for t in tensors(out)]


def attempt(name: str, module: nn.Module, x: Tensor) -> Any:
    """What a call gives, or ``None`` if it raises."""
    torch.manual_seed(7)
    try:
        return ROWS[name].call(module, x)
    except (RuntimeError, NotImplementedError, TypeError):
        return None


@pytest.mark.parametrize("training", [True, False])
def test_on_meta_and_fake_tensors(name: str, training: bool) -> None:
    original, patched = pair(build(name).train(training))
    for first, second, x in (
        (copy.deepcopy(original).to("meta"), copy.deepcopy(patched).to("meta"), batch(name).to("meta")),
        (original, patched, FakeTensorMode(allow_non_fake_inputs=True).from_tensor(batch(name))),
    ):
        if (want := attempt(name, first, x)) is not None:
            assert described(ROWS[name].call(second, x)) == described(want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_cast_modules_give_results_of_the_same_dtypes(name: str, training: bool, dtype: torch.dtype) -> None:
    for module in (build(name).train(training).to(dtype), build(name).train(training)):
        original, patched = pair(module)
        if (want := attempt(name, original, batch(name).to(dtype))) is not None:
            assert described(attempt(name, patched, batch(name).to(dtype))) == described(want)


class Scaled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


def parametrized(module: nn.Module) -> nn.Module:
    for part in [m for m in module.modules() if not parametrize.is_parametrized(m)]:
        for path, _ in list(part.named_parameters(recurse=False)):
            parametrize.register_parametrization(part, path, Scaled())
    return module


def initialised(part: nn.Module) -> None:
    """What people pass to ``Module.apply``."""
    for name in ("weight", "embed", "embed_sum"):
        if isinstance(tensor := getattr(part, name, None), Tensor):
            tensor.data.normal_(generator=torch.Generator().manual_seed(tensor.numel()))


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)
    return found


def map_of(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)


@pytest.mark.usefixtures("repositories")
@pytest.mark.parametrize("change", [parametrized, saved, copy.deepcopy, map_of, lambda m: m.apply(initialised)])
def test_what_people_do_to_a_model_after_patching(name: str, change: Any) -> None:
    original, patched = build(name), build(name)
    if change is saved and any(map(parametrize.is_parametrized, original.modules())):
        pytest.skip("torch pickles no parametrized module")
    assert vqkernels.patch(patched, strict=True).replaced
    original, patched = change(original).eval(), change(patched).eval()
    x = batch(name)
    if change is map_of and x.dim() == 4:
        x = permuted(x, (0, 2, 3, 1))
    with torch.inference_mode():
        want, got = (attempt(name, module, x) for module in (original, patched))
    assert want is not None
    for a, b in zip(tensors(want), tensors(got), strict=True):
        close(a, b)
