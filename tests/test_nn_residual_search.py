"""A residual quantizer that searches all levels in one op says what its levels say, and asks them whenever it must."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vqkernels import GroupedResidualVectorQuantizer, ResidualVectorQuantizer, VectorQuantizer
from vqkernels.nn import residual


def quantizer(**options: Any) -> ResidualVectorQuantizer:
    """Trained enough that levels differ; in eval mode."""
    rvq = ResidualVectorQuantizer([40, 33, 7, 64], 12, init="normal", **options)
    with torch.no_grad():
        for i in range(len(rvq.layers)):
            rvq.level(i).codebook.mul_(0.6**i)
    return rvq.eval()


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every call of the module: whether one search served it."""
    search, found = residual.search_levels, []

    def record(*args: Any) -> Any:
        out = search(*args)
        found.append(out is not None)
        return out

    monkeypatch.setattr(residual, "search_levels", record)
    return found


def by_levels(rvq: ResidualVectorQuantizer, *args: Any, **options: Any) -> residual.ResidualVQOutput:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residual, "search_levels", lambda *args: None)
        out: residual.ResidualVQOutput = rvq(*args, **options)
    return out


def assert_same(one: residual.ResidualVQOutput, other: residual.ResidualVQOutput) -> None:
    assert one.quantized.equal(other.quantized)
    assert one.quantized.dtype == other.quantized.dtype
    assert one.indices.equal(other.indices)
    assert one.indices.is_contiguous()
    for a, b in zip(one[2:], other[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-7, atol=0)


OPTIONS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "ema": {"decay": 0.9, "commitment_cost": 1.5, "reduction": "mean"},
    "legacy": {"legacy": True, "estimator": "per_level", "gradient": "rotation"},
    "chained": {"estimator": "chained", "dead_code_ratio": 0.1},
    "projected": {"input_dim": 5, "decay": 0.9},
    "dropout": {"dropout": "batch"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_one_search_says_what_the_levels_say(searched: list[bool], options: dict[str, Any], dtype: torch.dtype) -> None:
    rvq = quantizer(**options)
    z = torch.randn(3, options.get("input_dim", 12), 67)
    z = z if options.get("input_dim") else z.to(dtype)
    assert_same(rvq(z), by_levels(rvq, z))
    assert searched == [True]


LAYOUTS: dict[str, tuple[int, Callable[[], Tensor]]] = {
    "rows": (1, lambda: torch.randn(50, 12)),
    "images": (1, lambda: torch.randn(2, 12, 5, 7)),
    "channels last": (1, lambda: torch.randn(2, 12, 5, 7).to(memory_format=torch.channels_last)),
    "sequence": (-1, lambda: torch.randn(2, 9, 12)),
    "one frame": (1, lambda: torch.randn(1, 12, 1)),
    "every other": (-1, lambda: torch.randn(2, 18, 24)[:, ::2, ::2]),
    "nothing": (1, lambda: torch.randn(0, 12, 4)),
}


@pytest.mark.parametrize(("channel_dim", "make"), LAYOUTS.values(), ids=LAYOUTS)
@torch.no_grad()
def test_in_every_layout(searched: list[bool], channel_dim: int, make: Callable[[], Tensor]) -> None:
    rvq, z = quantizer(channel_dim=channel_dim), make()
    one, other = rvq(z), by_levels(rvq, z)
    assert_same(one, other)
    if z.numel() and z.is_contiguous():
        assert one.quantized.is_contiguous()
    assert searched == [True]


@torch.no_grad()
def test_masks_lengths_and_numbers_of_levels(searched: list[bool]) -> None:
    rvq = quantizer(decay=0.9)
    z, mask = torch.randn(4, 12, 30), torch.rand(4, 30) > 0.4
    z[~mask.unsqueeze(1).expand_as(z)] = float("nan")
    lens = torch.tensor([30, 0, 7, 29])
    for options in ({"mask": mask}, {"mask": mask, "num_levels": 3}, {"mask": torch.zeros_like(mask)}):
        assert_same(rvq(z, **options), by_levels(rvq, z, **options))
    z = torch.randn(4, 12, 30)
    for keep in ({"lens": lens}, {"num_levels": 1}, {"keep": torch.tensor(2)}, {"keep": torch.tensor(4)}):
        assert_same(rvq(z, **keep), by_levels(rvq, z, **keep))
    per_sample = rvq(z, keep=torch.tensor([1, 4, 2, 3]))  # each with levels of its own: not asked
    assert searched == [True] * 7
    assert per_sample.indices[0, :, 1:].eq(-1).all()


@torch.no_grad()
def test_nan_stays_in_its_row(searched: list[bool]) -> None:
    rvq, z = quantizer(), torch.randn(2, 12, 20)
    whole = rvq(z)
    z[1, 3, 5] = float("nan")
    out = rvq(z)
    assert out.indices[1, 5].tolist() == [0, 0, 0, 0]
    assert out.indices[0].equal(whole.indices[0])
    assert out.quantized[0].equal(whole.quantized[0])
    assert searched == [True, True]


@torch.no_grad()
def test_shared_codebooks_and_groups(searched: list[bool]) -> None:
    rvq = ResidualVectorQuantizer(50, 12, 3, shared_codebook=True, init="normal").eval()
    z = torch.randn(2, 12, 40)
    assert_same(rvq(z), by_levels(rvq, z))
    grouped = GroupedResidualVectorQuantizer(20, 4, 2, groups=3, init="normal").eval()
    out = grouped(z)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residual, "search_levels", lambda *args: None)
        other = grouped(z)
    assert out.quantized.equal(other.quantized)
    assert out.indices.equal(other.indices)
    assert searched == [True] * 4


def test_an_ema_quantizer_needs_no_gradient_switched_off(searched: list[bool]) -> None:
    rvq, z = quantizer(decay=0.9), torch.randn(2, 12, 20)
    out = rvq(z)
    assert not out.quantized.requires_grad
    assert_same(out, by_levels(rvq, z))
    assert searched == [True]


class Louder(VectorQuantizer):
    """A level that somebody changed."""

    def forward(self, *args: Any, **options: Any) -> Any:
        out = super().forward(*args, **options)
        return out._replace(quantized=2 * out.quantized)


def derived(rvq: ResidualVectorQuantizer) -> None:
    rvq.layers[1].__class__ = Louder


def hooked(rvq: ResidualVectorQuantizer) -> None:
    rvq.layers[2].register_forward_hook(lambda module, args, out: out._replace(quantized=0 * out.quantized))


def replaced(rvq: ResidualVectorQuantizer) -> None:
    level = rvq.layers[0]
    original = level.forward
    level.forward = lambda *args, **options: original(*args, **options)._replace(quantized=args[0])


def other_cost(rvq: ResidualVectorQuantizer) -> None:
    rvq.layers[3].commitment_cost = 9.0


def weighted(rvq: ResidualVectorQuantizer) -> None:
    rvq.layers[3].orthogonal_weight = 1.0


@pytest.mark.parametrize("change", [derived, hooked, replaced, other_cost, weighted])
@torch.no_grad()
def test_levels_that_were_changed_are_asked(
    searched: list[bool], change: Callable[[ResidualVectorQuantizer], None]
) -> None:
    rvq, z = quantizer(), torch.randn(2, 12, 20)
    plain = rvq(z)
    change(rvq)
    out = rvq(z)
    assert searched == [True, False]
    assert not (out.quantized.equal(plain.quantized) and out.loss.equal(plain.loss))


@pytest.mark.parametrize(
    "options",
    [{"metric": "cosine"}, {"metric": "dot"}, {"normalize": True}, {"affine": True}, {"level_dim": 4}],
    ids=lambda o: next(iter(o)) if isinstance(o, dict) else None,
)
@torch.no_grad()
def test_other_searches_are_left_to_the_levels(searched: list[bool], options: dict[str, Any]) -> None:
    rvq = quantizer(**options)
    rvq(torch.randn(2, 12, 20))
    assert searched == [False]


def test_gradients_and_learning_are_left_to_the_levels(searched: list[bool]) -> None:
    rvq, z = quantizer(decay=0.9), torch.randn(2, 12, 20)
    assert rvq(z.clone().requires_grad_()).quantized.requires_grad
    assert quantizer()(z).loss.requires_grad
    rvq.train()(z)
    assert rvq.level(0).steps.item() == 1
    with torch.no_grad():
        rvq.eval()(z.double())
    assert searched == [False] * 4


def test_global_hooks_see_every_level(searched: list[bool]) -> None:
    rvq, seen = quantizer(), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        with torch.no_grad():
            rvq(torch.randn(1, 12, 4))
    finally:
        handle.remove()
    assert seen.count(VectorQuantizer) == 4
    assert searched == [False]


@torch.no_grad()
def test_compiles_without_graph_breaks() -> None:
    rvq, z = quantizer(decay=0.9), torch.randn(2, 12, 20)
    compiled = torch.compile(rvq, fullgraph=True, backend="aot_eager")
    assert_same(compiled(z), rvq(z))
