"""Quantizers built under ``torch.device("meta")`` that take the tensors of a checkpoint as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_nn_state import LAYOUTS
from test_nn_without_values import EVERY, MAKERS, tensors
from torch import Tensor, nn

from vqkernels import VectorQuantizer
from vqkernels import nn as vnn

ELEMENTWISE = pytest.mark.parametrize("name", ["fsq", "lfq", "bsq"])


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def of_meta(module: nn.Module) -> list[str]:
    return [name for name, t in [*module.named_parameters(), *module.named_buffers()] if t.is_meta]


@pytest.mark.parametrize("training", [True, False])
@EVERY
def test_nothing_is_missing_afterwards(make: Any, shape: tuple[int, ...], training: bool) -> None:
    given, z = nn.Sequential(make()).train(training), torch.randn(shape)
    with torch.device("meta"):
        empty = nn.Sequential(make()).train(training)
    empty.load_state_dict(copies(given), assign=True)
    assert not of_meta(empty)
    found = []
    for module in (given, empty):
        torch.manual_seed(1)
        found.append(tensors(module(z)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    # Constants are no parameters: casts and moves find them where they belong.
    for module in (given, empty):
        module.double().to("cpu")
    assert [t.dtype for t in empty.buffers()] == [t.dtype for t in given.buffers()]


@ELEMENTWISE
def test_constants_come_with_the_first_input_where_no_checkpoint_was_loaded(name: str) -> None:
    make, shape = MAKERS[name]
    given, z = make().eval(), torch.randn(shape)
    indices = given(z).indices
    for call in (lambda module: module(z).quantized, lambda module: module.codes_to_output(indices)):
        empty = make(device="meta").eval()
        for part in (empty.project_in, empty.project_out):
            if part is not None:  # as a loader does that sets one parameter after the other
                part.to_empty(device="cpu")
        for path, value in given.named_parameters():
            empty.get_parameter(path).data.copy_(value.detach())
        assert torch.equal(call(empty), call(given))
        assert not of_meta(empty)


@ELEMENTWISE
def test_meta_stays_meta_without_values(name: str) -> None:
    make, shape = MAKERS[name]
    with torch.device("meta"):
        empty = make()
        empty.load_state_dict(empty.state_dict(), assign=True)
    empty.half()
    assert len(of_meta(empty)) == len([*empty.parameters(), *empty.buffers()])
    assert empty(torch.empty(shape, device="meta")).indices.is_meta


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_of_other_libraries(layout: str) -> None:
    with torch.device("meta"):
        empty = VectorQuantizer(16, 8, decay=0.9, init="kmeans")
    given = VectorQuantizer(16, 8, decay=0.9, init="kmeans")
    state = {k: v.clone() for k, v in LAYOUTS[layout].items()}
    given.load_state_dict(state)
    empty.load_state_dict(state, assign=True)
    assert not of_meta(empty)
    assert empty._waiting == given._waiting
    for name, value in given.state_dict().items():
        assert torch.equal(empty.state_dict()[name], value)
    z = torch.randn(30, 8)
    assert torch.equal(empty(z).indices, given(z).indices)
    assert torch.equal(empty.codebook, given.codebook)


def test_other_quantizers_of_other_libraries() -> None:
    makers: dict[str, Any] = {
        "sim": (lambda: vnn.SimVQ(16, 8), {"frozen_codebook": "embedding.weight"}),
        "multi scale": (lambda: vnn.MultiScaleVectorQuantizer(16, 8, [1, 2]), {"codebook": "embedding.weight"}),
    }
    for make, names in makers.values():
        given = make()
        state = {names.get(k, k): v for k, v in copies(given).items() if k != "code_counts"}
        with torch.device("meta"):
            empty = make()
        empty.load_state_dict(state, assign=True)
        assert not of_meta(empty)
        assert not empty.code_counts.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_checkpoint_is_widened_as_by_a_copy(dtype: torch.dtype) -> None:
    for device in ("meta", "cpu"):
        state = VectorQuantizer(16, 8, decay=0.9).state_dict()
        vq = VectorQuantizer(16, 8, decay=0.9, device=device)
        vq.load_state_dict({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, assign=True)
        assert {t.dtype for t in vq.state_dict().values() if t.is_floating_point()} == {torch.float32}
        vq(torch.randn(30, 8))  # moving averages have no half-precision form
        assert vq.steps.item() == 1
