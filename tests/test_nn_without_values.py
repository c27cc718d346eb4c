"""Quantizers on meta and fake tensors: shapes and dtypes as on the CPU, and models that get their values afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _device

from vqkernels import nn as vnn

# Remembers the functions that torch.device(...) acts on: now, before the fixtures put another torch.empty in place.
_device._device_constructors()

MAKERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "gradient": (lambda **k: vnn.VectorQuantizer(16, 8, **k), (2, 8, 5)),
    "kmeans": (lambda **k: vnn.VectorQuantizer(16, 8, decay=0.9, init="kmeans", **k), (2, 8, 5)),
    "projected": (lambda **k: vnn.VectorQuantizer(16, 8, metric="cosine", input_dim=12, heads=2, **k), (2, 12, 5)),
    "softmax": (lambda **k: vnn.VectorQuantizer(16, 8, gradient="softmax", batch_entropy_weight=0.1, **k), (2, 8, 5)),
    "orthogonal": (lambda **k: vnn.VectorQuantizer(16, 8, orthogonal_weight=0.1, **k), (2, 8, 5)),
    "sampled": (lambda **k: vnn.VectorQuantizer(16, 8, sample_temperature=0.1, **k), (2, 8, 5)),
    "residual": (lambda **k: vnn.ResidualVectorQuantizer(16, 8, 3, decay=0.9, dropout="batch", **k), (2, 8, 5)),
    "grouped": (lambda **k: vnn.GroupedResidualVectorQuantizer(16, 8, 3, groups=2, **k), (2, 16, 5)),
    "split": (lambda **k: vnn.SplitResidualVectorQuantizer(16, 8, 3, input_dim=12, dropout="batch", **k), (2, 12, 5)),
    "multi scale": (lambda **k: vnn.MultiScaleVectorQuantizer(16, 8, [1, 2, 4], **k), (2, 8, 4, 4)),
    "sim": (lambda **k: vnn.SimVQ(16, 8, **k), (2, 8, 5)),
    "random projection": (lambda **k: vnn.RandomProjectionQuantizer(8, 16, 4, **k), (2, 8, 5)),
    "fsq": (lambda **k: vnn.FSQ([8, 5, 5], input_dim=8, **k), (2, 8, 5)),
    "lfq": (lambda **k: vnn.LFQ(6, commitment_cost=0.25, **k), (2, 6, 5)),
    "bsq": (lambda **k: vnn.BSQ(6, **k), (2, 6, 5)),
}
EVERY = pytest.mark.parametrize(("make", "shape"), MAKERS.values(), ids=MAKERS)


def tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [t for part in found for t in tensors(part)]


def described(found: Any) -> list[tuple[Any, ...]]:
    return [(tuple(t.shape), t.dtype, t.stride()) for t in tensors(found)]


@pytest.mark.parametrize("training", [True, False])
@EVERY
def test_shapes_on_meta_and_fake_tensors(make: Any, shape: tuple[int, ...], training: bool) -> None:
    want = described(make().train(training)(torch.randn(shape)))
    module = make(device="meta").train(training)
    found = module(torch.empty(shape, device="meta"))
    assert described(found) == want
    assert all(t.is_meta for t in tensors(found))
    with torch.device("meta"):
        module = make().train(training)
        assert described(module(torch.empty(shape))) == want
    assert all(t.is_meta for t in [*module.parameters(), *module.buffers()])
    with FakeTensorMode():
        assert described(make().train(training)(torch.empty(shape))) == want


@EVERY
def test_values_come_with_the_checkpoint(make: Any, shape: tuple[int, ...]) -> None:
    given = make().eval()
    empty = make(device="meta").eval().to_empty(device="cpu")
    for t in [*empty.parameters(), *empty.buffers()]:
        assert not t.is_meta
    empty.load_state_dict(given.state_dict())
    z = torch.randn(shape)
    for a, b in zip(tensors(empty(z)), tensors(given(z)), strict=True):
        assert torch.equal(a, b)


def test_kmeans_waits_for_values() -> None:
    vq = vnn.VectorQuantizer(16, 8, decay=0.9, init="kmeans", device="meta")
    vq(torch.empty(40, 8, device="meta"))
    assert vq._waiting
    with pytest.raises(ValueError, match="z is a meta or fake tensor; expected one with values for k-means"):
        vq.initialize(torch.empty(40, 8, device="meta"))
