"""``nearest`` on Triton's kernels: the float64 oracle's indices and scores, bit for bit.

Run by test_triton_interpreter.py in Triton's interpreter, and by test_ptx_triton.py as compiled.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_data import Search, data, extremes, planted, strided

from vqkernels import tuned
from vqkernels._triton import nearest_search
from vqkernels.ops.nearest import METRICS, nearest
from vqkernels.ops.nearest import triton as backend
from vqkernels.testing import oracle_nearest, tie_cases

# Rows, codes, dims: one tile and several, one split and several, two-part operands up to 10 dims, several steps of D.
SHAPES = ((1, 1, 1), (3, 7, 2), (33, 100, 3), (65, 129, 8), (17, 63, 12), (40, 65, 31), (9, 33, 100))


@pytest.fixture(autouse=True)
def _small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "shipped" not in request.node.name:
        monkeypatch.setattr(tuned, "HEURISTIC", {2**31: tuned.Config(16, 16, 32, 4, 1)})
        monkeypatch.setattr(backend, "COLLECT_ROWS", 16)
        monkeypatch.setattr(backend, "FEW_ROWS", 0)


class Spy:
    """Stands in for a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.calls = kernel, []  # type: ignore[var-annotated]

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.kernel[grid](*args, **kwargs)
            self.calls.append(dict(zip(self.kernel.arg_names, args, strict=False)))

        return launch


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy(nearest_search.decide)
    monkeypatch.setattr(nearest_search, "decide", spy)
    return spy


search = Search("triton")
check = search.check
# The metrics are told apart after the operands were made: 16-bit values meet one each.
KINDS = (*((metric, torch.float32) for metric in METRICS), ("l2", torch.float16), ("cosine", torch.bfloat16))


