"""Processes that pass different things to one module: masks, weights, no rows, NaN. They must stay replicas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn

from vqkernels.nn import GroupedResidualVectorQuantizer, ResidualVectorQuantizer, SimVQ, VectorQuantizer

K, D = 12, 5
EMA: dict[str, Any] = {"decay": 0.8, "channel_dim": -1}
START: dict[str, Any] = {"init": "kmeans", "dead_code_ratio": 0.5}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "gradient": lambda: VectorQuantizer(K, D, channel_dim=-1),
    "gradient, dead codes": lambda: VectorQuantizer(K, D, channel_dim=-1, **START),
    "averages": lambda: VectorQuantizer(K, D, **EMA),
    "averages, dead codes": lambda: VectorQuantizer(K, D, **START, **EMA),
    "affine": lambda: VectorQuantizer(K, D, affine=True, init="kmeans", **EMA),
    "residual": lambda: ResidualVectorQuantizer(K, D, 3, dropout="batch", **START, **EMA),
    "residual by sample": lambda: ResidualVectorQuantizer(K, D, 3, dropout="sample", **EMA),
    "residual shared": lambda: ResidualVectorQuantizer(K, D, 3, shared_codebook=True, **START, **EMA),
    "grouped": lambda: GroupedResidualVectorQuantizer(K, D, 2, groups=2, init="kmeans", **EMA),
    "simvq": lambda: SimVQ(K, D, channel_dim=-1),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MODULES[name]()


def rows(seed: int, n: int, name: str = "") -> Tensor:
    return torch.randn(n, 2 * D if name == "grouped" else D, generator=torch.Generator().manual_seed(seed))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def assert_same(states: list[dict[str, Tensor]]) -> None:
    for other in states[1:]:
        for key, value in states[0].items():
            assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("name", MODULES)
def test_replicas_stay_the_same_whatever_the_processes_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(3, monkeypatch)
    modules = [build(name) for _ in range(3)]

    def process(rank: int) -> dict[str, Tensor]:
        vq = modules[rank]
        vq(rows(rank, (20, 31, 5)[rank], name))
        nothing = torch.zeros(4, dtype=torch.bool)
        before = state(vq)
        if rank == 0:  # all masked here, nothing there, NaN elsewhere: no row in any process
            vq(rows(0, 4, name), nothing)
        elif rank == 1:
            vq(rows(0, 0, name))
        else:
            vq(rows(0, 4, name) * torch.nan)
        after = state(vq)
        assert_same([before, {k: before[k] if k.endswith("dropout_step") else v for k, v in after.items()}])
        vq(rows(9, 8, name)) if rank == 1 else vq(rows(8, 4, name), nothing)
        vq(rows(7 + rank, 20, name))
        return state(vq)

    assert_same(ranks.run(process))


@pytest.mark.parametrize("name", ["averages", "averages, dead codes"])
def test_weights_of_one_process_alone_count_as_ones_elsewhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(2, monkeypatch)
    start = VectorQuantizer(K, D, init="kmeans", **EMA)
    start.initialize(rows(5, 40))
    weights = torch.rand(20, generator=torch.Generator().manual_seed(3))
    modules = [build(name) for _ in range(3)]
    for module in modules:
        module.load_state_dict(start.state_dict())

    def process(rank: int) -> dict[str, Tensor]:
        modules[rank](rows(rank, 20), weights=weights if rank == 0 else None)
        return state(modules[rank])

    found = ranks.run(process)
    assert_same(found)
    if name == "averages":  # which rows replace dead codes depends on how they are dealt out
        modules[2](torch.cat([rows(0, 20), rows(1, 20)]), weights=torch.cat([weights, torch.ones(20)]))
        for key, value in modules[2].state_dict().items():
            torch.testing.assert_close(found[0][key], value, rtol=1e-5, atol=1e-6)


def test_an_empty_batch_is_a_step_without_a_row() -> None:
    vq = build("averages")
    before = state(vq)
    vq(rows(0, 0))
    assert_same([before, state(vq)])
