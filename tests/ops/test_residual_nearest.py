"""residual_nearest: every level against the float64 oracle on the residual that it was given, sums bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vqkernels.ops import lookup, nearest, residual_nearest
from vqkernels.testing import oracle_nearest

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def case(h: int, b: int, s: int, d: int, sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Channel-first rows, and codebooks that shrink from level to level as trained ones do."""
    x = torch.randn(h, b, d, s).to(dtype).transpose(2, 3)
    return x, [torch.randn(h, k, d) * 0.7**q for q, k in enumerate(sizes)]


def composed(x: Tensor, codebooks: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: the other ops' references, level by level; sums as (H, B, S, D)."""
    residual = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    values, indices, scores = torch.zeros_like(residual), [], []
    for codes in codebooks:
        index, score = nearest(residual, codes, "l2", "exact", "reference")
        chosen = lookup(codes, index, False, residual.dtype, "reference")
        residual, values = residual - chosen, values + chosen
        indices.append(index)
        scores.append(score)
    return torch.stack(indices), values, torch.stack(scores)


SHAPES = [
    (1, 1, 1, 1, (1,)),
    (1, 1, 1, 256, (300, 300, 300)),
    (2, 3, 21, 5, (7, 1, 100)),
    (1, 2, 130, 33, (65, 64, 63, 257)),
    (1, 1, 7, 128, (1030,) * 8),
    (3, 1, 63, 8, (100,) * 9),
]


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("h", "b", "s", "d", "sizes"), SHAPES)
def test_the_bits_of_the_ops_called_level_by_level(
    backend: str, channel_first: bool, dtype: torch.dtype, h: int, b: int, s: int, d: int, sizes: tuple[int, ...]
) -> None:
    x, codebooks = case(h, b, s, d, sizes, dtype)
    indices, values, score = residual_nearest(x, codebooks, channel_first, backend)
    expected = composed(x, codebooks)
    assert indices.equal(expected[0])
    assert (values.transpose(2, 3) if channel_first else values).equal(expected[1])
    assert score.equal(expected[2])
    assert values.is_contiguous()


# Rows per thread decide how the native library goes through them: directly, level by level, or in blocks.
ROWS = [(1, 1, 1), (2, 3, 3), (1, 67, 1), (2, 2, 301), (3, 1, 1)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("h", "b", "s"), ROWS)
def test_every_instruction_set_and_order(isa: str, h: int, b: int, s: int, threads: int) -> None:
    before = torch.get_num_threads()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, codebooks = case(h, b, s, 19, (100, 33, 257), dtype)
        expected = composed(x, codebooks)
        torch.set_num_threads(threads)
        try:
            found = [residual_nearest(x, codebooks, first, "native") for first in (False, True)]
        finally:
            torch.set_num_threads(before)
        for (indices, values, score), first in zip(found, (False, True), strict=True):
            assert indices.equal(expected[0])
            assert (values.transpose(2, 3) if first else values).equal(expected[1])
            assert score.equal(expected[2])