@pytest.mark.parametrize(("metric", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_row_equals_the_oracle(shape: tuple[int, int, int], metric: str, dtype: torch.dtype) -> None:
    check(*data(*shape, dtype), metric)


@pytest.mark.parametrize(
    ("shape", "metric", "dtype"),
    [
        ((1, 1, 1), "l2", torch.float32),
        ((1, 300, 40), "l2", torch.float32),
        ((1, 300, 40), "dot", torch.bfloat16),
        ((5, 7, 3), "cosine", torch.bfloat16),
        ((18, 70, 12), "l2", torch.bfloat16),
        ((18, 70, 12), "cosine", torch.float32),
        ((18, 70, 12), "dot", torch.float32),
    ],
    ids=str,
)
def test_a_few_rows_equal_the_oracle_in_four_launches(
    shape: tuple[int, int, int], metric: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "FEW_ROWS", 2048)
    for name in ("merge", "decide", "scan"):
        monkeypatch.setattr(nearest_search, name, None)
    for programs in (1, 264):
        monkeypatch.setattr(backend, "PROGRAMS", programs)
        x, codes = data(*shape, dtype)
        check(x, codes, metric)
    x[0], codes[0] = float("nan"), float("inf")
    check(x, codes, metric)
    check(x, codes * float("nan"), metric)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_16_bit_values_are_exact_where_the_data_is_centred(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = Spy(backend.nearest_pack.pack_rows)
    monkeypatch.setattr(backend.nearest_pack, "pack_rows", packs)
    x, codes = torch.randn(24, 24).to(dtype), torch.randn(40, 24).to(dtype)
    check(x, codes)
    check(x + 30, codes + 30)
    centred, shifted = packs.calls
    assert not centred["centre"].any()
    torch.testing.assert_close(shifted["centre"], torch.full((1, 24), 30.0), rtol=0, atol=1.0)
    length, residual = centred["info"][0, 1], centred["info"][0, 2]
    assert float((residual / length).max()) < 2**-21, "rounding that is not there costs candidates"


@pytest.mark.parametrize(("n", "k", "d"), [(130, 70, 8), (20, 130, 40), (9, 140, 140)])
def test_shipped_configurations_equal_the_oracle(n: int, k: int, d: int) -> None:
    check(*data(n, k, d))


@pytest.mark.parametrize("case", tie_cases(), ids=lambda case: case.name)
def test_lowest_index_wins_on_exact_ties(case: Any) -> None:
    indices, _ = search(case.x, case.codebook, case.metric)
    assert indices.tolist() == case.indices.tolist()


def test_mixed_dtypes_and_no_rows() -> None:
    x, codes = data(20, 50, 12)
    check(x.half(), codes)
    check(x, codes.bfloat16())
    assert search(x[:0], codes)[0].shape == (0,)


@pytest.mark.parametrize("metric", METRICS)
def test_heads_batches_and_strides_are_read_in_place(metric: str) -> None:
    for x, codes in strided(20)[: 2 if metric == "l2" else 1]:
        found, expected = (nearest(x, codes, metric, "exact", backend) for backend in ("triton", "reference"))
        assert found[0].equal(expected[0])
        assert found[1].equal(expected[1])


@pytest.mark.parametrize("metric", METRICS)
def test_nan_and_infinity_follow_the_contract_and_stay_in_their_row(metric: str) -> None:
    x, codes = extremes()
    check(x, codes, metric)
    check(x, codes * float("nan"), metric)
    check(x, codes.nan_to_num(0.0, 0.0, 0.0), metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("rows", "scale"), [(1e30, 1.0), (1.0, 1e30), (3e38, 3e38), (1e-38, 1e-30), (1e-42, 1e-42)])
def test_extreme_ranges(metric: str, rows: float, scale: float) -> None:
    x, codes = torch.rand(10, 5) * 2 - 1, torch.rand(20, 5) * 2 - 1
    check(x * rows, codes * scale, metric)


def test_classic_initialisation_outliers_and_offsets() -> None:
    x, codes = torch.randn(14, 20), (torch.rand(60, 20) * 2 - 1) / 100
    check(x, codes)
    check(x + 1000, torch.randn(60, 20) + 1000)
    codes[17] *= 1e6
    check(x, codes)


def test_screen_alone_is_wrong_where_the_certificate_is_right(decided: Spy) -> None:
    # Two codes that float16 operands cannot tell apart: the screen sees a tie, and its first is the farther one.
    codes = torch.randn(50, 32) * 10
    codes[20] = codes[40] + torch.randn(32) * 1e-4
    x = codes[40].repeat(8, 1)
    exact, _ = search(x, codes)
    assert exact.tolist() == [40] * 8
    assert int(decided.calls[0]["count"].sum(1).min()) >= 2
    wrong = False
    for seed in range(6):
        torch.manual_seed(seed)
        codes[20] = codes[40] + torch.randn(32) * 1e-3
        wrong |= search(x, codes, precision="fast")[0].tolist() != [40] * 8
        check(x, codes)
    assert wrong, "the planted case does not defeat the screen: it proves nothing"


def test_ordinary_data_is_decided_from_short_lists(decided: Spy) -> None:
    x, codes = torch.randn(100, 24), torch.randn(150, 24)
    check(x, codes)
    count = decided.calls[0]["count"].sum(1)
    assert int(count.min()) == 1
    assert int(count.max()) <= 4
    assert float(count.float().mean()) < 1.2


def test_small_dims_screen_nearly_in_float32(decided: Spy) -> None:
    x, codes = torch.randn(100, 8), torch.randn(150, 8)
    check(x, codes)
    assert float(decided.calls[0]["count"].sum(1).float().mean()) < 1.02


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("few", [0, 2048])
def test_too_many_candidates_are_scanned(few: int, metric: str, decided: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "FEW_ROWS", few)
    monkeypatch.setattr(backend, "PROGRAMS", 1)  # a list per split of the codes: 40 of them only fit several
    spy = Spy(nearest_search.resolve) if few else decided
    monkeypatch.setattr(nearest_search, "resolve" if few else "decide", spy)
    x, codes = planted()
    check(x, codes, metric)
    assert int(spy.calls[0]["count"].max()) > backend.CAPACITY
    check(x, codes[5:6].expand(60, 12), metric)


def test_chunks_of_rows_and_splits_of_codes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, codes = data(50, 90, 9)
    expected = oracle_nearest(x, codes)[0]
    for scratch, programs in ((1, 1), (1, 1000), (2**20, 1), (2**20, 7)):
        monkeypatch.setattr(backend, "SCRATCH_ELEMENTS", scratch)
        monkeypatch.setattr(backend, "PROGRAMS", programs)
        assert search(x, codes)[0].equal(expected)


@pytest.mark.parametrize("d", [4, 20])
def test_bounds_enclose_the_best_score(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # In screen units t = 2^(p+q) ((x - c).(e - c) - |e - c|^2 / 2): the bounds must hold, and be tight enough to use.
    spy = Spy(nearest_search.merge)
    monkeypatch.setattr(nearest_search, "merge", spy)
    packs = Spy(backend.nearest_pack.pack_rows)
    monkeypatch.setattr(backend.nearest_pack, "pack_rows", packs)
    x, codes = torch.randn(64, d) * torch.logspace(-3, 3, 64)[:, None], torch.randn(100, d) + 5
    search(x, codes)
    part, info, packed = spy.calls[0]["part"], spy.calls[0]["info"], packs.calls[0]
    q, centre = packed["exponent"].double(), packed["centre"].double()
    a, b = x.double() - centre, codes.double() - centre
    best = (a @ b.T - b.square().sum(1) / 2).amax(1)
    best = best * torch.exp2(2 * q + info[0, 0].double().log2())
    lower, upper = part[0, :, 0].double().amax(0), part[0, :, 1].double().amax(0)
    assert (lower <= best).all()
    assert (best <= upper).all()
    width = (upper - lower) / (info[0, 1].double() * b.norm(dim=1).amax() * torch.exp2(q) + best.abs())
    assert float(width.max()) < 1e-2


@pytest.mark.parametrize("rounded", ["rows", "codes"])
@pytest.mark.parametrize("shift", [0.49, -0.24])  # just under half a step of float16 above 1, and below
def test_rounding_of_either_side_alone_is_in_the_bound(
    rounded: str, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(nearest_search.merge)
    monkeypatch.setattr(nearest_search, "merge", spy)
    exact, inexact = torch.ones(1, 20), torch.ones(1, 20) + shift / 1024
    inexact[0, 0] = 1.0
    x, codes = (inexact, exact) if rounded == "rows" else (exact, inexact)
    search(x, codes, "dot")
    # The largest element is 1, or is below 2 and above 1: both sides are scaled by 2^14.
    best = float(x[0].double() @ codes[0].double()) * 2.0**28
    part = spy.calls[0]["part"].double()
    assert float(part[0, :, 0, 0].amax()) <= best <= float(part[0, :, 1, 0].amax())
    assert abs(float(part[0, :, 0, 0].amax()) + float(part[0, :, 1, 0].amax()) - 2 * best) > 2.0**28 * 1e-4
