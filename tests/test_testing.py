"""``vqkernels.testing``: the oracle against arithmetic in fractions, and assertions that fail with the right words."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from vqkernels.testing import assert_nearest, oracle_nearest, screen_disagreement, tie_cases


def fractions(value: Tensor) -> list[list[Fraction]]:
    return [[Fraction(v) for v in row] for row in value.double().tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("metric", ["l2", "dot"])
def test_the_oracle_agrees_with_exact_arithmetic(metric: str, dtype: torch.dtype) -> None:
    """Products of short numbers are exact in float64, and D is small: the oracle's choice is the true one."""
    x, codes = torch.randn(40, 3).to(dtype), torch.randn(25, 3).to(dtype)
    codes[20:] = codes[:5]
    indices, score = oracle_nearest(x, codes, metric)
    for i, row in enumerate(fractions(x)):
        if metric == "l2":
            values = [sum((a - e) ** 2 for a, e in zip(row, code, strict=True)) for code in fractions(codes)]
            best = min(values)
        else:
            values = [sum(a * e for a, e in zip(row, code, strict=True)) for code in fractions(codes)]
            best = max(values)
        assert int(indices[i]) == values.index(best)
        assert float(score[i]) == pytest.approx(float(best), rel=2**-23)


def test_the_oracle_by_cosine_ignores_length() -> None:
    codes = torch.tensor([[10.0, 0.0], [0.0, 0.1], [3.0, 4.0], [0.0, 0.0]])
    indices, score = oracle_nearest(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [-1.0, -1.0]]), codes, "cosine")
    assert indices.tolist() == [0, 1, 2, 3]
    assert score.tolist() == [1.0, 2.0, 5.0, 0.0]


def test_the_oracle_does_not_need_all_pairs_at_once() -> None:
    """Rows in parts (K > pairs held at a time included) give what rows one by one give."""
    x, codes = torch.randn(30, 2), torch.randn(40000, 2)
    indices, score = oracle_nearest(x, codes)
    assert indices.equal(torch.cat([oracle_nearest(row[None], codes)[0] for row in x]))
    distance = (x[:, None].double() - codes.double()).square().sum(2)
    assert indices.equal(distance.argmin(1))
    assert score.equal(distance.amin(1).float())


def test_nan_and_infinity_never_win() -> None:
    nan, inf = float("nan"), float("inf")
    codes = torch.tensor([[nan], [inf], [5.0], [-inf]])
    indices, score = oracle_nearest(torch.tensor([[0.0], [nan], [inf]]), codes)
    assert indices.tolist() == [2, 0, 0]
    assert score[0] == 25.0
    assert score[1:].isnan().all()


def test_no_rows() -> None:
    indices, score = oracle_nearest(torch.empty(0, 3), torch.randn(2, 3))
    assert indices.shape == score.shape == (0,)
    assert_nearest(indices, torch.empty(0, 3), torch.randn(2, 3), "l2", score)


def test_the_right_answer_passes() -> None:
    x, codes = torch.randn(63, 5, requires_grad=True), torch.randn(17, 5).half()
    for metric in ("l2", "cosine", "dot"):
        indices, score = oracle_nearest(x, codes, metric)
        assert_nearest(indices, x, codes, metric, score)


X, CODES = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [2.0], [2.0], [4.0]])


def message(*arguments: object, **options: object) -> str:
    with pytest.raises(AssertionError) as error:
        assert_nearest(*arguments, **options)  # type: ignore[arg-type]
    return str(error.value)


def test_a_wrong_index_is_named_with_its_regret() -> None:
    assert message(torch.tensor([0, 3, 1]), X, CODES) == (
        "1 of 3 rows have a wrong index for metric 'l2':\n  row 1: index 3 (value 9), expected 0 (value 1), regret 8"
    )
    assert message(torch.tensor([0, 3, 0]), X, CODES, "dot") == (
        "1 of 3 rows have a wrong index for metric 'dot':\n  row 2: index 0 (value 0), expected 3 (value 8), regret 8"
    )


def test_a_higher_index_of_a_tie_is_wrong() -> None:
    assert "row 2: index 2 (value 0), expected 1 (value 0), regret 0" in message(torch.tensor([0, 0, 2]), X, CODES)
    assert "row 1: index 1 (value 1), expected 0 (value 1), regret 0" in message(torch.tensor([0, 1, 1]), X, CODES)


def test_five_rows_are_shown_at_most() -> None:
    text = message(torch.full((9,), 1), torch.zeros(9, 1), torch.tensor([[0.0], [1.0]]))
    assert text.startswith("9 of 9 rows")
    assert len(re.findall("row [0-4]:", text)) == 5
    assert text.endswith("and 4 more")


@pytest.mark.parametrize("index", [-1, 4, 2**40])
def test_an_index_outside_of_the_codebook_is_wrong(index: int) -> None:
    assert message(torch.tensor([0, 0, index]), X, CODES) == f"row 2: index {index} is outside of 4 codes"


