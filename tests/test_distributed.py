"""A codebook spread over 2 and 4 processes against one process that holds it all: the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import vqkernels
from vqkernels import distributed
from vqkernels.testing import assert_nearest, tie_cases

METRICS = ("l2", "cosine", "dot")
# Rows of each process: even, uneven, none at all.
DEALS = {1: [[40], [67], [33]], 2: [[20, 20], [7, 60], [0, 33]], 4: [[10] * 4, [0, 7, 50, 10], [33, 0, 0, 0]]}
K, D = 101, 7


def hard_rows(metric: str) -> tuple[Tensor, Tensor]:
    """Duplicates across the borders of shards, near ties below float32, huge values, NaN and infinities."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randn(K, D, generator=generator)
    codes[70] = codes[3]
    codes[100] = codes[3]
    codes[51] = codes[20] * (1 + 2.0**-23)
    codes[40] = torch.nan
    codes[99] = 1e30
    codes[98] = -1e30
    x = torch.randn(67, D, generator=generator)
    x[:8] = codes[[3, 20, 51, 100, 0, 99, 50, 75]]
    x[8], x[9], x[10] = torch.nan, 3e30, torch.inf
    x[11] = 0.0
    x[12] = (codes[10] + codes[90]) / 2
    # Two codes of different shards whose distances differ by 2^-28 of themselves: the same in float32, the second wins.
    codes[5], codes[95], x[13] = 50.0, 50.0, 50.0
    codes[5, -1], codes[95, -1], x[13, -1] = 0.0, 2.0**-25, 2.0**-25
    x[13, 0] -= 2.0**-11
    return x, codes


def large() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    codes = torch.randn(262144, 16, generator=generator)
    return codes[::1311] + 0.3 * torch.randn(200, 16, generator=generator), codes


def deal(x: Tensor, sizes: list[int], rank: int) -> Tensor:
    begin = sum(sizes[:rank])
    return x[begin : begin + sizes[rank]]


