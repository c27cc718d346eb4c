"""``torch.func`` through the quantizers: gradients, gradients per sample, tangents, and what training says to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_nn_without_values import MAKERS
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from vqkernels import ResidualVectorQuantizer, VectorQuantizer
from vqkernels import nn as vnn

# The softmax over all codes has a Function of its own; a random projection has no gradient.
DIFFERENTIABLE = {name: made for name, made in MAKERS.items() if name not in ("softmax", "random projection")}
EVERY = pytest.mark.parametrize(("make", "shape"), DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)


def setup(make: Any, shape: tuple[int, ...]) -> tuple[nn.Module, dict[str, Tensor], Tensor, Callable[..., Tensor]]:
    """A quantizer in eval mode in float64 where it can be, parameters, input, and a loss of every result."""
    torch.manual_seed(0)
    module = make().eval()

    def loss(parameters: dict[str, Tensor], z: Tensor) -> Tensor:
        out = functional_call(module, parameters, (z,))
        return out.loss + (out.quantized * torch.linspace(-1, 1, out.quantized[0].numel()).view_as(z[0])).sum()

    return module, {k: v.detach() for k, v in module.named_parameters()}, torch.randn(shape), loss


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6, check_dtype=False)


def total(tree: tuple[dict[str, Tensor], Tensor], other: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    pairs = [(v, other[0][k]) for k, v in tree[0].items()] + [(tree[1], other[1])]
    return torch.stack([(a * b).sum() for a, b in pairs]).sum()


@EVERY
def test_gradients_are_those_of_autograd(make: Any, shape: tuple[int, ...]) -> None:
    _, parameters, z, loss = setup(make, shape)
    got = grad(loss, (0, 1))(parameters, z)
    leaves = {k: v.clone().requires_grad_() for k, v in parameters.items()}
    point = z.clone().requires_grad_()
    loss(leaves, point).backward()
    assert point.grad.any()
    close(got, ({k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()}, point.grad))
    # Forward mode: the same derivative, in one direction.
    direction = ({k: torch.randn_like(v) for k, v in parameters.items()}, torch.randn_like(z))
    close(jvp(loss, (parameters, z), direction)[1], total(got, direction))


@EVERY
def test_gradients_per_sample(make: Any, shape: tuple[int, ...]) -> None:
    _, parameters, z, loss = setup(make, shape)
    got = vmap(grad(loss, (0, 1)), (None, 0))(parameters, z.unsqueeze(1))
    for i in range(len(z)):
        want = grad(loss, (0, 1))(parameters, z[i : i + 1])
        close(({k: v[i] for k, v in got[0].items()}, got[1][i]), want)
    # The gradient of what vmap makes: inside of it no tensor says that one is wanted.
    whole = grad(lambda p, z: vmap(loss, (None, 0))(p, z).sum(), (0, 1))(parameters, z.unsqueeze(1))
    close(whole, ({k: v.sum(0) for k, v in got[0].items()}, got[1]))


def test_training_moves_the_buffers_that_are_passed() -> None:
    torch.manual_seed(0)
    for options in ({}, {"decay": 0.9, "dead_code_ratio": 0.5, "init": "kmeans"}):
        vq = VectorQuantizer(7, 3, **options)
        z = torch.randn(40, 3)
        twin = VectorQuantizer(7, 3, **options)
        twin.load_state_dict(vq.state_dict())
        before = {k: v.clone() for k, v in vq.state_dict().items()}
        state = {k: v.clone() for k, v in vq.named_buffers()}
        got = grad(lambda z, b: functional_call(vq, b, (z,)).loss)(z, state)  # noqa: B023
        leaf = z.clone().requires_grad_()
        twin(leaf).loss.backward()
        close(got, leaf.grad)
        for name, value in twin.named_buffers():
            assert torch.equal(state[name], value)
        assert all(torch.equal(v, before[k]) for k, v in vq.state_dict().items())


def test_training_refuses_what_it_cannot_do() -> None:
    z = torch.randn(2, 5, 3)
    for vq in (VectorQuantizer(7, 3), VectorQuantizer(7, 3, decay=0.9), vnn.SimVQ(7, 3, channel_dim=-1)):
        with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
            grad(lambda z: vq(z).loss)(z[0])  # noqa: B023
        with pytest.raises(RuntimeError, match=r"under torch\.vmap each sample would; call eval\(\)"):
            vmap(lambda z: vq(z).loss)(z)  # noqa: B023
    vq = VectorQuantizer(7, 3, decay=0.9)
    vq.freeze()
    close(vmap(lambda z: vq(z).loss)(z), torch.stack([vq(part).loss for part in z]))
    assert vq.steps.item() == 0


def test_lengths_are_looked_at_outside_of_vmap_only() -> None:
    vq = VectorQuantizer(7, 3, channel_dim=-1).eval()
    z, lens = torch.randn(3, 1, 5, 3), torch.tensor([[5], [0], [2]])
    found = vmap(lambda z, lens: vq(z, lens=lens).indices)(z, lens)
    assert torch.equal(found, vq(z[:, 0], lens=lens[:, 0]).indices.unsqueeze(1))
    rvq = ResidualVectorQuantizer(7, 3, 2, channel_dim=-1).eval()
    found = vmap(lambda z, keep: rvq(z, keep=keep).indices)(z, keep := torch.tensor([[2], [1], [2]]))
    assert torch.equal(found, rvq(z[:, 0], keep=keep[:, 0]).indices.unsqueeze(1))
