"""Copies of a quantizer whose codes are spread over a group of processes: they share the group, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from vqkernels.distributed import ShardedVectorQuantizer


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("decay", [None, 0.8])
def test_a_deep_copy_shares_the_group_and_no_tensor(decay: float | None) -> None:
    model = nn.Sequential(nn.Linear(4, 4), ShardedVectorQuantizer(8, 4, decay=decay, group=dist.group.WORLD))
    twin = copy.deepcopy(model)
    assert twin[1].group is model[1].group
    x = torch.randn(9, 4)
    before = {k: v.clone() for k, v in twin.state_dict().items()}
    out = model(x)
    (out.loss + out.quantized.square().mean()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(torch.equal(v, before[k]) for k, v in twin.state_dict().items())
    assert not torch.equal(model[1].codebook, twin[1].codebook)
    assert torch.equal(twin(x).indices, out.indices)
    assert isinstance(twin[1].codebook, nn.Parameter) == (decay is None)
