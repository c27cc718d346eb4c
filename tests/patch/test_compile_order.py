"""``patch`` and ``unpatch`` around ``torch.compile``: refused where documented, and no graph of before is ever used."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from parity import assert_near
from torch import Tensor, nn
from vector_quantize_pytorch import SimVQ

import vqkernels
from vqkernels import dispatch
from vqkernels.recognisers import Adapter

D, K = 6, 13
Compile = Callable[[nn.Module], nn.Module]


class Model(nn.Module):
    """The quantizer between two layers."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.encoder, self.quantizer, self.decoder = nn.Linear(D, D), quantizer, nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss = self.quantizer(self.encoder(x))
        return self.decoder(quantized), indices, loss


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The package's ops that ran."""
    called: list[str] = []
    original = dispatch.call
    monkeypatch.setattr(dispatch, "call", lambda op, *args: (called.append(op), original(op, *args))[1])
    return called


def outputs(run: nn.Module, model: nn.Module) -> list[Tensor]:
    """Of two training steps without an optimizer; gradients."""
    found: list[Tensor] = []
    for seed in range(2):
        model.zero_grad()
        out, indices, loss = run(torch.randn(2, 9, D, generator=torch.Generator().manual_seed(seed)))
        (loss.sum() + out.square().mean()).backward()
        found += [out.detach(), indices, loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return [t.clone() for t in found]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_near(a, e, f"result {i}", 1e-4)


@pytest.mark.slow
def test_a_graph_made_before_patch_or_unpatch_is_not_used_after_it(searches: list[str]) -> None:
    torch.manual_seed(0)
    model = Model(SimVQ(dim=D, codebook_size=K))
    start = copy.deepcopy(model.state_dict())
    expected = outputs(model, model)
    compiled = torch.compile(model, backend="eager")
    for change, ours in ((None, False), (vqkernels.patch, True), (vqkernels.unpatch, False)):
        if change is not None:
            change(model)  # the wrapper cannot be seen from here
        model.load_state_dict(start)
        searches.clear()
        assert_same(outputs(compiled, model), expected)
        assert bool(searches) == ours


def whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def submodule(model: nn.Module) -> nn.Module:
    model.quantizer = torch.compile(model.quantizer, backend="eager")
    return model


@pytest.mark.parametrize("how", [whole, in_place, submodule])
def test_a_compiled_quantizer_is_refused_and_left_as_it_is(how: Compile) -> None:
    model = how(Model(SimVQ(dim=D, codebook_size=K)))
    with pytest.raises(ValueError, match="compiled and holds the quantizer"):
        vqkernels.patch(model)
    assert not any(isinstance(module, Adapter) for module in model.modules())


def test_a_compiled_neighbour_does_not_matter(searches: list[str]) -> None:
    torch.manual_seed(0)
    model = Model(SimVQ(dim=D, codebook_size=K))
    expected = outputs(model, model)
    model.encoder = torch.compile(model.encoder, backend="eager")
    vqkernels.patch(model, strict=True)
    assert_same(outputs(model, model), expected)
    assert searches


def test_only_the_quantizer_is_compiled_in_one_graph(searches: list[str]) -> None:
    torch.manual_seed(0)
    model = Model(SimVQ(dim=D, codebook_size=K))
    expected = outputs(model, model)
    vqkernels.patch(model, strict=True)
    model.quantizer = torch.compile(model.quantizer, backend="eager", fullgraph=True)
    assert_same(outputs(model, model), expected)
    assert searches
