"""The AVX2 screen in int16: sums at the very edge of 32 bits, values that share a factor badly, and the certificate."""

from __future__ import annotations

import pytest
import torch
from shapes import ISAS, check, search
from torch import Tensor

from vqkernels.ops.nearest import METRICS
from vqkernels.testing import oracle_nearest

pytestmark = pytest.mark.skipif("avx2" not in ISAS, reason="this machine or build has no AVX2 kernels")


@pytest.fixture(autouse=True)
def _avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQKERNELS_ISA", "avx2")


# Both sides of the sizes where the float32 screen takes over (20 and 8192 dims), odd ones among them.
@pytest.mark.parametrize("dim", [19, 20, 21, 63, 1024, 4097, 8192, 8193])
@pytest.mark.parametrize("metric", METRICS)
def test_sums_at_the_edge_of_32_bits(metric: str, dim: int) -> None:
    """Rows parallel to a code give |X| |E|, the most a sum can be, of either sign; alternating ones wrap midway."""
    signs = torch.ones(8, dim)
    signs[1], signs[2, ::2], signs[3, dim // 2 :], signs[4, ::3] = -1, -1, -1, -1
    signs[5:] = torch.randn(3, dim).sign()
    codes = torch.cat([signs * 3.0, signs * 3.0 * torch.linspace(0.9, 1.1, dim), signs.roll(1, 0) * 1e-3])
    x = torch.cat([codes, -codes, signs * 1e-4, signs * 1e4])
    for scale in (1.0, 1e-15, 1e15):
        check(x * scale, codes * scale, metric, "native")


@pytest.mark.parametrize("metric", METRICS)
def test_a_single_value_fills_the_range_of_int16(metric: str) -> None:
    x, codes = torch.zeros(80, 40), torch.zeros(80, 40)
    for i in range(40):
        x[i, i], x[40 + i, i] = 1.0, -7.0
        codes[i, i], codes[40 + i, i] = -1.0, 3.0
    for both in ((x, codes), (x + 1e-5 * torch.randn(80, 40), codes)):
        check(*both, metric, "native")


def huge_coordinate(x: Tensor, codes: Tensor, where: str) -> None:
    if where in ("rows", "both"):
        x[::3, 5] = 1e4
    if where in ("codes", "both"):
        codes[::7, 5] = 1e4
    if where == "one code":
        codes[3] *= 1e6
    if where == "one row":
        x[3] *= 1e12
    if where == "every row and code":
        x[:, 5], codes[:, 5] = 1e3 * x[:, 5].sign(), 1e3 * codes[:, 5].sign()


@pytest.mark.parametrize("where", ["rows", "codes", "both", "one code", "one row", "every row and code"])
@pytest.mark.parametrize("metric", METRICS)
def test_one_huge_coordinate_or_vector(metric: str, where: str) -> None:
    """Everything else then rounds to a few units or to nothing: slower, and right."""
    for n, k, d in ((63, 500, 33), (50, 1000, 256)):
        x, codes = torch.randn(n, d), torch.randn(k, d)
        x[::5] = codes[:n][::5]
        huge_coordinate(x, codes, where)
        check(x, codes, metric, "native")


@pytest.mark.parametrize("metric", METRICS)
def test_a_value_that_is_not_finite_spoils_no_other_row(metric: str) -> None:
    x, codes = torch.randn(57, 50), torch.randn(300, 50)
    x[3, 7], x[20, 49], x[21, 0], codes[9, 8], codes[10, 3] = torch.nan, torch.inf, -torch.inf, torch.nan, torch.inf
    check(x, codes, metric, "native")


def test_without_the_certificate_near_ties_are_wrong() -> None:
    """Rows next to the middle of two codes: the screen takes the wrong one of some pairs, the search of none."""
    codes = torch.randn(400, 32)
    first, second = torch.randint(400, (2, 4000))
    x = (codes[first] + codes[second]) / 2
    x += 1e-6 * torch.randn_like(x)
    answer = oracle_nearest(x, codes)
    assert (search(x, codes, precision="fast")[0] != answer[0]).sum() > 0
    check(x, codes, "l2", "native", answer)


def test_equal_codes_of_another_length_are_told_apart() -> None:
    """Codes along one direction round to the same integers and differ by their factor alone."""
    direction = torch.randn(48)
    codes = direction * torch.linspace(0.1, 2.0, 500)[:, None]
    codes[250:260] = codes[100]
    x = torch.cat([codes + 1e-3 * torch.randn_like(codes), codes])
    for metric in METRICS:
        check(x, codes, metric, "native")
