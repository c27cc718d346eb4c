"""ema_update: the formulas of the contract in float64, and the corners where they would divide by zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vqkernels.ops import ema_update


def state(h: int, k: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """cluster_size, embed_avg, codebook, counts, sums as after some steps; a third of the codes get nothing."""
    counts = torch.randint(0, 3, (h, k)).float()
    return torch.rand(h, k) * 5, torch.randn(h, k, d), torch.randn(h, k, d), counts, torch.randn(h, k, d)


def oracle(
    cluster_size: Tensor,
    embed_avg: Tensor,
    codebook: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    eps: float,
    normalize: bool,
) -> list[Tensor]:
    """The contract, word by word, in float64."""
    size = decay * cluster_size.double() + (1 - decay) * counts.double()
    average = decay * embed_avg.double() + (1 - decay) * sums.double()
    total = size.sum(1, keepdim=True)
    smoothed = (size + eps) / (total + size.shape[1] * eps) * total
    codes = average / smoothed[:, :, None]
    if normalize:
        codes = codes / codes.norm(dim=2, keepdim=True)
    return [size, average, codes]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.8, 0.99])
@pytest.mark.parametrize(("h", "k", "d"), [(1, 1, 1), (2, 3, 63), (1, 257, 100), (3, 100, 17)])
def test_agrees_with_float64(backend: str, normalize: bool, decay: float, h: int, k: int, d: int) -> None:
    before = state(h, k, d)
    # With decay = 0 a code without rows has a size of zero: eps keeps its value finite, but large.
    before[3].add_(1.0)
    after = [t.clone() for t in before]
    assert ema_update(*after, decay, 1e-5, normalize, backend) is None
    for got, expected in zip(after, oracle(*before, decay, 1e-5, normalize), strict=False):
        # A few float32 roundings; the average may cancel, so the bound is relative to the terms, not to their sum.
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(after[3], before[3])
    assert torch.equal(after[4], before[4])


def test_literal_step(backend: str) -> None:
    size, average = torch.tensor([[2.0, 2.0]]), torch.tensor([[[4.0], [-2.0]]])
    codebook, counts, sums = torch.zeros(1, 2, 1), torch.tensor([[4.0, 0.0]]), torch.tensor([[[12.0], [0.0]]])
    ema_update(size, average, codebook, counts, sums, 0.5, 0.0, False, backend)
    assert size.tolist() == [[3.0, 1.0]]
    assert average.tolist() == [[[8.0], [-1.0]]]
    torch.testing.assert_close(codebook, torch.tensor([[[8.0 / 3.0], [-1.0]]]))


def test_laplace_smoothing_shares_the_total(backend: str) -> None:
    # total = 3, K = 2, eps = 0.5: smoothed = (3.5, 0.5) / 4 * 3
    size, codebook = torch.tensor([[3.0, 0.0]]), torch.zeros(1, 2, 1)
    ema_update(size, torch.ones(1, 2, 1), codebook, size.clone(), torch.ones(1, 2, 1), 0.9, 0.5, False, backend)
    torch.testing.assert_close(codebook, torch.tensor([[[1 / 2.625], [1 / 0.375]]]))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_codebook_stays_when_nothing_was_ever_seen(backend: str, normalize: bool, eps: float) -> None:
    codebook = torch.randn(2, 5, 3)
    expected = codebook.clone()
    zeros, counts = torch.zeros(2, 5, 3), torch.zeros(2, 5)
    ema_update(counts.clone(), zeros.clone(), codebook, counts, zeros, 0.99, eps, normalize, backend)
    assert torch.equal(codebook, expected)


def test_only_the_unused_code_stays_without_smoothing(backend: str) -> None:
    codebook = torch.full((1, 2, 2), 9.0)
    size, average = torch.zeros(1, 2), torch.zeros(1, 2, 2)
    ema_update(
        size,
        average,
        codebook,
        torch.tensor([[2.0, 0.0]]),
        torch.tensor([[[4.0, 2.0], [0.0, 0.0]]]),
        0.5,
        0.0,
        False,
        backend,
    )
    assert codebook.tolist() == [[[2.0, 1.0], [9.0, 9.0]]]


def test_normalized_codes_have_norm_one_and_zero_stays_zero(backend: str) -> None:
    codebook = torch.zeros(1, 2, 3)
    average = torch.tensor([[[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]]])
    ema_update(torch.ones(1, 2), average, codebook, torch.ones(1, 2), average.clone(), 0.9, 1e-5, True, backend)
    torch.testing.assert_close(codebook, torch.tensor([[[0.6, 0.8, 0.0], [0.0, 0.0, 0.0]]]))


def test_heads_do_not_share_a_total(backend: str) -> None:
    both = state(2, 7, 5)
    together = [t.clone() for t in both]
    ema_update(*together, 0.9, 1e-2, False, backend)
    for head in range(2):
        alone = [t[head : head + 1].clone() for t in both]
        ema_update(*alone, 0.9, 1e-2, False, backend)
        assert torch.equal(alone[2], together[2][head : head + 1])


def test_same_bits_for_any_number_of_threads(backend: str) -> None:
    before = state(2, 1000, 33)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            after = [t.clone() for t in before]
            ema_update(*after, 0.99, 1e-5, True, backend)
            results.append(after)
    finally:
        torch.set_num_threads(threads)
    for after in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(after, results[0], strict=True))


def test_float64_statistics_are_rounded_first(backend: str) -> None:
    size, average, codebook, counts, sums = state(1, 4, 3)
    expected = [size.clone(), average.clone(), codebook.clone()]
    ema_update(*expected, counts, sums, 0.9, 1e-5, False, backend)
    ema_update(size, average, codebook, counts, sums.double(), 0.9, 1e-5, False, backend)
    torch.testing.assert_close(codebook, expected[2])


def test_strided_state_is_updated_in_place() -> None:
    before = state(1, 6, 4)
    expected = [t.clone() for t in before]
    ema_update(*expected, 0.9, 1e-5, False)
    embed_avg = before[1].transpose(1, 2).contiguous().transpose(1, 2)
    ema_update(before[0], embed_avg, *before[2:], 0.9, 1e-5, False)
    torch.testing.assert_close(embed_avg, expected[1])
    torch.testing.assert_close(before[2], expected[2])


@pytest.mark.parametrize("normalize", [False, True])
def test_opcheck(backend: str, normalize: bool) -> None:
    torch.library.opcheck(torch.ops.vqkernels.ema_update.default, (*state(2, 5, 3), 0.9, 1e-5, normalize, backend))


def test_opcheck_with_permuted_state() -> None:
    args = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in state(2, 5, 3)]
    torch.library.opcheck(torch.ops.vqkernels.ema_update.default, (*args, 0.9, 1e-5, False))