@pytest.mark.parametrize(("h", "s", "d"), [(1, 190, 300), (3, 70, 257)])
def test_more_threads_than_blocks_of_rows(backend: str, h: int, s: int, d: int) -> None:
    x, codebooks = case(h, 2, s // 2, d, (70, 90), torch.float32)
    expected = composed(x, codebooks)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        indices, values, score = residual_nearest(x, codebooks, True, backend)
    finally:
        torch.set_num_threads(before)
    assert indices.equal(expected[0])
    assert values.transpose(2, 3).equal(expected[1])
    assert score.equal(expected[2])


@pytest.mark.parametrize("dim", [1, 2, 8, 9, 64])
def test_every_instruction_set_at_its_dims(isa: str, dim: int) -> None:
    x, codebooks = case(1, 1, 600, dim, (50, 3000 if dim < 10 else 70), torch.float32)
    found = residual_nearest(x, codebooks, False, "native")
    assert all(a.equal(b) for a, b in zip(found, composed(x, codebooks), strict=True))


@pytest.mark.parametrize("rows", [3, 300])
def test_a_codebook_that_changed_in_place_is_packed_anew(isa: str, rows: int) -> None:
    x, codebooks = case(1, 1, rows, 24, (90, 80), torch.float32)
    residual_nearest(x, codebooks, False, "native")
    codebooks[1].data.mul_(-1.5)
    found = residual_nearest(x, codebooks, False, "native")
    assert all(a.equal(b) for a, b in zip(found, composed(x, codebooks), strict=True))


@pytest.mark.parametrize(("h", "b", "s", "d", "sizes"), SHAPES)
def test_every_level_is_the_float64_oracle_of_its_residual(
    backend: str, h: int, b: int, s: int, d: int, sizes: tuple[int, ...]
) -> None:
    x, codebooks = case(h, b, s, d, sizes, torch.float32)
    indices, values, _ = residual_nearest(x, codebooks, False, backend)
    residual, total = x.clone(), torch.zeros_like(x)
    for index, codes in zip(indices, codebooks, strict=True):
        for head in range(h):
            assert index[head].reshape(-1).equal(oracle_nearest(residual[head].reshape(-1, d), codes[head])[0])
        chosen = torch.stack([c[i] for c, i in zip(codes, index, strict=True)])
        residual, total = residual - chosen, total + chosen
    assert values.equal(total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codebooks_of_any_dtype_and_strides(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(1, 1, 50, 12)
    codebooks = [torch.randn(1, 12, 40).to(dtype).mT, torch.randn(1, 80, 13).to(dtype)[:, ::2, 1:]]
    found = residual_nearest(x, codebooks, False, backend)
    assert all(a.equal(b) for a, b in zip(found, composed(x, codebooks), strict=True))


def test_one_codebook_for_all_levels(backend: str) -> None:
    x, (codes,) = case(1, 1, 40, 16, (50,), torch.float32)
    found = residual_nearest(x, [codes] * 5, False, backend)
    assert all(a.equal(b) for a, b in zip(found, composed(x, [codes] * 5), strict=True))


def test_a_table_worked_out_by_hand(backend: str) -> None:
    x = torch.tensor([[[[5.0], [-3.0]]]])
    codebooks = [torch.tensor([[[4.0], [-4.0]]]), torch.tensor([[[-1.0], [1.0], [1.0]]])]
    indices, values, score = residual_nearest(x, codebooks, False, backend)
    assert indices.tolist() == [[[[0, 1]]], [[[1, 1]]]]
    assert values.tolist() == [[[[5.0], [-3.0]]]]
    assert score.tolist() == [[[[1.0, 1.0]]], [[[0.0, 0.0]]]]


def test_ties_take_the_lowest_index_at_every_level(backend: str) -> None:
    codes = torch.randn(1, 30, 8)
    codebooks = [torch.cat([codes, codes], 1), torch.zeros(1, 17, 8), torch.cat([codes[:, :5]] * 3, 1)]
    indices, _, _ = residual_nearest(torch.randn(1, 1, 100, 8), codebooks, False, backend)
    assert int(indices[0].max()) < 30
    assert not indices[1].any()
    assert int(indices[2].max()) < 5


def test_nan_and_infinity_stay_in_their_rows(backend: str) -> None:
    x, codebooks = case(1, 1, 40, 8, (20, 20, 20), torch.float32)
    before = residual_nearest(x, codebooks, False, backend)
    broken = x.clone()
    broken[0, 0, 7, 3], broken[0, 0, 11, 0] = float("nan"), float("inf")
    indices, values, score = residual_nearest(broken, codebooks, False, backend)
    whole = torch.ones(40, dtype=torch.bool)
    whole[[7, 11]] = False
    assert not indices[:, 0, 0, ~whole].any()
    assert indices[:, 0, 0, whole].equal(before[0][:, 0, 0, whole])
    assert values[0, 0, whole].equal(before[1][0, 0, whole])
    assert score[:, 0, 0, whole].equal(before[2][:, 0, 0, whole])


def test_no_rows(backend: str) -> None:
    indices, values, score = residual_nearest(torch.zeros(2, 0, 3, 4), [torch.zeros(2, 5, 4)] * 3, False, backend)
    assert (indices.shape, values.shape, score.shape) == ((3, 2, 0, 3), (2, 0, 3, 4), (3, 2, 0, 3))


def test_inputs_are_left_alone(backend: str) -> None:
    x, codebooks = case(1, 2, 30, 8, (20, 30), torch.float32)
    copies = x.clone(), [c.clone() for c in codebooks]
    residual_nearest(x, codebooks, True, backend)
    assert x.equal(copies[0])
    assert all(a.equal(b) for a, b in zip(codebooks, copies[1], strict=True))
