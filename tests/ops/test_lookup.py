"""lookup: the very values of the codebook, in every layout and dtype."""

from __future__ import annotations

import pytest
import torch
from on_device import needs_cpu
from torch import Tensor

from vqkernels.ops import lookup

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def make_codebook(layout: str, h: int, k: int, d: int, dtype: torch.dtype) -> Tensor:
    """(H, K, D): compact, transposed, or a strided slice of something larger."""
    if layout == "compact":
        return torch.randn(h, k, d).to(dtype)
    if layout == "transposed":
        return torch.randn(d, k, h).to(dtype).permute(2, 1, 0)
    return torch.randn(h, 2 * k, d + 5).to(dtype)[:, ::2, 2 : d + 2]


def oracle(codebook: Tensor, indices: Tensor, channel_first: bool, dtype: torch.dtype | None) -> Tensor:
    """One head, one batch item at a time."""
    heads = []
    for codes, index in zip(codebook, indices, strict=True):
        values = codes[index.clamp(min=0)] * (index >= 0)[..., None].to(codes.dtype)
        heads.append(values.transpose(1, 2) if channel_first else values)
    return torch.stack(heads).to(dtype or codebook.dtype)


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("layout", ["compact", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("h", "b", "s", "d", "k"),
    [(1, 1, 1, 1, 1), (2, 3, 63, 5, 7), (1, 2, 257, 33, 3), (3, 100, 1, 17, 257), (1, 2, 600, 3, 100)],
)
def test_gives_the_codes(
    backend: str, channel_first: bool, layout: str, dtype: torch.dtype, h: int, b: int, s: int, d: int, k: int
) -> None:
    codebook = make_codebook(layout, h, k, d, dtype)
    indices = torch.randint(-1, k, (h, b, s))
    for target in (None, *DTYPES):
        out = lookup(codebook, indices, channel_first, target, backend)
        expected = oracle(codebook, indices, channel_first, target)
        assert out.dtype == expected.dtype
        assert out.is_contiguous()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16])
def test_conversion_rounds_like_torch(backend: str, target: torch.dtype) -> None:
    # Ties, subnormals, overflow and both infinities of the 16-bit formats.
    tricky = [
        1 + 2**-11,
        1 + 3 * 2**-11,
        1 + 2**-8,
        1 + 3 * 2**-8,
        2**-24,
        2**-25,
        1.5 * 2**-24,
        3e-39,
        65504,
        65519.99,
    ]
    values = torch.tensor([*tricky, 65520, 3.4e38, float("inf"), 0.0])
    codebook = torch.stack([values, -values])[None]
    out = lookup(codebook, torch.tensor([[[0, 1]]]), False, target, backend)
    assert torch.equal(out[0], codebook.to(target))


def test_nan_stays_nan_and_stays_put(backend: str) -> None:
    codebook = torch.tensor([[[1.0, float("nan")], [2.0, 3.0]]])
    for target in DTYPES:
        out = lookup(codebook, torch.tensor([[[1, 0, -1]]]), True, target, backend)
        assert out[0, 0].isnan().tolist() == [[False, False, False], [False, True, False]]


def test_literal_table_with_a_masked_row(backend: str) -> None:
    codebook = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    indices = torch.tensor([[[1, -1, 0]]])
    assert lookup(codebook, indices, False, None, backend).tolist() == [[[[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]]]
    assert lookup(codebook, indices, True, None, backend).tolist() == [[[[3.0, 0.0, 1.0], [4.0, 0.0, 2.0]]]]


def test_masked_row_ignores_a_code_of_nan(backend: str) -> None:
    codebook = torch.full((1, 1, 3), float("nan"))
    assert lookup(codebook, torch.tensor([[[-1]]]), False, None, backend).tolist() == [[[[0.0, 0.0, 0.0]]]]


def test_indices_of_any_stride(backend: str) -> None:
    codebook = torch.randn(2, 9, 4)
    indices = torch.randint(-1, 9, (5, 3, 2)).permute(2, 1, 0)
    assert torch.equal(lookup(codebook, indices, False, None, backend), oracle(codebook, indices, False, None))


@pytest.mark.parametrize("channel_first", [False, True])
def test_no_rows(backend: str, channel_first: bool) -> None:
    out = lookup(torch.randn(2, 4, 3), torch.empty((2, 5, 0), dtype=torch.int64), channel_first, None, backend)
    assert out.shape == ((2, 5, 3, 0) if channel_first else (2, 5, 0, 3))


@needs_cpu
@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("wrong", [-2, 4, 2**40, -(2**63), 2**63 - 1])
def test_index_out_of_range_is_named(backend: str, channel_first: bool, wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"lookup: indices contains {wrong}, expected -1 or a code in \[0, 4\)"):
        lookup(torch.randn(1, 4, 3), torch.tensor([[[0, wrong, 3]]]), channel_first, None, backend)


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("layout", ["compact", "transposed", "sliced"])
def test_opcheck(backend: str, channel_first: bool, layout: str) -> None:
    codebook = make_codebook(layout, 2, 7, 4, torch.float32)
    for indices in (torch.randint(-1, 7, (2, 3, 5)), torch.randint(-1, 7, (5, 3, 2)).permute(2, 1, 0)):
        for target in (None, torch.bfloat16):
            args = (codebook, indices, channel_first, target, backend)
            torch.library.opcheck(torch.ops.vqkernels.lookup.default, args)
