"""``residual_nearest`` of csrc/cuda on the host, in several orders: the reference's bits at every level.

Run by test_cuda_host.py, and by `make asan` with a library that ASan and UBSan watch.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import pytest
import torch
from cuda_host import SEEDS, launches, set_seed
from gpu_data import laid_out
from torch import Tensor

from vqkernels import _cuda, _cuda_nearest, _cuda_residual, ops
from vqkernels._cuda_nearest import DIRECT, SM80, SM90, Device, Plan

NAMES = {DIRECT: "one launch", SM80: "sm80", SM90: "sm90"}
# H, B, S, D and K of each level: one tile of rows and of codes and several, one stage of 64 dims and several, sizes
# that change, more levels than two buffers.
SHAPES = (
    (1, 1, 1, 1, (1,)),
    (1, 1, 1, 70, (65, 65, 65, 65)),
    (2, 1, 5, 3, (33, 1, 100)),
    (1, 3, 7, 9, (40,) * 5),
    (1, 1, 17, 130, (129, 64, 64)),
    (3, 1, 2, 64, (7, 70)),
)


@pytest.fixture(params=NAMES, ids=NAMES.get)
def screen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    assert _cuda.hosted(), "VQKERNELS_CUDA_LIBRARY must name libvqk_cuda_host.so"
    set_seed(SEEDS[zlib.crc32(request.node.name.encode()) % len(SEEDS)])
    force(monkeypatch, request.param)
    return int(request.param)


def force(
    monkeypatch: pytest.MonkeyPatch, screen: int, splits: int = 1, chunk: int = 2**18, processors: int = 3
) -> None:
    """Search with this plan."""

    def plan(heads: int, rows: int, sizes: Sequence[int], dim: int, device: Device) -> Plan:
        return Plan(screen, splits, min(chunk, max(rows, 1)), 128)

    monkeypatch.setattr(_cuda_residual, "plan", plan)
    monkeypatch.setattr(_cuda_nearest, "HOSTED", Device((9, 0), processors))


def case(shape: tuple[int, int, int, int, tuple[int, ...]], channel_first: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Rows, every fourth on a code of the first level, and codebooks that shrink; the second level has ties."""
    h, b, s, d, sizes = shape
    codebooks = [torch.randn(h, k, d) * 0.7**q for q, k in enumerate(sizes)]
    if len(sizes) > 1:
        codebooks[1][:, sizes[1] // 2 :] = codebooks[1][:, : sizes[1] - sizes[1] // 2].clone()
    x = torch.randn(h, b, s, d)
    flat = x.view(h, b * s, d)
    flat[:, ::4] = codebooks[0][:, :1]
    return laid_out(x, "channel_first" if channel_first else "rows"), codebooks


def check(x: Tensor, codebooks: list[Tensor], outputs: tuple[bool, ...] = (False, True)) -> None:
    for channel_first in outputs:
        found = ops.residual_nearest(x, codebooks, channel_first, "native")
        expected = ops.residual_nearest(x, codebooks, channel_first, "reference")
        for a, b in zip(found, expected, strict=True):
            assert (a.dtype, a.stride()) == (b.dtype, b.stride())
            assert torch.equal(a.nan_to_num(1e30), b.nan_to_num(1e30))


# Strides of rows are followed where they are loaded, whatever the shape: each shape has one of the layouts.
@pytest.mark.parametrize(("shape", "channel_first"), tuple(zip(SHAPES, (False, True) * 3, strict=True)), ids=str)
def test_bits_of_the_reference(
    shape: tuple[int, int, int, int, tuple[int, ...]], channel_first: bool, screen: int
) -> None:
    check(*case(shape, channel_first))


@pytest.mark.parametrize("seed", SEEDS)
def test_one_launch_in_every_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # One block, a few, and as many as there are tiles of codes for each tile of rows.
    set_seed(seed)
    for processors in (1, 2, 5):
        force(monkeypatch, DIRECT, processors=processors)
        check(*case((1, 1, 6, 20, (150, 40, 150, 150))))
    check(*case((2, 1, 19, 5, (70, 70))))


def test_launches_are_counted(screen: int) -> None:
    # Codes of levels of one size are gathered and packed together; each level has the six of a search; sums at the end.
    for sizes, runs in (((40,), 1), ((40,) * 4, 1), ((40, 40, 50), 2)):
        x, codebooks = case((1, 1, 3, 4, sizes))
        before = launches()
        ops.residual_nearest(x, codebooks, False, "native")
        many = 1 + 3 * runs + 6 * len(sizes) + 1
        assert launches() - before == (1 if screen == DIRECT else many)


def test_rows_that_nothing_can_win_and_codes_that_cannot(screen: int) -> None:
    x, codebooks = case((1, 1, 12, 6, (40, 40, 40)))
    x[0, 0, 2, 3], x[0, 0, 5, 0], x[0, 0, 7] = float("nan"), float("inf"), 3e38
    codebooks[0][0, 4, 2], codebooks[1][0, 9, 1], codebooks[2][0, 11] = float("nan"), float("inf"), 0.0
    check(x, codebooks)
    check(x, [codebooks[0], codebooks[1] * float("nan"), codebooks[2]])


def test_dtypes_and_strides(screen: int) -> None:
    x = torch.randn(1, 2, 9, 12)
    codebooks = [
        torch.randn(1, 12, 40).mT,
        torch.randn(1, 80, 13).half()[:, ::2, 1:],
        torch.randn(1, 40, 12).bfloat16(),
    ]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check(x.to(dtype), codebooks)
    check(laid_out(x, "sliced"), codebooks[:1] * 3)


@pytest.mark.parametrize("screen", [SM80, SM90], ids=["sm80", "sm90"])
@pytest.mark.parametrize(("splits", "chunk", "processors"), [(3, 256, 2), (2, 7, 3)])
def test_chunks_of_rows_and_splits_of_codes_change_nothing(
    splits: int, chunk: int, processors: int, screen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_seed(SEEDS[3])
    force(monkeypatch, screen, splits, chunk, processors)
    check(*case((1, 1, 270 if chunk == 256 else 20, 9, (300, 300, 140))))


def test_more_levels_than_a_table_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    set_seed(SEEDS[1])
    levels = _cuda_residual.MOST_LEVELS + 2
    force(monkeypatch, SM80)
    check(*case((1, 1, 3, 2, (5,) * levels)), (False,))
    force(monkeypatch, DIRECT)
    check(*case((1, 1, 3, 2, (5,) * levels)), (True,))
    check(*case((1, 1, 2, 2, (5,) * 64)), (False,))


def test_without_a_screen_rows_that_do_not_fit_go_level_by_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQKERNELS_CUDA_SCREEN", "float64")
    monkeypatch.setattr(_cuda_nearest, "HOSTED", Device((9, 0), 2))
    monkeypatch.setattr(_cuda_residual, "DIRECT_WORK", 100)
    for rows, how in ((30, "in one launch"), (40, "level by level")):
        x, codebooks = case((1, 1, rows, 3, (20, 5)))
        assert how in _cuda_residual.describe(x, codebooks)
        check(x, codebooks)


def test_long_rows_in_one_launch_and_longer_ones_by_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    set_seed(SEEDS[2])
    force(monkeypatch, DIRECT)
    check(*case((1, 1, 5, 300, (40, 40))))
    monkeypatch.undo()
    check(*case((1, 1, 5, 520, (40, 40))))
    assert _cuda_residual.plan(1, 5, [40, 40], 520, Device((9, 0), 132)).screen == SM80
