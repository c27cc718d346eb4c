"""quantize_output: the codes, their mean squared distance, and what does not count."""

from __future__ import annotations

import pytest
import torch
from on_device import needs_cpu
from torch import Tensor

from vqkernels import Unsupported
from vqkernels.ops import lookup, quantize_output

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def case(h: int, b: int, s: int, d: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Channel-first z, float32 codes, indices with -1 among them."""
    z = torch.randn(h, b, d, s).to(dtype).transpose(2, 3)
    return z, torch.randn(h, k, d), torch.randint(-1, k, (h, b, s))


def oracle(z: Tensor, codes: Tensor, indices: Tensor) -> tuple[float, int]:
    """Mean squared difference in float64, and how many elements it is over."""
    chosen = torch.stack([c[i.clamp(min=0)] for c, i in zip(codes.double(), indices, strict=True)])
    error = (z.double() - chosen).square().sum(-1)[indices >= 0]
    elements = error.numel() * z.shape[-1]
    return float(error.sum()) / max(elements, 1), elements


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("h", "b", "s", "d", "k"), [(1, 1, 1, 1, 1), (2, 3, 63, 5, 7), (1, 2, 257, 33, 3)])
def test_values_are_the_codes_and_losses_the_mean_distance(
    backend: str, channel_first: bool, dtype: torch.dtype, h: int, b: int, s: int, d: int, k: int
) -> None:
    z, codes, indices = case(h, b, s, d, k, dtype)
    values, codebook_loss, commitment_loss, weight = quantize_output(
        z, codes, indices, None, True, channel_first, backend
    )
    assert values.equal(lookup(codes, indices, channel_first, dtype, "reference"))
    expected, elements = oracle(z, codes, indices)
    assert codebook_loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Differences in float32 from the values given; float64 all the way for float64 rows.
    assert float(codebook_loss) == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-6)
    assert commitment_loss.equal(codebook_loss)
    assert commitment_loss.data_ptr() != codebook_loss.data_ptr()
    assert float(weight) == 1 / max(elements, 1)


def test_measured_distances_are_taken_as_they_are(backend: str) -> None:
    z, codes, indices = case(2, 3, 31, 4, 6, torch.float32)
    distance = torch.rand(2, 3, 31)
    _, loss, _, weight = quantize_output(z, codes, indices, distance, True, False, backend)
    expected = float(distance.double()[indices >= 0].sum() * weight)
    assert float(loss) == pytest.approx(expected, rel=1e-7)
    whole = quantize_output(z, codes, indices.clamp(min=0), distance, False, False, backend)
    assert float(whole[1]) == pytest.approx(float(distance.double().mean()) / 4, rel=1e-7)


def test_a_table_worked_out_by_hand(backend: str) -> None:
    z = torch.tensor([[[[1.0, 2.0], [0.0, 0.0], [5.0, 5.0]]]])
    codes = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]])
    values, loss, _, weight = quantize_output(z, codes, torch.tensor([[[0, 1, -1]]]), None, True, False, backend)
    assert values.tolist() == [[[[1.0, 0.0], [3.0, 4.0], [0.0, 0.0]]]]
    assert (loss.item(), weight.item()) == ((4.0 + 25.0) / 4, 0.25)


def test_nothing_that_counts_is_no_loss(backend: str) -> None:
    z, codes, indices = case(1, 2, 5, 3, 4, torch.float32)
    for rows, index in ((z, torch.full_like(indices, -1)), (z[:, :, :0], indices[:, :, :0])):
        values, loss, _, weight = quantize_output(rows, codes, index, None, True, False, backend)
        assert not values.any()
        assert (loss.item(), weight.item()) == (0.0, 1.0)


def test_nan_of_a_row_that_does_not_count_stays_out(backend: str) -> None:
    z, codes, indices = case(1, 1, 40, 3, 4, torch.float32)
    indices[0, 0, 7] = -1
    before = quantize_output(z, codes, indices, None, True, False, backend)[1]
    z[0, 0, 7] = float("nan")
    distance = torch.full((1, 1, 40), 2.0)
    distance[0, 0, 7] = float("nan")
    assert quantize_output(z, codes, indices, None, True, False, backend)[1].equal(before)
    assert quantize_output(z, codes, indices, distance, True, False, backend)[1].isfinite()


def test_two_runs_give_the_same_bits_beyond_one_chunk(backend: str) -> None:
    z, codes, indices = case(1, 2, 5000, 120, 9, torch.float32)
    first, second = (quantize_output(z, codes, indices, None, True, True, backend) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    assert float(first[1]) == pytest.approx(oracle(z, codes, indices)[0], rel=1e-6)


# Rows, planes, every second place, one row per image, planes of one place; chunks of 256 rows, lanes of 16 dims.
LAYOUTS = {
    "rows": (2, 3, 70, 37, lambda x: x.contiguous()),
    "planes": (2, 3, 70, 37, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)),
    "sliced": (1, 2, 300, 16, lambda x: torch.stack([x, x + 1], -1)[..., 0]),
    "images": (1, 300, 1, 5, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)),
    "short": (1, 300, 2, 19, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)),
    "one dim": (1, 1, 520, 1, lambda x: x),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_numbers_add_up_exactly_in_every_layout(backend: str, layout: str, dtype: torch.dtype) -> None:
    h, b, s, d, lay_out = LAYOUTS[layout]
    z, codes = lay_out(torch.randint(-3, 4, (h, b, s, d)).to(dtype)), torch.randint(-3, 4, (h, 9, d)).float()
    indices = torch.randint(-1, 9, (h, s, b)).transpose(1, 2)
    expected, elements = oracle(z, codes, indices)
    for given in (codes, codes.double(), codes.half(), torch.stack([codes, codes], -1)[..., 0]):
        for channel_first in (False, True):
            values, loss, _, weight = quantize_output(z, given, indices, None, True, channel_first, backend)
            assert values.equal(lookup(codes, indices, channel_first, dtype, "reference"))
            assert weight.item() == 1 / elements
            assert loss.item() == pytest.approx(expected, rel=1e-15 if dtype == torch.float64 else 1e-7)


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_compares_with_the_codes_themselves(
    backend: str, dtype: torch.dtype, channel_first: bool
) -> None:
    z = torch.ones(1, 2, 3, 17, dtype=dtype)
    z = z.transpose(2, 3).contiguous().transpose(2, 3) if channel_first else z
    codes = torch.full((1, 1, 17), 1 + 2.0**-12)
    values, loss, _, _ = quantize_output(z, codes, torch.zeros(1, 2, 3).long(), None, False, channel_first, backend)
    assert values.eq(1).all()
    assert loss.item() == 2.0**-24


@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize("measured", [False, True])
def test_same_bits_for_any_number_of_threads(backend: str, layout: str, measured: bool) -> None:
    *_, lay_out = LAYOUTS[layout]
    # Losses in float64 show every bit of the sum.
    z = lay_out(torch.randn(2, 3, 999, 37, dtype=torch.float64))
    codes, indices = torch.randn(2, 9, 37), torch.randint(-1, 9, (2, 3, 999))
    distance = torch.rand(2, 3, 999) if measured else None
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(quantize_output(z, codes, indices, distance, True, layout == "planes", backend))
    finally:
        torch.set_num_threads(before)
    for again in found[1:]:
        assert all(a.equal(b) for a, b in zip(again, found[0], strict=True))


@needs_cpu
@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("wrong", [-2, 4, 2**40, -(2**63), 2**63 - 1])
def test_index_out_of_range_is_named(backend: str, channel_first: bool, wrong: int) -> None:
    indices = torch.tensor([[[0, wrong, 3]]])
    for distance in (None, torch.zeros(1, 1, 3)):
        with pytest.raises(ValueError, match=rf"indices contains {wrong}, expected -1 or a code in \[0, 4\)"):
            quantize_output(
                torch.randn(1, 1, 3, 5), torch.randn(1, 4, 5), indices, distance, True, channel_first, backend
            )


def test_distances_in_another_precision_go_to_the_reference() -> None:
    z, codes, indices = case(1, 1, 9, 3, 4, torch.float32)
    distance = torch.rand(1, 1, 9, dtype=torch.float64)
    with pytest.raises(Unsupported, match=r"distance is torch\.float64, not float32|native"):
        quantize_output(z, codes, indices, distance, True, False, "native")
    _, loss, _, weight = quantize_output(z, codes, indices, distance)
    assert loss.item() == pytest.approx(float(distance[indices >= 0].sum() * weight), rel=1e-7)
