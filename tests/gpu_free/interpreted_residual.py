"""``residual_nearest`` on Triton's kernels: the bits of the reference at every level.

Run by test_triton_interpreter.py in Triton's interpreter, and by test_ptx_triton.py as compiled.
"""

from __future__ import annotations

import pytest
import torch
from gpu_data import laid_out
from torch import Tensor

from vqkernels import ops, tuned
from vqkernels.ops.nearest import triton as nearest
from vqkernels.ops.residual_nearest import triton as backend

# H, B, S, D and K of each level: one tile of codes and several, sizes that change.
SHAPES = ((1, 1, 1, 1, (1,)), (2, 1, 3, 3, (33, 1, 40)), (1, 2, 3, 9, (40,) * 4), (1, 1, 2, 35, (70, 20)))


@pytest.fixture(params=["few", "many"], autouse=True)
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways, whatever the sizes; small blocks for the second."""
    monkeypatch.setattr(backend, "FEW_WORK", 2**60 if request.param == "few" else 0)
    monkeypatch.setattr(tuned, "HEURISTIC", {2**31: tuned.Config(16, 16, 32, 4, 1)})
    monkeypatch.setattr(nearest, "COLLECT_ROWS", 16)
    return str(request.param)


def check(x: Tensor, codebooks: list[Tensor], channel_first: bool) -> None:
    found = ops.residual_nearest(x, codebooks, channel_first, "triton")
    expected = ops.residual_nearest(x, codebooks, channel_first, "reference")
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())
        assert torch.equal(a.nan_to_num(1e30), b.nan_to_num(1e30))


def case(shape: tuple[int, int, int, int, tuple[int, ...]]) -> tuple[Tensor, list[Tensor]]:
    """Codebooks that shrink; every second level has each code twice."""
    h, b, s, d, sizes = shape
    codebooks = [torch.randn(h, k, d) * 0.7**q for q, k in enumerate(sizes)]
    for codes in codebooks[1::2]:
        half = codes.shape[1] // 2
        codes[:, half : 2 * half] = codes[:, :half].clone()
    return torch.randn(h, b, s, d), codebooks


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_the_reference(shape: tuple[int, int, int, int, tuple[int, ...]], channel_first: bool) -> None:
    x, codebooks = case(shape)
    check(laid_out(x, "channel_first" if channel_first else "rows"), codebooks, channel_first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    x = laid_out(torch.randn(1, 2, 2, 7), "sliced")
    codebooks = [torch.randn(1, 7, 20).mT, torch.randn(1, 34, 8).half()[:, ::2, 1:], torch.randn(1, 20, 7).bfloat16()]
    check(x.to(dtype), codebooks, False)


def test_rows_that_nothing_can_win_and_codes_that_cannot() -> None:
    x, codebooks = case((1, 1, 6, 3, (20, 34, 20)))
    x[0, 0, 2, 2], x[0, 0, 4, 0] = float("nan"), float("inf")
    codebooks[0][0, 4, 2], codebooks[1][0, 9, 1] = float("nan"), float("inf")
    check(x, codebooks, False)
    check(x, [codebooks[0], codebooks[1] * float("nan"), codebooks[2]], False)


def test_the_way_is_chosen_by_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    mimi = [torch.empty(1, 2048, 256)]
    assert "one launch per level" in backend.describe(torch.empty(1, 32, 1, 256), mimi, False)
    assert "tiles of 64 rows" in backend.describe(torch.empty(1, 33, 1, 256), mimi, False)
