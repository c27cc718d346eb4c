"""soft_assign: entropy and usage against float64 at every temperature, what counts, and fixed orders of sums."""

from __future__ import annotations

import math

import pytest
import torch
from on_device import KIND
from soft_cases import CASES, TEMPERATURES, Case, error, inputs, oracle, reach
from torch import Tensor

from vqkernels import Unsupported, dispatch
from vqkernels.ops import soft_assign


def assign(x: Tensor, codes: Tensor, weight: Tensor, squared: bool, temperature: float, backend: str) -> list[Tensor]:
    """Both results; by the reference where the backend says that it cannot."""
    try:
        return list(soft_assign(x, codes, weight, squared, temperature, backend))
    except Unsupported:
        return list(soft_assign(x, codes, weight, squared, temperature, "reference"))


@pytest.fixture(params=[b.name for b in dispatch.BACKENDS if dispatch.missing("soft_assign", b, KIND) is None])
def backend(request: pytest.FixtureRequest) -> str:
    """Those that have the op."""
    return str(request.param)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_entropy_and_usage_are_those_of_the_whole_matrix(backend: str, case: Case, squared: bool) -> None:
    x, codes, weight = inputs(case)
    for temperature in TEMPERATURES:
        exact = oracle(x, codes, weight, squared, temperature)
        found = assign(x, codes, weight, squared, temperature, backend)
        moved = 1e-6 + reach(x, codes, temperature)
        assert [t.dtype for t in found] == [torch.float32] * 2
        total = weight.double().sum(1)
        assert (found[0] - exact[0]).abs().le(total * moved * (1 + math.log(case.k))).all()
        assert (found[1] - exact[1]).abs().le(moved * exact[1] + 1e-37).all()
        assert found[1].sum(1).double().sub(total).abs().le(2e-6 * total).all()


@pytest.mark.parametrize("squared", [False, True])
def test_errors_are_no_larger_than_those_of_the_formula_in_torch(backend: str, squared: bool) -> None:
    ratios = []
    for temperature in TEMPERATURES:
        for case in CASES[3:]:
            x, codes, weight = inputs(case)
            exact = oracle(x, codes, weight, squared, temperature)
            found = assign(x, codes, weight, squared, temperature, backend)
            expected = soft_assign(x, codes, weight, squared, temperature, "reference")
            for ours, theirs, true in zip(found, expected, exact, strict=True):  # in nats, in shares of the weight
                # Each error is the luck of a few roundings: only many of them can be compared.
                off = [float((t - true).abs().max() / weight.sum()) + 1e-8 for t in (ours, theirs)]
                ratios.append(math.log(off[0] / off[1]))
    assert len(ratios) == 104
    assert sum(ratios) / len(ratios) < math.log(1.05)


def test_a_table_worked_out_by_hand(backend: str) -> None:
    x = torch.tensor([[[0.0], [1.0]]])
    codes = torch.tensor([[[0.0], [1.0]]])
    # Squared distances 0 and 1: p = (1 - q, q) and (q, 1 - q).
    q = 1 / (1 + math.e)
    own = -q * math.log(q) - (1 - q) * math.log(1 - q)
    entropy, usage = assign(x, codes, torch.tensor([[0.5, 1.5]]), True, 1.0, backend)
    assert entropy.tolist() == pytest.approx([2 * own], rel=1e-6)
    assert usage.tolist()[0] == pytest.approx([0.5 * (1 - q) + 1.5 * q, 0.5 * q + 1.5 * (1 - q)], rel=1e-6)
    # A single code is sure, duplicates share.
    assert [t.tolist() for t in assign(x, codes[:, :1], torch.ones(1, 2), True, 0.1, backend)] == [[0.0], [[2.0]]]
    entropy, usage = assign(x, codes[:, :1].repeat(1, 3, 1), torch.ones(1, 2), False, 0.1, backend)
    assert entropy.tolist() == pytest.approx([2 * math.log(3)], rel=1e-6)
    assert usage.tolist()[0] == pytest.approx([2 / 3] * 3, rel=1e-6)


