"""``nearest`` over shapes, dtypes and metrics: the float64 oracle's indices and scores, bit for bit."""

from __future__ import annotations

import pytest
import torch
from on_device import DEVICE, KIND
from shapes import CASES, DTYPES, ISAS, Case, check, expected, inputs, search
from torch import Tensor

from vqkernels import dispatch
from vqkernels.ops.nearest import METRICS, nearest
from vqkernels.testing import assert_nearest, oracle_nearest, tie_cases

NAMES = ["float32", "float64", "bfloat16", "float16"]
BF16_ISAS = [name for name in ISAS if name in ("avx512bf16", "amx")]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_every_isa_equals_the_oracle(isa: str, metric: str, case: Case) -> None:
    for dtype in DTYPES:
        check(*inputs(case, dtype), metric, "native", expected(case, metric, dtype))


# On the CPU the native library is covered by the instruction sets above; elsewhere every backend has to show itself.
BACKENDS = ["reference"] if DEVICE == "cpu" else [b.name for b in dispatch.BACKENDS if b.probe(KIND) is None]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_equals_the_oracle(name: str, metric: str, case: Case) -> None:
    for dtype in DTYPES if name == "reference" else [d for d in DTYPES if d != torch.float64]:
        check(*inputs(case, dtype), metric, name, expected(case, metric, dtype))


@pytest.mark.parametrize("codebook_dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("metric", METRICS)
def test_rows_and_codes_of_different_dtypes(
    isa: str, metric: str, dtype: torch.dtype, codebook_dtype: torch.dtype
) -> None:
    for n, k, d in ((63, 100, 9), (33, 257, 65)):
        x, codes = torch.randn(n, d).to(dtype), torch.randn(k, d).to(codebook_dtype)
        x[::3] = codes[:n].to(dtype)[::3]
        answer = oracle_nearest(x, codes, metric)
        for backend in ("native", "reference"):
            check(x, codes, metric, backend, answer)


# Codes 5 and 1 lie at distance 1 of the row 3, so 5 (index 0) wins; and so on by hand.
TABLE_CODES = [[5.0], [1.0], [-2.0], [1.0]]


@pytest.mark.parametrize(
    ("metric", "rows", "indices", "score"),
    [
        ("l2", [3.0, 1.0, 0.0, -0.5, -9.0, 6.0], [0, 1, 1, 1, 2, 0], [4.0, 0.0, 1.0, 2.25, 49.0, 1.0]),
        ("dot", [3.0, 1.0, 0.0, -0.5, -9.0, 6.0], [0, 0, 0, 2, 2, 0], [15.0, 5.0, 0.0, 1.0, 18.0, 30.0]),
        ("cosine", [3.0, 1.0, 0.0, -0.5, -9.0, 6.0], [0, 0, 0, 2, 2, 0], [3.0, 1.0, 0.0, 0.5, 9.0, 6.0]),
    ],
)
def test_a_table_worked_out_by_hand(
    backend: str, metric: str, rows: list[float], indices: list[int], score: list[float]
) -> None:
    found, value = search(torch.tensor(rows)[:, None], torch.tensor(TABLE_CODES), metric, backend)
    assert found.tolist() == indices
    assert value.tolist() == score


@pytest.mark.parametrize("case", tie_cases(), ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_lowest_index_wins_on_exact_ties(
    isa: str, case: tuple[str, Tensor, Tensor, str, Tensor], dtype: torch.dtype
) -> None:
    _, x, codes, metric, indices = case
    for backend in ("native", "reference"):
        assert search(x.to(dtype), codes.to(dtype), metric, backend)[0].equal(indices)


@pytest.mark.parametrize("metric", METRICS)
def test_no_rows_give_empty_results(backend: str, metric: str) -> None:
    for shape in ((2, 0, 5, 3), (2, 5, 0, 3), (2, 0, 0, 3)):
        indices, score = nearest(torch.empty(shape), torch.randn(2, 7, 3), metric, "exact", backend)
        assert indices.shape == score.shape == shape[:3]
        assert indices.dtype == torch.int64
        assert score.dtype == torch.float32


@pytest.mark.parametrize("metric", METRICS)
def test_one_code_is_always_chosen(backend: str, metric: str) -> None:
    x, code = torch.randn(100, 5), torch.randn(1, 5)
    indices, score = search(x, code, metric, backend)
    assert indices.eq(0).all()
    assert score.equal(oracle_nearest(x, code, metric)[1])


def test_few_of_the_shapes_are_multiples_of_a_tile() -> None:
    """The sweep above is worth nothing if the list of shapes is trimmed to friendly ones."""
    assert len(CASES) >= 40
    assert sum(case.n % 8 != 0 for case in CASES) >= 20
    assert sum(case.k % 16 != 0 for case in CASES) >= 20
    assert sum(case.d % 16 != 0 for case in CASES) >= 20
    assert {0, 1} <= {case.n for case in CASES}
    assert 1 in {case.k for case in CASES}
    assert 1 in {case.d for case in CASES}


def classic(rows: int, codes: int = 16384, dim: int = 256) -> tuple[Tensor, Tensor]:
    """The U(+-1/K) init of VQ-VAE: all codes lie at nearly the same distance of a row."""
    return torch.randn(rows, dim), (torch.rand(codes, dim) * 2 - 1) / codes


@pytest.mark.parametrize("isa", BF16_ISAS, indirect=True)
@pytest.mark.parametrize("data", ["init", "normal"])
def test_without_the_certificate_rows_are_wrong(isa: str, data: str) -> None:
    """What the certificate is for: the screen alone errs where the exact search does not."""
    x, codes = classic(300, 2000) if data == "init" else (torch.randn(2000, 64), torch.randn(4096, 64))
    index, value = oracle_nearest(x, codes)
    fast = search(x, codes, precision="fast")[0]
    exact, score = search(x, codes)
    assert (fast != index).sum() > 0
    assert (exact != index).sum() == 0
    assert score.equal(value)


@pytest.mark.parametrize("metric", METRICS)
def test_fast_is_close(isa: str, metric: str) -> None:
    x, codes = torch.randn(500, 64), torch.randn(1000, 64)
    indices, score = search(x, codes, metric, precision="fast")
    # bf16 keeps 8 bits: |error of x.e| <= 2^-8 |x| |e| for each of two codes, twice that for squared distances.
    reach = float(x.norm(dim=1).max()) * (1.0 if metric == "cosine" else float(codes.norm(dim=1).max()))
    assert_nearest(indices, x, codes, metric, score, max_regret=4 * 2**-7 * reach)
