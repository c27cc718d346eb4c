"""``nearest`` of csrc/cuda on the host, every screen in several orders: the float64 oracle's bits on every row.

Run by test_cuda_host.py, and by `make asan` with a library that ASan and UBSan watch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_host import SEEDS, set_seed, set_shared
from gpu_data import Search, data, every_length, extremes, opposite, planted, strided

from vqkernels import _cuda, _cuda_nearest
from vqkernels._cuda_nearest import DIRECT, SM80, SM90, Plan
from vqkernels.ops.nearest import METRICS, nearest
from vqkernels.testing import oracle_nearest, tie_cases

NAMES = ("direct", "sm80", "sm90")
# Screens with orders of execution: a seed mixes all kinds of orders over the blocks, so two say nearly what four do.
ORDERS = [(DIRECT, SEEDS[1])] + [(screen, seed) for seed in SEEDS[1::2] for screen in (SM80, SM90)]
# N, K, D: each width and number of panels, one tile and several, one block of rows and several.
SHAPES = ((1, 1, 1), (3, 7, 3), (65, 129, 8), (257, 100, 12), (70, 400, 31), (65, 129, 63), (63, 257, 64),
          (33, 300, 95), (130, 129, 100), (65, 140, 190), (140, 257, 256),
          (33, 129, 380), (9, 260, 512), (5, 100, 600))  # fmt: skip


@pytest.fixture(autouse=True)
def _hosted() -> None:
    assert _cuda.hosted(), "VQKERNELS_CUDA_LIBRARY must name libvqk_cuda_host.so"


def order_name(order: tuple[int, int]) -> str:
    return f"{NAMES[order[0]]}-seed{order[1]}"


@pytest.fixture(params=ORDERS, ids=order_name)
def screen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    screen, seed = request.param
    set_seed(seed)
    force(monkeypatch, screen)
    return int(screen)


def force(
    monkeypatch: pytest.MonkeyPatch, screen: int, splits: int = 1, chunk: int = 2**18, processors: int = 3
) -> None:
    """Search with this plan, where the screen takes the dims."""

    def plan(heads: int, rows: int, codes: int, dim: int, device: Any) -> Plan:
        return Plan(SM80 if screen == SM90 and dim > 512 else screen, splits, min(chunk, max(rows, 1)), 128)

    monkeypatch.setattr(_cuda_nearest, "plan", plan)
    monkeypatch.setattr(_cuda_nearest, "HOSTED", _cuda_nearest.Device((9, 0), processors, 227 * 1024))


search = Search("native")
check = search.check


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_row_equals_the_oracle(shape: tuple[int, int, int], screen: int) -> None:
    check(*data(*shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(40, 33, 2), (20, 150, 20)], ids=str)
def test_metrics_and_dtypes(shape: tuple[int, int, int], metric: str, dtype: torch.dtype, screen: int) -> None:
    check(*data(*shape, dtype), metric)


@pytest.mark.parametrize("case", tie_cases(), ids=lambda case: case.name)
def test_lowest_index_wins_on_exact_ties(case: Any, screen: int) -> None:
    assert search(case.x, case.codebook, case.metric)[0].tolist() == case.indices.tolist()


def test_mixed_dtypes_and_no_rows(screen: int) -> None:
    x, codes = data(20, 50, 12)
    check(x.half(), codes)
    check(x, codes.bfloat16())
    assert search(x[:0], codes)[0].shape == (0,)


@pytest.mark.parametrize("metric", METRICS)
def test_heads_batches_and_strides_are_read_in_place(metric: str, screen: int) -> None:
    for x, codes in strided(140):
        found, expected = (nearest(x, codes, metric, "exact", backend) for backend in ("native", "reference"))
        assert found[0].equal(expected[0])
        assert found[1].equal(expected[1])


@pytest.mark.parametrize("metric", METRICS)
def test_nan_and_infinity_follow_the_contract_and_stay_in_their_row(metric: str, screen: int) -> None:
    x, codes = extremes()
    check(x, codes, metric)
    check(x, codes * float("nan"), metric)
    check(x, codes.nan_to_num(0.0, 0.0, 0.0), metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("rows", "scale"), [(1e30, 1.0), (1.0, 1e30), (3e38, 3e38), (1e-38, 1e-30), (1e-42, 1e-42)])
def test_extreme_ranges(metric: str, rows: float, scale: float, screen: int) -> None:
    x, codes = torch.rand(10, 5) * 2 - 1, torch.rand(20, 5) * 2 - 1
    check(x * rows, codes * scale, metric)


def test_classic_initialisation_outliers_and_offsets(screen: int) -> None:
    x, codes = torch.randn(30, 20), (torch.rand(100, 20) * 2 - 1) / 100
    check(x, codes)
    check(x + 1000, torch.randn(100, 20) + 1000)
    codes[17] *= 1e6
    check(x, codes)


@pytest.mark.parametrize("gap", [1, 100, 128])  # in one group, in two threads, in two groups of one thread (a wide row)
@pytest.mark.parametrize("screen", [SM80, SM90], ids=NAMES[1:])
def test_screen_alone_is_wrong_where_the_certificate_is_right(
    gap: int, screen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two codes that float16 operands cannot tell apart: without a certificate the farther one wins in some cases.
    force(monkeypatch, screen)
    set_seed(SEEDS[1])
    wrong = False
    for seed in range(40):
        torch.manual_seed(seed)
        codes = torch.randn(200, 32) * 10
        codes[40] = codes[40 + gap] + torch.randn(32) * 1e-3
        x = codes[40 + gap].repeat(8, 1)
        check(x, codes)
        wrong |= search(x, codes, precision="fast")[0].tolist() != [40 + gap] * 8
        if wrong and seed > 0:
            break
    assert wrong, "the planted case does not defeat the screen: it proves nothing"


@pytest.mark.parametrize("metric", METRICS)
def test_too_many_candidates_are_scanned(metric: str, screen: int) -> None:
    x, codes = planted()
    codes = torch.cat([codes, torch.randn(100, 12)])  # more than a tile
    check(x, codes, metric)
    check(x, codes[5:6].expand(60, 12), metric)


@pytest.mark.parametrize("processors", [1, 9])  # one block sees all codes of a wide row, or each tile has its own
@pytest.mark.parametrize("crowd", [12, 300])  # the second pass lists them all, or they overflow
@pytest.mark.parametrize("screen", [SM80, SM90], ids=NAMES[1:])
def test_too_many_candidates_in_several_tiles(
    crowd: int, processors: int, screen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, screen, processors=processors)
    for seed in SEEDS[1:]:
        set_seed(seed)
        torch.manual_seed(seed)
        codes, near = torch.randn(640, 40), torch.randperm(639)[:crowd]
        codes[near] = codes[639] + torch.randn(crowd, 40) * 1e-6
        check(torch.cat([codes[639:].expand(140, 40), codes[near[:3]], torch.randn(3, 40)]), codes)


@pytest.mark.parametrize("screen", [SM80, SM90], ids=NAMES[1:])
@pytest.mark.parametrize(("splits", "chunk", "processors"), [(1, 100, 1), (3, 300, 2), (8, 256, 50), (5, 7, 3)])
def test_chunks_of_rows_and_splits_of_codes_change_nothing(
    splits: int, chunk: int, processors: int, screen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, screen, splits, chunk, processors)
    for seed, d in ((SEEDS[1], 9), (SEEDS[3], 40)):
        set_seed(seed)
        check(*data(30 if chunk == 7 else 300, 520, d))


@pytest.mark.parametrize("screen", [SM80, SM90], ids=NAMES[1:])
# With the bias in the operands, and one dim too many for that.
@pytest.mark.parametrize("dim", [1, 4, 5, 9, 10, 13, 14, 29, 30])
def test_biases_alone_decide(dim: int, screen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, screen)
    set_seed(SEEDS[1])
    for spread in (1.0, 1e-3, 1e-5, 1e-7):
        check(*opposite(dim, spread))


@pytest.mark.parametrize("screen", [SM80, SM90], ids=NAMES[1:])
@pytest.mark.parametrize("dim", [3, 8, 20])
def test_rows_of_every_length_beside_the_codes(dim: int, screen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, screen)
    set_seed(SEEDS[1])
    for outlier in (1.0, 2.0**20):
        check(*every_length(dim, outlier))


@pytest.mark.parametrize("dim", [5, 20, 64, 95, 128, 190, 256, 300])
def test_blocks_with_99_kilobytes_are_enough(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # sm_86, sm_89, sm_120: rows of more than one panel stream there.
    force(monkeypatch, SM80)
    monkeypatch.setattr(_cuda_nearest, "HOSTED", _cuda_nearest.Device((8, 6), 3, 99 * 1024))
    set_seed(SEEDS[1])
    set_shared(99 * 1024)
    try:
        check(*data(70, 140, dim))
    finally:
        set_shared(227 * 1024)


# One kernel scans after every screen, so each screen meets one order.
@pytest.mark.parametrize("screen", ORDERS[:2] + ORDERS[-1:], ids=order_name, indirect=True)
def test_slices_of_a_scan_are_merged(screen: int) -> None:
    # More than 4096 codes: a scanned row is split over blocks, and its nearest code is in the last slice here.
    x, codes = torch.randn(4, 2), torch.randn(4500, 2)
    codes[[17, 4498]] = x[2].clone()
    codes[4400] = 9.0
    x[1] = 2.0**45  # 2^42 times the longest code, and float64 still tells codes apart
    codes[4499] = x[3]
    check(x, codes, "l2")
    x[0, 0] = float("inf")
    codes[:2300, 0] = -codes[:2300, 0].abs()
    check(x, codes, "dot")


def test_fast_returns_a_code_that_is_nearly_best(screen: int) -> None:
    x, codes = data(60, 300, 40)
    indices, score = search(x, codes, precision="fast")
    best = oracle_nearest(x, codes)[1]
    assert (score <= best * 1.01 + 1e-2).all()
    chosen = (x.double() - codes[indices].double()).square().sum(1).float()
    torch.testing.assert_close(score, chosen)
