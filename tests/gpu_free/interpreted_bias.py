"""``nearest`` on Triton's kernels where the codes' bias decides, which few dims keep in the operands themselves.

Run by test_triton_interpreter.py in Triton's interpreter, and by test_ptx_triton.py as compiled.
"""

from __future__ import annotations

import pytest
import torch
from gpu_data import Search, data, every_length, opposite

from vqkernels import tuned
from vqkernels.ops.nearest import triton as backend

# One and two parts, 16 and 32 dims of the contraction; and one dim too many for the bias beside each.
FOLDED, NOT_FOLDED = (1, 4, 6, 9, 11, 13, 17, 29), (5, 10, 14, 30)
check = Search("triton").check


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "HEURISTIC", {2**31: tuned.Config(16, 16, 32, 4, 1)})
    monkeypatch.setattr(backend, "COLLECT_ROWS", 16)


@pytest.mark.parametrize("dim", sorted(FOLDED + NOT_FOLDED))
def test_the_bias_lies_where_there_is_room(dim: int) -> None:
    assert backend._plan(torch.zeros(1, 1, 20, dim), torch.zeros(1, 30, dim)).folded == (dim in FOLDED)


@pytest.mark.parametrize("spread", [1.0, 1e-6])
@pytest.mark.parametrize("dim", [5, 9, 13, 29])
def test_biases_alone_decide(dim: int, spread: float) -> None:
    check(*opposite(dim, spread))


@pytest.mark.parametrize(("dim", "outlier", "few"), [(3, 1.0, 0), (20, 1.0, 2**30), (20, 2.0**20, 0)])
def test_rows_of_every_length_beside_the_codes(
    dim: int, outlier: float, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "FEW_ROWS", few)
    check(*every_length(dim, outlier))


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_other_metrics_have_no_bias_but_codes_that_cannot_win(metric: str) -> None:
    x, codes = data(40, 50, 8)
    codes[3, 2] = codes[49, 7] = float("nan")
    check(x, codes, metric)