def test_one_bit_of_a_score_counts_and_the_sign_of_zero_does_not() -> None:
    indices, score = oracle_nearest(X, CODES)
    assert_nearest(indices, X, CODES, "l2", -1 * score * torch.tensor([1.0, -1.0, 1.0]))
    score[1] = torch.nextafter(score[1], torch.tensor(2.0))
    assert message(indices, X, CODES, "l2", score) == (
        f"1 of 3 rows have a wrong score for metric 'l2':\n  row 1: {float(score[1])!r}, expected 1.0"
    )
    nan = torch.tensor([[float("nan")]])
    assert_nearest(torch.tensor([0]), nan, CODES, "l2", torch.tensor([float("nan")]))
    assert "expected nan" in message(torch.tensor([0]), nan, CODES, "l2", torch.tensor([0.0]))


def test_max_regret_lets_close_answers_pass() -> None:
    indices, score = torch.tensor([0, 1, 0]), torch.tensor([0.0, 1.0, 4.0])
    assert_nearest(indices, X, CODES, "l2", score, max_regret=4.0)
    assert "row 2: index 0 (value 4), expected 1 (value 0), regret 4" in message(indices, X, CODES, max_regret=3.9)
    assert "row 2: 3.0, expected 4.0" in message(indices, X, CODES, "l2", torch.tensor([0.0, 1.0, 3.0]), max_regret=4.0)


BAD = {
    "metric": ((X, CODES, "l1"), ValueError, "metric is 'l1', expected one of 'l2', 'cosine', 'dot'"),
    "x list": (([[0.0]], CODES), TypeError, "x is a list, expected a tensor (N, D)"),
    "x dims": ((X[0], CODES), ValueError, "x has shape (1,), expected (N, D)"),
    "codebook dims": ((X, CODES[None]), ValueError, "codebook has shape (1, 4, 1), expected (K, D)"),
    "x integers": ((X.long(), CODES), TypeError, "x is torch.int64, expected a floating dtype"),
    "codebook bool": ((X, CODES.bool()), TypeError, "codebook is torch.bool, expected a floating dtype"),
    "dims differ": ((X, CODES.expand(4, 2)), ValueError, "x has 1 dims and codebook 2, expected the same D"),
    "no codes": ((X, CODES[:0]), ValueError, "codebook has shape (0, 1), expected at least one code"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    arguments, error, text = BAD[case]
    for call in (oracle_nearest, screen_disagreement, lambda *a: assert_nearest(torch.tensor([0, 0, 0]), *a)):
        with pytest.raises(error, match=re.escape(text)):
            call(*arguments)


def test_bad_answers_are_named() -> None:
    good = torch.tensor([0, 0, 1])
    with pytest.raises(TypeError, match=r"indices is torch\.int32, expected a tensor of torch\.int64"):
        assert_nearest(good.int(), X, CODES)
    with pytest.raises(ValueError, match=r"indices has shape \(2,\), expected \(3,\), one per row of x"):
        assert_nearest(good[:2], X, CODES)
    with pytest.raises(TypeError, match=r"score is torch\.float64, expected a tensor of torch\.float32"):
        assert_nearest(good, X, CODES, "l2", torch.zeros(3).double())
    with pytest.raises(TypeError, match="score is list"):
        assert_nearest(good, X, CODES, "l2", [0.0, 1.0, 0.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x has no rows"):
        screen_disagreement(X[:0], CODES)


def test_tie_cases_have_ties_and_names_of_their_own() -> None:
    cases = tie_cases()
    assert len({case.name for case in cases}) == len(cases)
    assert {case.metric for case in cases} == {"l2", "cosine", "dot"}
    for name, x, codes, metric, indices in cases:
        assert oracle_nearest(x, codes, metric)[0].equal(indices), name
    # Read from behind, ties fall to other codes: the lowest index matters in most of the tables.
    moved = sum(
        not (len(c.codebook) - 1 - oracle_nearest(c.x, c.codebook.flip(0), c.metric)[0]).equal(c.indices) for c in cases
    )
    assert moved >= 8


def test_usual_formulas_disagree_on_shifted_data() -> None:
    """Far from the origin |x|^2 and x.e cancel; the exact answer does not care."""
    x, codes = torch.randn(500, 32), torch.randn(1000, 32)
    found = screen_disagreement(x + 300, codes + 300)
    assert list(found) == ["cdist", "expanded", "addmm", "bfloat16"]
    for name in ("cdist", "expanded", "addmm"):
        assert 0.02 < found[name] < 0.5
    assert found["bfloat16"] > 0.9
    assert found == screen_disagreement((x + 300).double(), codes + 300)
    assert screen_disagreement(x + 300, codes + 300, "cosine")["normalize"] > 0.01
    assert screen_disagreement(x + 300, codes + 300, "dot")["bfloat16"] > 0.9


def test_usual_formulas_agree_where_codes_are_far_apart() -> None:
    codes = 100 * torch.eye(8)
    x = codes[torch.arange(50) % 8] + torch.rand(50, 8)
    for metric in ("l2", "cosine", "dot"):
        assert set(screen_disagreement(x, codes, metric).values()) == {0.0}