def searches(rank: int, size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for metric in METRICS:
        x, codes = hard_rows(metric)
        part = distributed.shards(K)
        shard = codes[part.begin : part.end]
        found[metric] = distributed.nearest(deal(x, DEALS[size][1], rank), shard, part, metric=metric)
        if metric == "l2":
            found["lookup"] = distributed.lookup(shard, found[metric][0], part)
    for case in tie_cases():
        if len(case.codebook) >= size:
            part = distributed.shards(len(case.codebook))
            mine = deal(case.x, [len(case.x)] + [0] * (size - 1), rank)
            found[case.name] = distributed.nearest(mine, case.codebook[part.begin : part.end], part, metric=case.metric)
    if size == 4:
        x, codes = large()
        part = distributed.shards(len(codes))
        found["large"] = distributed.nearest(x[50 * rank : 50 * rank + 50], codes[part.begin : part.end], part)
    return found


@torch.no_grad()
def descend(model: torch.nn.Module) -> None:
    """A step of SGD. Torch's would import its compiler in every process, as long as all that they do here."""
    for p in model.parameters():
        assert p.grad is not None
        p -= 0.1 * p.grad
        p.grad = None


def training(rank: int, size: int) -> dict[str, Any]:
    found = {}
    for decay in (None, 0.8):
        torch.manual_seed(1)
        steps = [torch.randn(n, D, 3) for n in (40, 67, 33)]
        vq = distributed.ShardedVectorQuantizer(K, D, decay=decay, seed=5)
        trace: list[Tensor] = []
        for z, sizes in zip(steps, DEALS[size], strict=True):
            mine = deal(z, sizes, rank).clone().requires_grad_(True)
            out = vq(mine)
            (out.loss + 0.5 * out.quantized.square().sum()).backward()
            trace += [out.indices, out.quantized.detach(), out.loss.detach(), mine.grad]
            descend(vq)
        vq.eval()
        before = vq.gather_codebook()
        vq(deal(steps[0], DEALS[size][0], rank))
        found[str(decay)] = {
            "trace": trace,
            "codebook": vq.gather_codebook(),
            "eval changed": not torch.equal(before, vq.gather_codebook()),
            "output": vq.codes_to_output(trace[0]),
        }
    return found


def worker(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    try:
        torch.save({"search": searches(rank, size), "train": training(rank, size)}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("sharded")
    mp.start_processes(worker, (request.param, str(folder)), nprocs=request.param, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("metric", METRICS)
def test_indices_and_scores_equal_one_process_bit_for_bit(ranks: list[dict[str, Any]], metric: str) -> None:
    x, codes = hard_rows(metric)
    indices, score = vqkernels.nearest(x, codes, metric=metric)
    assert_nearest(indices, x, codes, metric, score)
    if metric == "l2":
        assert indices[13] == 95
    assert torch.cat([r["search"][metric][0] for r in ranks]).equal(indices)
    merged = torch.cat([r["search"][metric][1] for r in ranks])
    assert merged.view(torch.int32).equal(score.view(torch.int32)) or torch.equal(
        merged.nan_to_num(-1.0), score.nan_to_num(-1.0)
    )


def test_a_quarter_of_a_million_codes_over_four_processes(ranks: list[dict[str, Any]]) -> None:
    if len(ranks) != 4:
        pytest.skip("four processes")
    indices, score = vqkernels.nearest(*large())
    assert torch.cat([r["search"]["large"][0] for r in ranks]).equal(indices)
    assert torch.cat([r["search"]["large"][1] for r in ranks]).equal(score)


@pytest.mark.parametrize("case", tie_cases(), ids=lambda case: case.name)
def test_lowest_index_wins_across_the_borders_of_shards(ranks: list[dict[str, Any]], case: Any) -> None:
    if len(case.codebook) < len(ranks):
        pytest.skip("fewer codes than processes")
    assert ranks[0]["search"][case.name][0].tolist() == case.indices.tolist()


def test_lookup_finds_codes_wherever_they_live(ranks: list[dict[str, Any]]) -> None:
    _, codes = hard_rows("l2")
    for rank in ranks:
        expected = vqkernels.lookup(codes, rank["search"]["l2"][0])
        torch.testing.assert_close(rank["search"]["lookup"], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("decay", ["None", "0.8"])
def test_training_equals_one_process_on_the_joined_batch(ranks: list[dict[str, Any]], decay: str) -> None:
    (alone,) = [training(0, 1)[decay]]
    found = [rank["train"][decay] for rank in ranks]
    for rank in found:
        assert rank["codebook"].equal(alone["codebook"]), "not the codebook of one process"
        assert not rank["eval changed"]
    size = len(ranks)
    for step in range(3):
        indices, quantized, loss, grad = alone["trace"][4 * step :][:4]
        parts = [rank["trace"][4 * step :][:4] for rank in found]
        assert torch.cat([p[0] for p in parts]).equal(indices)
        assert torch.cat([p[1] for p in parts]).equal(quantized)
        torch.testing.assert_close(torch.stack([p[2] for p in parts]).mean(), loss)
        # A process's gradient is `size` times its share of the joined loss, as DDP, which averages, expects.
        decoder = quantized
        mine = torch.cat([p[3] for p in parts])
        torch.testing.assert_close((mine - decoder) / size, grad - decoder, rtol=1e-5, atol=1e-7)
    assert torch.cat([rank["output"] for rank in found]).equal(alone["output"])


def test_one_process_equals_the_ordinary_quantizer() -> None:
    torch.manual_seed(2)
    sharded = distributed.ShardedVectorQuantizer(K, D, decay=0.9)
    plain = vqkernels.VectorQuantizer(K, D, decay=0.9)
    plain.codebook.copy_(sharded.codebook)
    assert plain.embed_avg is not None
    plain.embed_avg.copy_(sharded.codebook)
    for _ in range(4):
        z = torch.randn(5, D, 4, 3)
        a, b = sharded(z), plain(z)
        assert a.indices.equal(b.indices)
        torch.testing.assert_close(a.quantized, b.quantized)
        torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(sharded.codebook, plain.codebook)


def test_initial_codes_do_not_depend_on_the_number_of_processes() -> None:
    whole = distributed._initial_codes(distributed.Shards(10000, 0, 1, 0, 10000), 3, 7)
    parts = [distributed._initial_codes(distributed.Shards(10000, r, 3, 10000 * r // 3, 10000 * (r + 1) // 3), 3, 7)
             for r in range(3)]  # fmt: skip
    assert torch.cat(parts).equal(whole)
    assert whole.abs().max() <= 1e-4
    assert whole.unique(dim=0).shape[0] == 10000


def test_float32_ties_are_settled_in_float64() -> None:
    codes = torch.tensor([[1.0, 0.0], [1.0, 2.0**-25]])
    x = torch.tensor([[1.0 - 2.0**-11, 2.0**-25]])
    value = distributed._value(x.expand(2, 2), codes, "l2")
    assert value[0].float() == value[1].float()
    assert value[1] < value[0]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: distributed.shards(0), "num_codes is 0"),
        (lambda: distributed.nearest(torch.zeros(2, 3), torch.zeros(4, 3), distributed.shards(5)), "codes 0 to 4"),
        (lambda: distributed.nearest(torch.zeros(2, 3), torch.zeros(5, 4), distributed.shards(5)), "shape"),
        (lambda: distributed.nearest(torch.zeros(2, 3), torch.zeros(5, 3), distributed.shards(5), metric="l1"), "l1"),
        (lambda: distributed.lookup(torch.zeros(5, 3), torch.tensor([5]), distributed.shards(5)), "outside of"),
        (lambda: distributed.ShardedVectorQuantizer(5, 3, decay=1.5), "decay is 1.5"),
        (lambda: distributed.ShardedVectorQuantizer(5, 3)(torch.zeros(2, 4)), "C = 3"),
    ],
)
def test_bad_input_is_named(call: Any, match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        call()
