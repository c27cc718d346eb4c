"""Counts, lengths and indices out of range: an error that says what was expected, before anything has changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantizers import same_state
from torch import Tensor

from vqkernels import nn as vnn

ELEMENTWISE: dict[str, Callable[[], Any]] = {
    "fsq": lambda: vnn.FSQ([5, 3, 3]),
    "fsq heads": lambda: vnn.FSQ([5, 3, 3], heads=2),
    "fsq projected": lambda: vnn.FSQ([5, 3, 3], input_dim=4),
    "lfq": lambda: vnn.LFQ(5),
    "bsq": lambda: vnn.BSQ(5),
}


@pytest.mark.parametrize("make", ELEMENTWISE.values(), ids=ELEMENTWISE)
@pytest.mark.parametrize("wrong", [-2, "K"])
def test_codes_of_wrong_indices(make: Callable[[], Any], wrong: int | str) -> None:
    quantizer = make()
    index = quantizer.num_embeddings if wrong == "K" else int(wrong)
    indices = torch.tensor([[0, index], [-1, 1]])
    expected = f"indices contains {index}; expected integers in [-1, {quantizer.num_embeddings - 1}]"
    with pytest.raises(ValueError, match=re.escape(expected)):
        quantizer.codes_to_output(indices)


@pytest.mark.parametrize("make", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_a_compiled_graph_takes_a_wrong_index_for_none(make: Callable[[], Any]) -> None:
    quantizer = make()
    decode = torch.compile(quantizer.codes_to_output, fullgraph=True, backend="eager")
    k = quantizer.num_embeddings
    found = decode(torch.tensor([[0, k], [-2, 1], [k + 7, -9]]))
    assert torch.equal(found, quantizer.codes_to_output(torch.tensor([[0, -1], [-1, 1], [-1, -1]])))


def residual(**options: Any) -> vnn.ResidualVectorQuantizer:
    return vnn.ResidualVectorQuantizer(16, 4, 3, decay=0.9, dropout="batch", **options)


def grouped() -> vnn.GroupedResidualVectorQuantizer:
    return vnn.GroupedResidualVectorQuantizer(16, 2, 3, groups=2, decay=0.9, dropout="batch")


def split() -> vnn.SplitResidualVectorQuantizer:
    return vnn.SplitResidualVectorQuantizer(16, 4, 3, decay=0.9, dropout="batch")


Z = torch.zeros(2, 4, 5)


@pytest.mark.parametrize(
    ("make", "kwargs", "expected"),
    [
        (
            lambda: vnn.VectorQuantizer(16, 4, decay=0.9),
            {"lens": torch.tensor([5, 6])},
            "lens contains 6; expected inte",
        ),
        (residual, {"lens": torch.tensor([-1, 5])}, "lens contains -1; expected integers in [0, 5]"),
        (lambda: vnn.FSQ([5, 5, 3, 3]), {"lens": torch.tensor([9, 5])}, "lens contains 9; expected integers in [0, 5]"),
        (grouped, {"lens": torch.tensor([9, 5])}, "lens contains 9"),
        (split, {"lens": torch.tensor([9, 5])}, "lens contains 9"),
        (residual, {"keep": torch.tensor(0)}, "keep contains 0; expected integers in [1, 3]"),
        (residual, {"keep": torch.tensor([1, 4])}, "keep contains 4; expected integers in [1, 3]"),
        (grouped, {"keep": torch.tensor(4)}, "keep contains 4; expected integers in [1, 3]"),
        (split, {"keep": torch.tensor(3)}, "keep contains 3; expected integers in [1, 2]"),
        (split, {"num_levels": 0}, "num_levels is 0"),
        (grouped, {"num_levels": 4}, "num_levels is 4"),
    ],
)
def test_wrong_lengths_and_levels_change_nothing(make: Any, kwargs: dict[str, Any], expected: str) -> None:
    module = make().train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(expected)):
        module(Z, **kwargs)
    assert same_state(module.state_dict(), before)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: vnn.VectorQuantizer(4, 2, kmeans_iters=-1), "kmeans_iters is -1; expected at least 0"),
        (lambda: vnn.VectorQuantizer(4, 2, kmeans_iters=2.5), "kmeans_iters is 2.5; expected an integer"),
        (lambda: vnn.VectorQuantizer(4, 2, seed=0.5), "seed is 0.5; expected an integer"),
        (lambda: residual(dropout_seed=0.5), "dropout_seed is 0.5; expected an integer"),
        (lambda: vnn.RandomProjectionQuantizer(4, 4, 2, seed="a"), "seed is 'a'; expected an integer"),
        (lambda: vnn.MultiScaleVectorQuantizer(4, 2, [1, 2.5]), "sizes has 2.5; expected integers"),
        (lambda: vnn.MultiScaleVectorQuantizer(4, 2, [(1, 1), (2.5, 3)]), "sizes has (2.5, 3); expected integers"),
        (lambda: residual().bitrate(-1.0), "frame_rate is -1.0; expected a finite number"),
        (lambda: residual().levels_for(float("nan"), 75.0), "bits_per_second is nan; expected a finite number"),
        (lambda: vnn.IndexRemap(torch.tensor([1, 3]), 5)(torch.tensor([-2])), "indices contains -2; expected"),
        (lambda: vnn.IndexRemap(torch.tensor([1, 3]), 5)(torch.tensor([5])), "indices contains 5; expected"),
        (lambda: vnn.IndexRemap(torch.tensor([1, 3]), 5).inverse(torch.tensor([2])), "positions contains 2; expected"),
    ],
)
def test_wrong_numbers(call: Callable[[], Any], expected: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(expected)):
        call()


def test_labels_of_float64_under_autocast() -> None:
    label = vnn.RandomProjectionQuantizer(8, 16, 4).double()
    z = torch.randn(2, 8, 5, dtype=torch.float64)
    want: Tensor = label(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(label(z), want)
