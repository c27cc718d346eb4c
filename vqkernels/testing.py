"""The exact answer of ``nearest`` in plain NumPy float64, and what helps to test a search against it.

Called by this package's tests, and by users who want to check tokens of their own. Nothing here uses a backend: the
oracle evaluates every pair in the contract's order (:mod:`vqkernels.ops.nearest`) and takes O(N*K*D) time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["TieCase", "assert_nearest", "oracle_nearest", "screen_disagreement", "tie_cases"]

_METRICS = ("l2", "cosine", "dot")
_PAIRS = 2**15  # pairs held at a time: two such arrays of float64 stay in a core's cache
_SHOWN = 5  # wrong rows that an assertion names


def _check(x: Tensor, codebook: Tensor, metric: str) -> None:
    if metric not in _METRICS:
        raise ValueError(f"metric is {metric!r}, expected one of {', '.join(map(repr, _METRICS))}")
    for name, value, rows in (("x", x, "N"), ("codebook", codebook, "K")):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}, expected a tensor ({rows}, D)")
        if value.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected ({rows}, D)")
        if not value.is_floating_point():
            raise TypeError(f"{name} is {value.dtype}, expected a floating dtype")
    if x.shape[1] != codebook.shape[1]:
        raise ValueError(f"x has {x.shape[1]} dims and codebook {codebook.shape[1]}, expected the same D")
    if codebook.shape[0] == 0:
        raise ValueError(f"codebook has shape {tuple(codebook.shape)}, expected at least one code")


def _values(x: np.ndarray, columns: np.ndarray, norms: np.ndarray, metric: str) -> np.ndarray:
    """Rows (n, D) against codes (D, K), or row i against code i alone (D, n, 1): d ascends, no fused sums."""
    value = np.zeros((len(x), columns.shape[-1]))
    term = np.empty_like(value)
    for d in range(x.shape[1]):
        if metric == "l2":
            np.subtract(x[:, d, None], columns[d], out=term)
            np.multiply(term, term, out=term)
        else:
            np.multiply(x[:, d, None], columns[d], out=term)
        value += term
    if metric == "cosine":
        value = np.where(norms == 0, value * 0.0, value / norms)
    return value


def _norms(codes: np.ndarray) -> np.ndarray:
    total = np.zeros(len(codes))
    for d in range(codes.shape[1]):
        total = total + codes[:, d] * codes[:, d]
    return np.sqrt(total)


def _float64(x: Tensor) -> np.ndarray:
    return np.asarray(x.detach().cpu().double().numpy())


def oracle_nearest(x: Tensor, codebook: Tensor, metric: str = "l2") -> tuple[Tensor, Tensor]:
    """Evaluate every pair in float64, in the contract's fixed order; return the lowest best index and its score.

    Args:
        x: (N, D) rows of any floating dtype.
        codebook: (K, D) codes of any floating dtype, K >= 1.
        metric: "l2", "cosine" or "dot".

    Returns:
        Indices (N,) int64 and scores (N,) float32, on the CPU.

    Raises:
        TypeError: ``x`` or ``codebook`` is not a tensor of a floating dtype.
        ValueError: a shape or ``metric`` is not as above.

    >>> oracle_nearest(torch.tensor([[0.9]]), torch.tensor([[0.0], [1.0], [1.0]]))[0]
    tensor([1])
    """
    _check(x, codebook, metric)
    rows, codes = _float64(x), _float64(codebook)
    index = np.zeros(len(rows), dtype=np.int64)
    score = np.zeros(len(rows))
    columns = np.ascontiguousarray(codes.T)
    step = max(1, _PAIRS // len(codes))
    with np.errstate(all="ignore"):
        norms = _norms(codes)
        for begin in range(0, len(rows), step):
            value = _values(rows[begin : begin + step], columns, norms, metric)
            cost = value if metric == "l2" else -value
            # NaN never wins, infinity neither: where nothing else is left, argmin takes the first, code 0.
            best = np.where(np.isnan(cost), np.inf, cost).argmin(1)
            index[begin : begin + step] = best
            score[begin : begin + step] = value[np.arange(len(value)), best]
        return torch.from_numpy(index), torch.from_numpy(score.astype(np.float32))


def _pair_values(x: Tensor, codebook: Tensor, indices: Tensor, metric: str) -> np.ndarray:
    """Float64 value of row i with code ``indices[i]``."""
    codes = _float64(codebook)[indices.numpy()]
    with np.errstate(all="ignore"):
        return _values(_float64(x), codes.T[:, :, None], _norms(codes)[:, None], metric)[:, 0]


def assert_nearest(
    indices: Tensor,
    x: Tensor,
    codebook: Tensor,
    metric: str = "l2",
    score: Tensor | None = None,
    *,
    max_regret: float | None = None,
) -> None:
    """Assert that ``indices``, and ``score`` bit for bit if given, are the exact answer.

    Args:
        indices: (N,) int64, the answer under test.
        x: (N, D) rows.
        codebook: (K, D) codes.
        metric: "l2", "cosine" or "dot".
        score: (N,) float32, the scores under test; the sign of a zero and the payload of a NaN don't matter.
        max_regret: how much worse than the best value the value of another code may be (for searches that only claim
            to be close, as ``precision="fast"`` does); ``None``: nothing but the lowest best index passes.

    Raises:
        AssertionError: names the first wrong rows, with both indices, both values and the regret.
        TypeError: an argument is not a tensor of the expected dtype.
        ValueError: a shape, an index or ``metric`` is not as above.

    >>> assert_nearest(torch.tensor([0]), torch.zeros(1, 2), torch.zeros(3, 2))
    >>> assert_nearest(torch.tensor([1]), torch.tensor([[0.75]]), torch.tensor([[1.0], [0.25]]))
    Traceback (most recent call last):
    AssertionError: 1 of 1 rows have a wrong index for metric 'l2':
      row 0: index 1 (value 0.25), expected 0 (value 0.0625), regret 0.188
    """
    _check(x, codebook, metric)
    _check_answer("indices", indices, torch.int64, len(x))
    indices = indices.detach().cpu()
    expected, value = oracle_nearest(x, codebook, metric)
    if ((indices < 0) | (indices >= len(codebook))).any():
        outside = int(((indices < 0) | (indices >= len(codebook))).nonzero()[0])
        raise AssertionError(f"row {outside}: index {int(indices[outside])} is outside of {len(codebook)} codes")
    wrong = (indices != expected).nonzero().flatten()
    if len(wrong):
        got = _pair_values(x[wrong], codebook, indices[wrong], metric)
        best = _pair_values(x[wrong], codebook, expected[wrong], metric)
        with np.errstate(all="ignore"):
            regret = got - best if metric == "l2" else best - got
        if max_regret is not None:
            keep = ~(regret <= max_regret)
            wrong, got, best, regret = wrong[torch.from_numpy(keep)], got[keep], best[keep], regret[keep]
    if len(wrong):
        lines = [
            f"  row {row}: index {int(indices[row])} (value {got[i]:.9g}), "
            f"expected {int(expected[row])} (value {best[i]:.9g}), regret {regret[i]:.3g}"
            for i, row in enumerate(wrong[:_SHOWN].tolist())
        ]
        lines += [f"  and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        summary = f"{len(wrong)} of {len(expected)} rows have a wrong index for metric {metric!r}:"
        raise AssertionError("\n".join([summary, *lines]))
    if score is not None:
        _check_answer("score", score, torch.float32, len(x))
        _assert_score(score.detach().cpu(), x, codebook, indices, metric, value if max_regret is None else None)


def _check_answer(name: str, value: Tensor, dtype: torch.dtype, rows: int) -> None:
    if not isinstance(value, Tensor) or value.dtype != dtype:
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} is {found}, expected a tensor of {dtype}")
    if value.shape != (rows,):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected ({rows},), one per row of x")


def _assert_score(
    score: Tensor, x: Tensor, codebook: Tensor, indices: Tensor, metric: str, expected: Tensor | None
) -> None:
    if expected is None:  # of the codes that were chosen
        with np.errstate(all="ignore"):
            expected = torch.from_numpy(_pair_values(x, codebook, indices, metric).astype(np.float32))
    wrong = (~((score == expected) | (score.isnan() & expected.isnan()))).nonzero().flatten().tolist()
    if wrong:
        lines = [f"  row {i}: {float(score[i])!r}, expected {float(expected[i])!r}" for i in wrong[:_SHOWN]]
        summary = f"{len(wrong)} of {len(score)} rows have a wrong score for metric {metric!r}:"
        raise AssertionError("\n".join([summary, *lines]))


class TieCase(NamedTuple):
    """One hand-checked table: ``indices`` (N,) is the answer for ``x`` (N, D), ``codebook`` (K, D) and ``metric``."""

    name: str
    x: Tensor
    codebook: Tensor
    metric: str
    indices: Tensor


def tie_cases() -> list[TieCase]:
    """Small cases with exact ties, whose answers were worked out by hand: the lowest index wins.

    Returns:
        Cases with float32 inputs of a few rows, codes and dims.

    >>> for case in tie_cases():
    ...     assert oracle_nearest(case.x, case.codebook, case.metric)[0].equal(case.indices), case.name
    """
    cross = [[0.0, 1.0], [1.0, 0.0], [0.0, -1.0], [-1.0, 0.0]]
    # name, x, codebook, metric, indices
    tables: list[tuple[str, list[list[float]], list[list[float]], str, list[int]]] = [
        ("halfway between two codes", [[0.5], [1.5], [2.5]], [[2.0], [0.0], [1.0], [3.0]], "l2", [1, 0, 0]),
        ("the same code three times", [[4.0], [9.0]], [[9.0], [4.0], [4.0], [4.0]], "l2", [1, 0]),
        ("all codes equal", [[-7.0], [0.0], [7.0]], [[2.0], [2.0], [2.0]], "l2", [0, 0, 0]),
        ("centre of a cross", [[0.0, 0.0], [1.0, 1.0], [-1.0, -1.0]], cross, "l2", [0, 0, 2]),
        ("one code", [[1e9], [-1e9]], [[0.0]], "l2", [0, 0]),
        ("length does not matter", [[1.0, 1.0], [2.0, 0.0]], [[0.0, 5.0], [3.0, 0.0], [1.0, 0.0]], "cosine", [0, 1]),
        ("a code of zeros has similarity 0", [[-1.0], [1.0]], [[0.0], [0.0], [2.0]], "cosine", [0, 2]),
        ("a row of zeros ties with every code", [[0.0, 0.0]], [[1.0, 2.0], [0.0, 0.0], [-3.0, 1.0]], "cosine", [0]),
        ("length matters", [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [2.0, 1.0], [2.0, 1.0], [2.0, 0.0]], "dot", [1, 1]),
        ("orthogonal to every code", [[0.0, 0.0, 5.0]], [[1.0, 2.0, 0.0], [3.0, 4.0, 0.0]], "dot", [0]),
    ]
    return [
        TieCase(name, torch.tensor(x), torch.tensor(codes), metric, torch.tensor(indices))
        for name, x, codes, metric, indices in tables
    ]


def _formulas(metric: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """What is found in the wild, as (x, e) -> indices."""
    if metric == "l2":
        return {
            "cdist": lambda x, e: torch.cdist(x, e).argmin(1),
            "expanded": lambda x, e: (x.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * x @ e.T).argmin(1),
            "addmm": lambda x, e: torch.addmm(e.square().sum(1), x, e.T, alpha=-2).argmin(1),
            "bfloat16": lambda x, e: (e.square().sum(1) - 2 * (x.bfloat16() @ e.bfloat16().T)).argmin(1),
        }
    if metric == "cosine":
        return {
            "normalize": lambda x, e: (functional.normalize(x) @ functional.normalize(e).T).argmax(1),
            "bfloat16": lambda x, e: (x.bfloat16() @ functional.normalize(e).bfloat16().T).argmax(1),
        }
    return {
        "matmul": lambda x, e: (x @ e.T).argmax(1),
        "bfloat16": lambda x, e: (x.bfloat16() @ e.bfloat16().T).argmax(1),
    }


def screen_disagreement(x: Tensor, codebook: Tensor, metric: str = "l2") -> dict[str, float]:
    """How often the usual floating-point formulas name another code than the exact one, on your data.

    Args:
        x: (N, D) rows, N >= 1.
        codebook: (K, D) codes.
        metric: "l2" (formulas "cdist", "expanded" |x|^2 + |e|^2 - 2 x.e, "addmm" |e|^2 - 2 x.e, "bfloat16"),
            "cosine" ("normalize", "bfloat16") or "dot" ("matmul", "bfloat16").

    Returns:
        Fraction of rows in [0, 1] by name of the formula, each evaluated in float32 but for "bfloat16", whose matrix
        product takes and gives bfloat16.

    Raises:
        TypeError: ``x`` or ``codebook`` is not a tensor of a floating dtype.
        ValueError: a shape or ``metric`` is not as above, or there are no rows.

    >>> x = torch.tensor([[4096.25], [4095.0]])
    >>> screen_disagreement(x, torch.tensor([[4095.0], [4096.0]]))["bfloat16"]
    0.5
    """
    _check(x, codebook, metric)
    if len(x) == 0:
        raise ValueError("x has no rows, expected at least one")
    exact = oracle_nearest(x, codebook, metric)[0]
    rows, codes = x.detach().cpu().float(), codebook.detach().cpu().float()
    step = max(1, 2**22 // len(codes))  # never N x K
    wrong = dict.fromkeys(_formulas(metric), 0)
    for begin in range(0, len(rows), step):
        part = slice(begin, begin + step)
        for name, formula in _formulas(metric).items():
            wrong[name] += int((formula(rows[part], codes) != exact[part]).sum())
    return {name: count / len(rows) for name, count in wrong.items()}
