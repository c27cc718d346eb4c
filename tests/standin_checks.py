"""Devices without float64: the same answers as on the CPU. Run by test_devices.py, in a process of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vqkernels
from tests import standin
from tests.test_nn_without_values import EVERY
from vqkernels import _native, dispatch
from vqkernels.models import VQVAE, VQVAEConfig
from vqkernels.training import metrics


@pytest.fixture
def device() -> Iterator[torch.device]:
    with standin.device() as place:
        yield place


def back(found: Any) -> Any:
    """Results, on the CPU."""
    if isinstance(found, Tensor):
        return found.detach().cpu()
    return [back(part) for part in found] if isinstance(found, (tuple, list)) else found


def same(found: Any, wanted: Any) -> None:
    for a, b in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(wanted), strict=True):
        if isinstance(b, float):
            assert a == pytest.approx(b, rel=1e-5)
        elif b.dtype.is_floating_point:
            torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))
        else:
            assert torch.equal(a, b)


def trained(module: nn.Module, batches: list[Tensor]) -> list[Any]:
    """Results and gradients of steps of gradient descent, then those of eval."""
    torch.manual_seed(0)
    found = []
    for z in batches:
        z = z.detach().requires_grad_()
        out = module(z)
        loss = out.loss if hasattr(out, "loss") else 0.0
        values = out.quantized if hasattr(out, "quantized") else None
        if values is not None and values.requires_grad:
            module.zero_grad()
            (loss + values.sin().sum()).backward()
            found.append(z.grad)
            with torch.no_grad():
                for p in module.parameters():
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=0.1)
        found.append(out)
    with torch.no_grad():
        found.append(module.eval()(batches[0]))
    return [back(f) for f in found]


@EVERY
def test_a_quantizer_learns_as_on_the_cpu(device: torch.device, make: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    cpu = make()
    there = copy.deepcopy(cpu).to(device)
    batches = [torch.randn(8, *shape[1:]) for _ in range(3)]  # more rows than codes
    wanted = trained(cpu, batches)
    same(trained(there, [z.to(device) for z in batches]), wanted)
    state = {k: v.cpu() for k, v in there.state_dict().items()}
    same(list(state.values()), list(cpu.state_dict().values()))
    make().load_state_dict(state)


@pytest.mark.parametrize("options", [{"affine": True, "decay": 0.9}, {"dead_code_ratio": 0.9, "decay": 0.9}], ids=str)
def test_statistics_are_those_of_the_cpu(device: torch.device, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    cpu = vqkernels.VectorQuantizer(16, 8, init="normal", **options)
    there = copy.deepcopy(cpu).to(device)
    batches = [torch.randn(2, 8, 5) + 100 for _ in range(4)]  # far from 0, where squares of float32 cancel
    wanted = trained(cpu, batches)
    same(trained(there, [z.to(device) for z in batches]), wanted)
    same([back(there.usage()), back(there.perplexity())], [cpu.usage(), cpu.perplexity()])


@pytest.mark.parametrize("masked", [False, True])
def test_losses_and_masks(device: torch.device, masked: bool) -> None:
    z, codes = torch.randn(3000, 8), torch.randn(40, 8)
    mask = torch.rand(3000) > 0.3 if masked else None
    wanted = vqkernels.vector_quantize(z, codes, mask=mask)
    found = vqkernels.vector_quantize(z.to(device), codes.to(device), mask=None if mask is None else mask.to(device))
    assert {t.device.type for t in found} == {standin.NAME}
    same(back(found), list(wanted))
    with torch.no_grad():  # as a sum of its own: nothing was measured by the search
        same(
            back(vqkernels.vector_quantize(z.to(device), codes.to(device), metric="dot")),
            list(vqkernels.vector_quantize(z, codes, metric="dot")),
        )


def test_functions(device: torch.device) -> None:
    x, codes = torch.randn(2, 3, 50, 8).movedim(1, -2), torch.randn(4, 20, 8)
    indices, score = vqkernels.nearest(x.to(device), codes[0].to(device), metric="cosine")
    same(back([indices, score]), list(vqkernels.nearest(x, codes[0], metric="cosine")))
    sums = vqkernels.codebook_sum(x.to(device), indices, 20)
    assert all(torch.equal(a, b) for a, b in zip(back(sums), vqkernels.codebook_sum(x, indices.cpu(), 20), strict=True))
    levels = [c.to(device) for c in codes]
    same(back(vqkernels.residual_nearest(x.to(device), levels)), list(vqkernels.residual_nearest(x, list(codes))))
    assert torch.equal(vqkernels.lookup(levels[0], indices).cpu(), vqkernels.lookup(codes[0], indices.cpu()))


def test_what_goes_to_the_cpu_is_said(device: torch.device) -> None:
    x, codes = torch.randn(9, 8, device=device), torch.randn(5, 8, device=device)
    said = vqkernels.explain("nearest", x, codes)
    assert said.splitlines()[0] == "nearest on standin: on the CPU, because standin has no float64"
    assert "chosen" in said
    assert vqkernels.explain("lookup", codes, torch.zeros(3, dtype=torch.int64, device=device)).startswith(
        "lookup on standin: reference"
    )
    exact = vqkernels.nearest(x.cpu(), codes.cpu())[0]
    for backend in ("reference", *(["native"] if _native.unavailable("cpu") is None else [])):
        assert torch.equal(vqkernels.nearest(x, codes, backend=backend)[0].cpu(), exact)
    with pytest.raises(dispatch.Unsupported, match="triton"):
        vqkernels.nearest(x, codes, backend="triton")


def test_a_model_and_what_training_writes_about_it(device: torch.device) -> None:
    pytest.importorskip("torchmetrics")
    torch.manual_seed(0)
    cpu = VQVAE(VQVAEConfig(base_channels=8, residual_channels=4, codes=16, dim=4))
    there = copy.deepcopy(cpu).to(device)
    crops = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    wanted = metrics.evaluate(cpu, crops, ["a", "b", "b"], torch.device("cpu"), 2)
    found = metrics.evaluate(there, crops, ["a", "b", "b"], device, 2)
    assert found["psnr"] == pytest.approx(wanted["psnr"], rel=1e-4)
    window = metrics.Window(cpu.streams, device)
    losses = {"reconstruction": torch.tensor(0.25, device=device), "commitment": torch.tensor(1.0, device=device)}
    window.add(losses, [c + 1 for c in metrics.no_counts(cpu.streams, device)])
    assert window.take()["reconstruction"] == 0.25


def test_a_patched_model(device: torch.device) -> None:
    peer = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    cpu = peer.ResidualVQ(dim=8, codebook_size=16, num_quantizers=3, kmeans_init=False)
    there = copy.deepcopy(cpu).to(device)
    for model in (cpu, there):
        assert vqkernels.patch(model).replaced
    x = torch.randn(2, 20, 8)
    for train in (True, False):
        wanted, found = cpu.train(train)(x), there.train(train)(x.to(device))
        same(back(found), list(wanted))
