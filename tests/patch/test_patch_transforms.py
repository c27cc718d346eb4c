"""``torch.func`` through a patched model: what it does through the original; where it raises, no state changes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vq_model import VectorQuantizer
from pairs import pair
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._pytree import tree_leaves
from vector_quantize_pytorch import ResidualVQ, SimVQ, VectorQuantize

import vqkernels

LEARNABLE = {"learnable_codebook": True, "ema_update": False}
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "diffusers": (lambda: VectorQuantizer(16, 4, beta=0.25, legacy=False), (2, 4, 3, 3), True),
    "VectorQuantize": (lambda: VectorQuantize(dim=4, codebook_size=16), (2, 5, 4), False),
    "learnable": (lambda: VectorQuantize(dim=4, codebook_size=16, **LEARNABLE), (2, 5, 4), False),
    "ResidualVQ": (lambda: ResidualVQ(dim=4, codebook_size=16, num_quantizers=3), (2, 5, 4), False),
    "SimVQ": (lambda: SimVQ(dim=4, codebook_size=16), (2, 5, 4), True),
    "SimVQ straight through": (lambda: SimVQ(dim=4, codebook_size=16, rotation_trick=False), (2, 5, 4), True),
}  # fmt: skip
EVERY = pytest.mark.parametrize(("make", "shape", "trains"), CASES.values(), ids=CASES)


def objective(module: nn.Module) -> Callable[[Any, Tensor], Tensor]:
    """A loss of the quantized values and of the quantizer's own losses."""

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        out = functional_call(module, parameters, (x,))
        own = next(t for t in out[1:] if isinstance(t, Tensor) and t.is_floating_point())
        return out[0].sin().sum() + own.sum()

    return loss


def leaves(module: nn.Module, way: Callable[..., Any], x: Tensor) -> list[Tensor]:
    parameters = {k: v.detach() for k, v in module.named_parameters()}
    return [t for t in tree_leaves(way(objective(module), parameters, x)) if isinstance(t, Tensor)]


WAYS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, p, x: grad(f, (0, 1))(p, x),
    "per sample": lambda f, p, x: vmap(grad(f, (0, 1)), (None, 0))(p, x.unsqueeze(1)),
    "of samples": lambda f, p, x: grad(lambda x: vmap(lambda x: f(p, x))(x).sum())(x.unsqueeze(1)),
    "second order": lambda f, p, x: grad(lambda x: grad(f, 1)(p, x).square().sum())(x),
    "tangent": lambda f, p, x: jvp(lambda x: f(p, x), (x,), (2 * x,)),
}

# What the originals cannot do: cdist has no such derivative, or vector-quantize-pytorch asks a tensor for a value.
RAISE = {("tangent", True): "cdist", ("per sample", False): "item"}


@pytest.mark.parametrize("way", WAYS)
@EVERY
def test_transforms_see_what_they_see_in_the_original(make: Any, shape: Any, trains: bool, way: str) -> None:
    torch.manual_seed(0)
    original, patched = pair(make())
    for training in (True, False) if trains else (False,):
        x = torch.randn(shape)
        found = leaves(patched.train(training), WAYS[way], x)
        assert not trains or any(t.any() for t in found)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if (way, trains) in RAISE:
                with pytest.raises((RuntimeError, NotImplementedError), match=RAISE[way, trains]):
                    leaves(original.train(training), WAYS[way], x)
                continue
            want = leaves(original.train(training), WAYS[way], x)
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("way", ["grad", "per sample"])
@pytest.mark.parametrize("name", ["VectorQuantize", "ResidualVQ"])
def test_training_that_is_refused_changes_nothing(name: str, way: str) -> None:
    make, shape, _ = CASES[name]
    for module in pair(make().train()):
        before = copy.deepcopy(module.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(RuntimeError, match=r"captured Tensor|requires_grad_|vmap"):
                leaves(module, WAYS[way], torch.randn(shape))
        if isinstance(module, vqkernels.recognisers.Adapter):
            assert all(torch.equal(v, module.state_dict()[k]) for k, v in before.items())
