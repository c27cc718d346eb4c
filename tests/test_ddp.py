"""Two gloo processes against one process on the joined batch: the same indices, codebooks, and no hang."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vqkernels import VectorQuantizer

K, D, STEPS = 12, 5, 4
OPTIONS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "gradient dead": {"dead_code_ratio": 0.5},
    "ema": {"decay": 0.8},
    "ema dead": {"decay": 0.8, "dead_code_ratio": 0.5},
    "kmeans": {"decay": 0.8, "init": "kmeans"},
    "cosine heads": {"decay": 0.8, "metric": "cosine", "heads": 2},
}
AVERAGED = [name for name, options in OPTIONS.items() if "decay" in options]
# Rows of each rank in each step: even, uneven, and none at all on one of them.
EVEN = [(20, 20)] * STEPS
UNEVEN = [(20, 31), (7, 40), (0, 25), (33, 0)]


class Model(nn.Module):
    """A linear encoder keeps DDP busy."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.encoder = nn.Linear(D * options.get("heads", 1), D * options.get("heads", 1))
        self.quantizer = VectorQuantizer(K, D, channel_dim=-1, **options)

    def forward(self, x: Tensor) -> Any:
        return self.quantizer(self.encoder(x))


def make(options: dict[str, Any]) -> tuple[Model, list[Tensor]]:
    torch.manual_seed(7)
    return Model(options), [torch.randn(80, D * options.get("heads", 1)) for _ in range(STEPS)]


def train(model: nn.Module, batches: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    indices = []
    for x in batches:
        out = model(x)
        indices.append(out.indices)
        optimizer.zero_grad()
        (out.loss + out.quantized.square().sum() / max(out.quantized.numel(), 1)).backward()
        optimizer.step()
    return indices, {k: v.clone() for k, v in inner.state_dict().items()}


def several(rank: int, sizes: list[tuple[int, int]], names: list[str], wrap: bool) -> dict[str, Any]:
    """This rank's share of every step, for several options."""
    found = {}
    for name in names:
        model, data = make(OPTIONS[name])
        begin = [0 if rank == 0 else a for a, _ in sizes]
        batches = [x[b : b + n[rank]] for x, b, n in zip(data, begin, sizes, strict=True)]
        found[name] = train(DistributedDataParallel(model) if wrap else model, batches)
    return found


def pooled(rank: int) -> dict[str, Tensor]:
    """Micro-batches: rank 1 has one in the first update and none in the second."""
    model, data = make(OPTIONS["ema"])
    vq = model.quantizer
    for step, parts in enumerate([([10, 10], [20]), ([15, 5], [])]):
        begin = 0 if rank == 0 else sum(parts[0])
        with vq.accumulating():
            for n in parts[rank]:
                vq(data[step][begin : begin + n])
                begin += n
    return {k: v.clone() for k, v in vq.state_dict().items()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    early = [VectorQuantizer(K, D, decay=decay) for decay in (None, 0.8)]
    alone = VectorQuantizer(K, D, decay=0.8, sync=False)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        found = {
            "even": several(rank, EVEN, list(OPTIONS), True),
            "uneven": several(rank, UNEVEN, AVERAGED, False),
            "pooled": pooled(rank),
        }
        for vq in (*early, alone):
            vq(torch.randn(30, D))
        found["early"], found["alone"] = [int(vq.code_counts.sum()) for vq in early], int(alone.code_counts.sum())
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found; they are started once, which costs more than all they do."""
    folder = tmp_path_factory.mktemp("ddp")
    mp.start_processes(worker, (str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_two_processes_equal_one_on_the_joined_batch(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["even"] for rank in ranks)
    for name, options in OPTIONS.items():
        (indices_a, state_a), (indices_b, state_b) = first[name], second[name]
        assert same(state_a, state_b), f"{name}: replicas differ"
        model, data = make(options)
        indices, state = train(model, [x[:40] for x in data])
        if options.get("dead_code_ratio"):
            # Which row replaces a dead code depends on how rows are dealt out: any row of the batch is right.
            assert state["quantizer.steps"] == state_a["quantizer.steps"]
            assert state["quantizer.code_counts"].sum() == state_a["quantizer.code_counts"].sum()
            continue
        for step, (a, b, joined) in enumerate(zip(indices_a, indices_b, indices, strict=True)):
            assert torch.equal(torch.cat([a, b]), joined), f"{name}, step {step}"
        for key, value in state.items():
            torch.testing.assert_close(state_a[key], value, rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")


def test_uneven_and_empty_batches_neither_hang_nor_diverge(ranks: list[dict[str, Any]]) -> None:
    for name in AVERAGED:
        state_a, state_b = (rank["uneven"][name][1] for rank in ranks)
        shared = [k for k in state_a if k.startswith("quantizer.")]
        assert same({k: state_a[k] for k in shared}, {k: state_b[k] for k in shared}), name
        # Nothing is lost: every row of both ranks was counted once.
        heads = OPTIONS[name].get("heads", 1)
        assert state_a["quantizer.code_counts"].sum() == heads * sum(a + b for a, b in UNEVEN)


def test_pooled_statistics_are_reduced_once_per_update(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["pooled"] for rank in ranks)
    assert same(first, second)
    model, data = make(OPTIONS["ema"])
    model.quantizer(data[0][:40])
    model.quantizer(data[1][:20])
    for key, value in model.quantizer.state_dict().items():
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-6)


def test_a_module_built_before_the_process_group_still_synchronises(ranks: list[dict[str, Any]]) -> None:
    assert [rank["early"] for rank in ranks] == [[60, 60], [60, 60]]


def test_sync_off_issues_no_collective(ranks: list[dict[str, Any]]) -> None:
    assert [rank["alone"] for rank in ranks] == [30, 30]
