"""How a codebook starts and stays alive: k-means, dead codes, usage and perplexity."""

from __future__ import annotations

import pytest
import torch
from quantizers import D, K, batch, same_state, state
from torch import Tensor

import vqkernels
from vqkernels import VectorQuantizer
from vqkernels.nn import statistics
from vqkernels.nn.codebook_init import kmeans


def test_kmeans_converges_to_the_means_of_its_clusters(backend: str) -> None:
    rows = torch.randn(2, 3, 67, 5)
    valid = torch.rand(2, 3, 67) > 0.2
    valid[1] = valid[0]

    def distortion(iterations: int) -> tuple[Tensor, Tensor, float]:
        codes, counts = kmeans(rows, 7, valid=valid, seed=1, iterations=iterations)
        score = vqkernels.nearest(rows, codes)[1]
        return codes, counts, float(torch.where(valid, score, 0.0).sum())

    with vqkernels.use_backend(backend):
        codes, counts, last = distortion(100)
        indices = vqkernels.nearest(rows, codes)[0]
        assert last < distortion(3)[2] < 0.9 * distortion(0)[2]
    for h in range(2):
        for k in range(7):
            mine = rows[h][(indices[h] == k) & valid[h]]
            assert counts[h, k] == len(mine)
            torch.testing.assert_close(codes[h, k], mine.mean(0), rtol=1e-5, atol=1e-6)


def test_kmeans_init_depends_on_seed_and_data_only(backend: str) -> None:
    z = torch.randn(300, D)
    z[7, 2] = float("nan")

    def start(seed: int, torch_seed: int, threads: int = 1) -> Tensor:
        torch.manual_seed(torch_seed)
        torch.set_num_threads(threads)
        vq = VectorQuantizer(K, D, init="kmeans", seed=seed)
        with vqkernels.use_backend(backend):
            vq(z)
        torch.set_num_threads(1)
        return vq.codebook.detach()

    assert torch.equal(start(0, 1), start(0, 2, threads=2))
    assert not torch.equal(start(0, 1), start(1, 1))
    assert start(0, 1).isfinite().all()


def test_kmeans_init_waits_for_the_first_training_batch() -> None:
    vq = VectorQuantizer(K, D, init="kmeans", decay=0.9)
    before = state(vq)
    vq.eval()
    vq(batch(vq, 50))
    assert same_state(before, state(vq))
    vq.train()
    vq(batch(vq, 0))
    assert not vq.initialized
    z = batch(vq, 50)
    quality = vq(z).commitment_loss
    assert vq.initialized
    assert quality < 0.6 * VectorQuantizer(K, D)(z).commitment_loss
    reloaded = VectorQuantizer(K, D, init="kmeans", decay=0.9)
    reloaded.load_state_dict(vq.state_dict())
    assert torch.equal(reloaded.eval()(z).indices, vq.eval()(z).indices)
    reloaded.train()(z)
    assert reloaded.steps == vq.steps + 1
    torch.testing.assert_close(reloaded.cluster_size.sum(), torch.tensor(50.0))


def test_kmeans_with_fewer_rows_than_codes() -> None:
    vq = VectorQuantizer(K, D, init="kmeans")
    z = torch.randn(3, D)
    assert vq(z).commitment_loss < 1e-12
    with pytest.raises(ValueError, match="no finite, valid vector"):
        vq.initialize(torch.full((2, D), float("inf")))


@pytest.mark.parametrize("decay", [None, 0.9])
def test_dead_codes_move_onto_rows_of_the_batch(decay: float | None) -> None:
    def run(ratio: float) -> VectorQuantizer:
        torch.manual_seed(5)
        vq = VectorQuantizer(K, D, decay=decay, dead_code_ratio=ratio, usage_decay=0.9)
        with torch.no_grad():
            vq.codebook[3:] += 1000.0  # out of reach
            if vq.embed_avg is not None:
                vq.embed_avg.copy_(vq.codebook)
        for step in range(62):
            if step == 60:
                vq.reset_usage()
            vq(torch.randn(200, D))
        return vq

    assert run(0.0).usage() <= 3 / K
    alive = run(0.2)
    assert alive.usage() == 1.0
    assert alive.codebook.abs().max() < 10
    assert alive.cluster_size.sum().item() == pytest.approx(200, rel=0.3)


def test_a_dead_code_becomes_a_row_and_starts_with_mean_usage() -> None:
    vq = VectorQuantizer(4, 2, decay=0.5, dead_code_ratio=0.1)
    with torch.no_grad():
        vq.codebook.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [50.0, 0.0], [0.0, 50.0]]))
        vq.embed_avg.copy_(vq.codebook)
        vq.cluster_size.copy_(torch.tensor([2.0, 2.0, 0.1, 2.0]))
    z = torch.tensor([[1.0, 0.5], [0.5, 1.0], [1.5, 0.5], [0.5, 1.5]])
    vq(z)
    # Sizes after the step: 2, 2, 0.05, 1; mean 1.2625; only code 2 is below a tenth of it.
    torch.testing.assert_close(vq.cluster_size, torch.tensor([2.0, 2.0, 1.2625, 1.0]))
    assert vq.codebook[2].tolist() in z.tolist()
    torch.testing.assert_close(vq.embed_avg[2], vq.codebook[2] * 1.2625)
    assert vq.codebook[3].tolist() == [0.0, pytest.approx(25.0 / 1.0, rel=0.01)]


def test_candidate_rows_are_distinct_and_avoid_masked_rows() -> None:
    rows = torch.arange(60.0).view(2, 3, 10, 1)
    indices = torch.zeros(2, 3, 10, dtype=torch.int64)
    indices[:, 0] = -1
    step = torch.tensor(12345)
    values, found = statistics.candidate_rows(rows, indices, step, 20, 0, 1)
    assert found.all()
    for h in range(2):
        assert sorted(values[h, :, 0].tolist()) == [30.0 * h + 10 + i for i in range(20)]
    both = [statistics.candidate_rows(rows, indices, step, 7, rank, 2) for rank in range(2)]
    assert torch.equal(both[0][1] + both[1][1], torch.ones(2, 7))
    values, found = statistics.candidate_rows(rows, indices.fill_(-1), step, 7, 0, 1)
    assert not found.any()
    assert not values.any()


def test_usage_and_perplexity_literal() -> None:
    vq = VectorQuantizer(4, 1)
    with torch.no_grad():
        vq.codebook.copy_(torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
    assert (vq.usage(), vq.perplexity()) == (0.0, 0.0)
    vq(torch.tensor([[0.0], [0.1], [2.0], [2.1]]))
    assert vq.code_counts.tolist() == [2, 0, 2, 0]
    assert vq.usage() == 0.5
    assert vq.perplexity() == pytest.approx(2.0)
    vq(torch.tensor([[1.0], [1.0], [3.0], [3.0]]))
    assert vq.usage() == 1.0
    assert vq.perplexity() == pytest.approx(4.0)
    vq.reset_usage()
    assert vq.usage() == 0.0
