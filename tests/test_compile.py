"""torch.compile, torch.export and opcheck: one graph, no recompiles over N, the same numbers as eager."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vqkernels
from vqkernels import VectorQuantizer

OPTIONS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "ema": {"decay": 0.9},
    "ema dead": {"decay": 0.9, "dead_code_ratio": 0.5},
    "gradient dead": {"dead_code_ratio": 0.5},
    "cosine": {"metric": "cosine"},
    "cosine ema": {"metric": "cosine", "decay": 0.9},
    "cosine raw": {"metric": "cosine", "normalize": False},
    "heads": {"heads": 2},
    "rotation": {"gradient": "rotation"},
}


class Model(nn.Module):
    """The smallest model with a quantizer inside."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        heads = options.get("heads", 1)
        self.encoder = nn.Conv2d(3, 8 * heads, 2, stride=2)
        self.quantizer = VectorQuantizer(16, 8, **options)
        self.decoder = nn.ConvTranspose2d(8 * heads, 3, 2, stride=2)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = self.quantizer(self.encoder(image))
        return self.decoder(out.quantized), out.loss, out.indices


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def steps(model: nn.Module, run: Any, sizes: list[int]) -> list[Tensor]:
    """What each step gives, and all gradients; the batch depends on its size only."""
    found: list[Tensor] = []
    for n in sizes:
        torch.manual_seed(n)
        reconstruction, loss, indices = run(torch.randn(n, 3, 10, 6))
        model.zero_grad()
        (reconstruction.square().mean() + loss).backward()
        found += [reconstruction.detach(), loss.detach(), indices]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return found


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def assert_same_state(got: nn.Module, want: nn.Module) -> None:
    assert_same(list(got.state_dict().values()), list(want.state_dict().values()))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_graph_forward_and_backward_with_the_numbers_of_eager(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Model(**options)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    assert_same(steps(twin, compiled, [2, 2, 2]), steps(model, model, [2, 2, 2]))
    assert_same_state(twin, model)


@pytest.mark.parametrize("options", [OPTIONS["gradient"], OPTIONS["ema dead"], OPTIONS["cosine"]], ids=str)
def test_no_recompiles_over_varying_n(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Model(**options)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager", dynamic=True)
    got = steps(twin, compiled, [2])
    with torch._dynamo.config.patch(error_on_recompile=True):
        got += steps(twin, compiled, [3, 5, 4, 7])
    assert_same(got, steps(model, model, [2, 3, 5, 4, 7]))
    assert_same_state(twin, model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "dynamic"),
    [
        pytest.param(OPTIONS["gradient"], None, id="batch"),
        pytest.param(
            OPTIONS["ema dead"],
            True,
            id="all dims",
            marks=pytest.mark.skipif(
                torch.__version__ < (2, 13), reason="Inductor of torch 2.11 cannot order symbolic strides of a 4-d view"
            ),
        ),
    ],
)
def test_inductor_compiles_once_for_any_batch(options: dict[str, Any], dynamic: bool | None) -> None:
    torch.manual_seed(0)
    model = Model(**options)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, dynamic=dynamic)
    got = steps(twin, compiled, [2, 3])
    with torch._dynamo.config.patch(error_on_recompile=True):
        got += steps(twin, compiled, [5, 4])
    assert_same(got, steps(model, model, [2, 3, 5, 4]))
    assert_same_state(twin, model)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_vector_quantize_compiles(gradient: str, masked: bool) -> None:
    def step(z: Tensor, codebook: Tensor, mask: Tensor | None) -> list[Tensor]:
        return list(vqkernels.vector_quantize(z.movedim(1, -1), codebook, gradient=gradient, mask=mask))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    codebook = torch.randn(7, 6, requires_grad=True)
    for n in (5, 3, 9):
        z = torch.randn(2, 6, n, requires_grad=True)
        mask = torch.rand(2, n) > 0.4 if masked else None
        both = []
        for run in (compiled, step):
            out = run(z, codebook, mask)
            total = out[2] + 3 * out[3] + (0.0 if gradient == "none" else out[0].sin().sum())
            both.append([*out, *torch.autograd.grad(total, (z, codebook))])
        assert_same(*both)
        assert both[0][0].stride() == both[1][0].stride()


def test_lookup_and_codebook_sum_compile() -> None:
    def step(codebook: Tensor, indices: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (vqkernels.lookup(codebook, indices), *vqkernels.codebook_sum(x, indices, 7))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    codebook = torch.randn(7, 3, requires_grad=True)
    for n in (5, 11):
        indices, x = torch.randint(7, (n,)), torch.randn(n, 3)
        got, want = compiled(codebook, indices, x), step(codebook, indices, x)
        assert_same(list(got), list(want))
        assert_same(
            list(torch.autograd.grad(got[0].sin().sum(), codebook)),
            list(torch.autograd.grad(want[0].sin().sum(), codebook)),
        )


def test_checkpointed_block_compiles() -> None:
    torch.manual_seed(0)
    model = Model()

    def run(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return checkpoint(model, image, use_reentrant=False)

    def plain(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return model(image)

    model.quantizer.eval()  # no statistics: a compiled checkpoint may not have side effects
    want = steps(model, plain, [2, 3])
    assert_same(steps(model, torch.compile(run, fullgraph=True, backend="aot_eager"), [2, 3]), want)


@pytest.mark.parametrize("options", [OPTIONS["gradient"], OPTIONS["cosine"], OPTIONS["heads"]], ids=str)
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_quantizer_itself(options: dict[str, Any], strict: bool) -> None:
    vq = VectorQuantizer(16, 8, **options).eval()
    z = torch.randn(2, 8 * vq.heads, 5)
    assert_same(list(torch.export.export(vq, (z,), strict=strict).module()(z)), list(vq(z)))


@pytest.mark.parametrize("options", [OPTIONS["gradient"], OPTIONS["cosine"], OPTIONS["heads"]], ids=str)
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(options: dict[str, Any], strict: bool) -> None:
    torch.manual_seed(0)
    model = Model(**options).eval()
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(
        model, (torch.randn(2, 3, 10, 6),), dynamic_shapes={"image": {0: batch}}, strict=strict
    )
    for n in (1, 2, 5):
        image = torch.randn(n, 3, 10, 6)
        assert_same(list(program.module()(image)), list(model(image)))
    assert any("vqkernels.nearest" in str(node.target) for node in program.graph.nodes)
