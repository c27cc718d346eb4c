"""Two gloo processes train residual quantizers with dropout and others: bit-identical replicas, and no hang."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vqkernels.nn import MultiScaleVectorQuantizer, ResidualVectorQuantizer, SimVQ, VectorQuantizer

K, D, Q, STEPS = 12, 5, 3, 5
EMA = {"decay": 0.8, "channel_dim": -1}
MODULES: dict[str, Any] = {
    "dropout batch": lambda: ResidualVectorQuantizer(K, D, Q, dropout="batch", init="kmeans", **EMA),
    "dropout sample": lambda: ResidualVectorQuantizer(K, D, Q, dropout="sample", dead_code_ratio=0.5, **EMA),
    "dropout gradient": lambda: ResidualVectorQuantizer(K, D, Q, dropout="batch", channel_dim=-1, init="normal"),
    "shared": lambda: ResidualVectorQuantizer(K, D, Q, shared_codebook=True, init="normal", **EMA),
    "affine": lambda: VectorQuantizer(K, D, affine=True, **EMA),
    "simvq": lambda: SimVQ(K, D, channel_dim=-1),
}
# One process on the joined batch draws other samples, other dead-code rows; the rest must agree with it.
JOINED = ("dropout batch", "dropout gradient", "shared", "affine", "simvq")


class Model(nn.Module):
    """A linear encoder keeps DDP busy."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.encoder = nn.Linear(D, D)
        self.quantizer = MODULES[name]()

    def forward(self, x: Tensor) -> Any:
        return self.quantizer(self.encoder(x))


def train(name: str, rank: int, wrap: bool) -> dict[str, Tensor]:
    torch.manual_seed(7)
    model = Model(name)
    batches = [torch.randn(40, D) for _ in range(STEPS)]
    # Codes that no level of a step reached have no gradient: DDP must look.
    run = DistributedDataParallel(model, find_unused_parameters=True) if wrap else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batches:
        out = run(x[rank * 20 : rank * 20 + 20] if wrap else x)
        optimizer.zero_grad()
        (out.loss + out.quantized.square().mean()).backward()
        optimizer.step()
    return {k: v.clone() for k, v in model.state_dict().items()}


def uneven(rank: int) -> dict[str, dict[str, Tensor]]:
    """Rows of each rank: different numbers, and none."""
    found = {}
    for name in ("dropout batch", "dropout sample", "shared", "affine"):
        torch.manual_seed(7)
        quantizer = MODULES[name]()
        for sizes in [(20, 31), (0, 25), (33, 0), (7, 7)]:
            data = torch.randn(70, D)
            begin = 0 if rank == 0 else sizes[0]
            quantizer(data[begin : begin + sizes[rank]])
        found[name] = {k: v.clone() for k, v in quantizer.state_dict().items()}
    return found


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        scales = MultiScaleVectorQuantizer(K, D, [1, 2])
        scales(torch.randn(3 + rank, D, 2, 2))
        found = {
            "trained": {name: train(name, rank, True) for name in MODULES},
            "uneven": uneven(rank),
            "scales": scales.code_counts,
        }
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("family")
    mp.start_processes(worker, (str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", MODULES)
def test_replicas_stay_bit_identical(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank["trained"][name] for rank in ranks)
    assert same(first, second)
    if name in JOINED:
        for key, value in train(name, 0, False).items():
            torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_uneven_and_empty_batches_neither_hang_nor_diverge(ranks: list[dict[str, Any]]) -> None:
    for name, state in ranks[0]["uneven"].items():
        assert same(state, ranks[1]["uneven"][name]), name


def test_scales_count_the_codes_of_all_processes(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["scales"].sum(1).tolist() == [7, 28]