def test_rows_of_weight_zero_count_nowhere(backend: str) -> None:
    x, codes, weight = inputs(Case(2, 40, 33, 5))
    expected = assign(x, codes, weight, True, 0.3, backend)
    for bad in (float("nan"), float("inf"), 3e38):
        x[:, 6::7] = bad
        assert all(a.equal(b) for a, b in zip(assign(x, codes, weight, True, 0.3, backend), expected, strict=True))
    x[1, 1, 0] = float("nan")
    found = assign(x, codes, weight, True, 0.3, backend)
    assert all(t[0].equal(e[0]) for t, e in zip(found, expected, strict=True))
    assert all(t[1].isnan().all() for t in found)
    assert not any(t.any() for t in assign(x, codes, torch.zeros_like(weight), True, 0.3, backend))


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("size", [1e-20, 1e10, 1e15])
def test_scores_of_any_size(backend: str, size: float, squared: bool) -> None:
    # From scores that do not differ at all to 1e30, where all probabilities but one underflow, and p log p with them.
    x, codes, weight = inputs(Case(1, 50, 33, 3))
    exact = oracle(x * size, codes * size, weight, squared, 0.01)
    found = assign(x * size, codes * size, weight, squared, 0.01, backend)
    assert error(found[1], exact[1]) < 1e-6
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-6, atol=1e-30)


def test_small_probabilities_have_their_digits(backend: str) -> None:
    # Two codes, one row per head: the second probability is e^-t / (1 + e^-t), and t is a float exactly.
    t = torch.linspace(0, 86, 4001)
    x = t[:, None, None]
    codes = torch.tensor([0.0, -1.0])[None, :, None].expand(len(t), 2, 1)
    usage = assign(x, codes, torch.ones(len(t), 1), False, 1.0, backend)[1]
    error = (usage / torch.stack([t.double(), -t.double()], 1).sigmoid() - 1).abs()
    # The sum, the factor and the product come to the exponential; log p, which the reference rounds, is up to 86.
    assert float(error.max()) < (86 * 2**-24 if backend == "reference" else 1.5 * 2**-23)
    if backend == "native":  # beyond 20 there is nothing but the exponential
        assert float(error[t > 20].max()) < 0.75 * 2**-23
    gone = assign(x + 90, codes, torch.ones(len(t), 1), False, 1.0, backend)
    assert float(gone[1][:, 1].abs().max()) < 1e-38
    assert float(gone[0].abs().max()) < 1e-36
    # The kernels take subnormal numbers for 0, and nobody else does.
    assert torch.full((100,), 1e-39).mul(0.5).min() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    for case in CASES[3:8]:
        x, codes, weight = inputs(case, dtype)
        found = assign(x, codes, weight, True, 0.1, backend)
        exact = oracle(x, codes, weight, True, 0.1)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert [t.dtype for t in found] == [wide] * 2
        if dtype == torch.float64:
            assert all(error(a, b) < 1e-12 for a, b in zip(found, exact, strict=True))
        else:  # the same values in float32
            whole = assign(x.float(), codes.float(), weight, True, 0.1, backend)
            assert all(a.equal(b) for a, b in zip(found, whole, strict=True))


def test_any_number_of_threads_gives_the_same_bits(backend: str) -> None:
    threads = torch.get_num_threads()
    try:
        for case in (Case(1, 300, 4000, 20), Case(2, 1700, 9, 33), Case(1, 50, 700, 130)):
            x, codes, weight = inputs(case)
            results = []
            for n in (1, 2, 3, 5, 1):
                torch.set_num_threads(n)
                results.append(assign(x, codes, weight, True, 0.5, backend))
            for found in results[1:]:
                for a, b in zip(found, results[0], strict=True):
                    # torch's matrix products promise nothing between numbers of threads.
                    assert a.equal(b) or (backend == "reference" and torch.allclose(a, b, rtol=1e-5))
            assert all(a.equal(b) for a, b in zip(results[-1], results[0], strict=True))
    finally:
        torch.set_num_threads(threads)


def test_every_instruction_set_agrees(isa: str) -> None:
    for case in CASES:
        x, codes, weight = inputs(case)
        found = soft_assign(x, codes, weight, True, float(case.d), "native")
        for a, b in zip(found, oracle(x, codes, weight, True, float(case.d)), strict=True):
            assert error(a, b) < 2e-6


def test_autocast_does_not_round(backend: str) -> None:
    x, codes, weight = inputs(CASES[5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = assign(x, codes, weight, True, 0.1, backend)
    assert all(a.equal(b) for a, b in zip(found, assign(x, codes, weight, True, 0.1, backend), strict=True))
