"""soft_assign_grad: against float64 autograd of the whole matrix, by entropies, usage and soft codes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from on_device import KIND
from soft_cases import CASES, TEMPERATURES, Case, error, inputs, oracle_grad, reach
from torch import Tensor

from vqkernels import Unsupported, dispatch
from vqkernels.ops import soft_assign_grad

KINDS = ("entropy", "usage", "both", "soft", "all")


def case_of(case: Case, kind: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Rows, codes, weights, and what the loss says."""
    x, codes, weight = inputs(case, dtype)
    generator = torch.Generator().manual_seed(case.n)
    entropy = torch.randn(case.h, generator=generator) if kind in ("entropy", "both", "all") else None
    usage = torch.randn(case.h, case.k, generator=generator) if kind in ("usage", "both", "all") else None
    soft = torch.randn(x.shape, generator=generator).to(dtype) if kind in ("soft", "all") else None
    values = torch.randn(codes.shape, generator=generator).to(dtype) if kind in ("soft", "all") else None
    return [x, codes, weight, entropy, usage, soft, values]


def grad(given: list[Any], squared: bool, temperature: float, backend: str) -> list[Tensor]:
    """Both results; by the reference where the backend says that it cannot."""
    try:
        return list(soft_assign_grad(*given, squared, temperature, backend))
    except Unsupported:
        return list(soft_assign_grad(*given, squared, temperature, "reference"))


@pytest.fixture(params=[b.name for b in dispatch.BACKENDS if dispatch.missing("soft_assign_grad", b, KIND) is None])
def backend(request: pytest.FixtureRequest) -> str:
    """Those that have the op."""
    return str(request.param)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_the_whole_matrix(backend: str, case: Case, kind: str, squared: bool) -> None:
    given = case_of(case, kind)
    exact = oracle_grad(*given, squared, 1.0)
    found = grad(given, squared, 1.0, backend)
    assert [t.dtype for t in found] == [torch.float32] * 2
    # Relative to what is added up, which may cancel: of the largest weighted a, once for every row and code.
    scale = reach(*given[:2], 1.0) / 2**-24
    for a, b in zip(found, exact, strict=True):
        assert a.isfinite().all()
        assert (a - b).abs().le(1e-6 * scale * float(given[2].max() if case.n else 0) + 1e-5 * b.abs()).all()


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("kind", ["both", "soft"])
def test_errors_are_no_larger_than_those_of_the_formula_in_torch(backend: str, kind: str, squared: bool) -> None:
    ratios = []
    for temperature in TEMPERATURES:
        for case in CASES[3:]:
            given = case_of(case, kind)
            exact = oracle_grad(*given, squared, temperature)
            found = grad(given, squared, temperature, backend)
            expected = soft_assign_grad(*given, squared, temperature, "reference")
            for ours, theirs, true in zip(found, expected, exact, strict=True):
                # Each error is the luck of a few roundings: only many of them can be compared.
                ratios.append(math.log((error(ours, true) + 1e-8) / (error(theirs, true) + 1e-8)))
    assert len(ratios) == 104
    assert sum(ratios) / len(ratios) < math.log(1.05)


def test_rows_of_weight_zero_get_nothing_and_give_nothing(backend: str) -> None:
    given = case_of(Case(2, 40, 33, 5), "all")
    expected = grad(given, True, 0.3, backend)
    assert (expected[0] == 0).all(-1).sum() == (given[2] == 0).sum() > 0
    for bad in (float("nan"), float("inf"), 3e38):
        given[0][:, 6::7] = bad
        given[5][:, 6::7] = bad
        assert all(a.equal(b) for a, b in zip(grad(given, True, 0.3, backend), expected, strict=True))
    given[2] = torch.zeros_like(given[2])
    assert not any(t.any() for t in grad(given, True, 0.3, backend))


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("size", [1e-15, 1e10, 1e14])
def test_scores_of_any_size(backend: str, size: float, squared: bool) -> None:
    given = case_of(Case(1, 50, 33, 3), "both")
    given[0], given[1] = given[0] * size, given[1] * size
    exact = oracle_grad(*given, squared, 0.01)
    found = grad(given, squared, 0.01, backend)
    assert all(t.isfinite().all() for t in found)
    if size < 1:
        assert all(error(a, b) < 1e-5 for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(backend: str, kind: str, dtype: torch.dtype) -> None:
    for case in CASES[3:8]:
        given = case_of(case, kind, dtype)
        found = grad(given, True, 0.5, backend)
        assert found[0].dtype == dtype
        assert found[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        if dtype == torch.float64:
            exact = oracle_grad(*given, True, 0.5)
            assert all(error(a, b) < 1e-11 or float(b.abs().max()) < 1e-12 for a, b in zip(found, exact, strict=True))
        else:  # the same values in float32, rounded once
            wide = [t.float() if t is not None else None for t in given]
            whole = grad(wide, True, 0.5, backend)
            assert found[0].equal(whole[0].to(dtype))
            assert found[1].equal(whole[1])


def test_any_number_of_threads_gives_the_same_bits(backend: str) -> None:
    threads = torch.get_num_threads()
    try:
        for case in (Case(1, 300, 4000, 20), Case(2, 1700, 9, 33), Case(1, 50, 700, 130)):
            given = case_of(case, "all")
            results = []
            for n in (1, 2, 3, 5, 1):
                torch.set_num_threads(n)
                results.append(grad(given, True, 0.5, backend))
            for found in results[1:]:
                for a, b in zip(found, results[0], strict=True):
                    # torch's matrix products promise nothing between numbers of threads.
                    assert a.equal(b) or (backend == "reference" and error(a, b.double()) < 1e-4)
            assert all(a.equal(b) for a, b in zip(results[-1], results[0], strict=True))
    finally:
        torch.set_num_threads(threads)


def test_every_instruction_set_agrees(isa: str) -> None:
    for case in CASES:
        given = case_of(case, "all")
        found = soft_assign_grad(*given, True, float(case.d), "native")
        for a, b in zip(found, oracle_grad(*given, True, float(case.d)), strict=True):
            assert error(a, b) < 1e-5 or case.k == 1


def test_autocast_does_not_round(backend: str) -> None:
    given = case_of(CASES[5], "all")
    expected = grad(given, True, 0.1, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = grad(given, True, 0.1, backend)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
