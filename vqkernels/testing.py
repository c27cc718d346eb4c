"""The exact answer of ``nearest`` in plain NumPy float64, and an assertion against it; independent of every backend.

Called by the tests, and by users who want to check tokens of their own.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["assert_nearest", "oracle_nearest"]

_PAIRS = 2**20  # pairs held at a time


def oracle_nearest(x: Tensor, codebook: Tensor, metric: str = "l2") -> tuple[Tensor, Tensor]:
    """Evaluate every pair in the contract's fixed order and return the lowest best index and its score.

    Args:
        x: (N, D) rows of any floating dtype.
        codebook: (K, D) codes of any floating dtype.
        metric: "l2", "cosine" or "dot".

    Returns:
        Indices (N,) int64 and scores (N,) float32.

    Raises:
        ValueError: ``metric`` is unknown.

    >>> oracle_nearest(torch.tensor([[0.9]]), torch.tensor([[0.0], [1.0], [1.0]]))[0]
    tensor([1])
    """
    if metric not in ("l2", "cosine", "dot"):
        raise ValueError(f"metric is {metric!r}, expected 'l2', 'cosine' or 'dot'")
    a, e = x.detach().double().numpy(), codebook.detach().double().numpy()
    index = np.zeros(len(a), dtype=np.int64)
    score = np.zeros(len(a), dtype=np.float64)
    step = max(1, _PAIRS // len(e))
    with np.errstate(all="ignore"):
        norm = np.zeros(len(e))
        for d in range(e.shape[1]):
            norm = norm + e[:, d] * e[:, d]
        norm = np.sqrt(norm)
        for begin in range(0, len(a), step):
            part = a[begin : begin + step]
            value = np.zeros((len(part), len(e)))
            for d in range(e.shape[1]):
                if metric == "l2":
                    gap = part[:, d, None] - e[None, :, d]
                    value = value + gap * gap
                else:
                    value = value + part[:, d, None] * e[None, :, d]
            if metric == "cosine":
                value = np.where(norm == 0, value * 0.0, value / norm)
            cost = value if metric == "l2" else -value
            best = np.where(np.isnan(cost), np.inf, cost).argmin(1)
            index[begin : begin + step] = best
            score[begin : begin + step] = value[np.arange(len(part)), best]
        return torch.from_numpy(index), torch.from_numpy(score.astype(np.float32))


def assert_nearest(
    indices: Tensor, x: Tensor, codebook: Tensor, metric: str = "l2", score: Tensor | None = None
) -> None:
    """Assert that ``indices`` (N,), and ``score`` (N,) bit for bit if given, are the exact answer.

    Raises:
        AssertionError: names the first rows that differ and what was expected there.

    >>> assert_nearest(torch.tensor([0]), torch.zeros(1, 2), torch.zeros(3, 2))
    """
    expected, value = oracle_nearest(x, codebook, metric)
    wrong = (indices != expected).nonzero().flatten().tolist()
    if wrong:
        shown = ", ".join(f"row {i}: {int(indices[i])}, expected {int(expected[i])}" for i in wrong[:5])
        raise AssertionError(f"{len(wrong)} of {len(expected)} indices differ for metric {metric!r}: {shown}")
    if score is not None:
        torch.testing.assert_close(score, value, rtol=0, atol=0, equal_nan=True)
