"""codebook_sum: against float64, in every layout and dtype, the same bits from any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from on_device import needs_cpu
from torch import Tensor

from vqkernels import dispatch
from vqkernels.ops import codebook_sum
from vqkernels.ops.codebook_sum import CHUNK

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("rows", "channel_first", "heads_last", "sliced", "expanded")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run a block on that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_rows(layout: str, h: int, b: int, s: int, d: int, dtype: torch.dtype) -> Tensor:
    """(H, B, S, D) in a layout that a model may hand over."""
    if layout == "rows":
        return torch.randn(h, b, s, d).to(dtype)
    if layout == "channel_first":
        return torch.randn(h, b, d, s).to(dtype).transpose(2, 3)
    if layout == "heads_last":
        return torch.randn(b, s, h, d).to(dtype).permute(2, 0, 1, 3)
    if layout == "sliced":
        return torch.randn(h, b, 2 * s, d + 3).to(dtype)[:, :, ::2, 1 : d + 1]
    return torch.randn(h, b, 1, d).to(dtype).expand(h, b, s, d)


def oracle(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, counts, and sums of magnitudes, in float64 with a plain index_add_ per head."""
    h, d = x.shape[0], x.shape[-1]
    sums = torch.zeros(h, num_codes, d, dtype=torch.float64)
    magnitudes = torch.zeros_like(sums)
    counts = torch.zeros(h, num_codes, dtype=torch.float64)
    for head in range(h):
        index = indices[head].flatten()
        rows = x[head].reshape(-1, d).double()[index >= 0]
        index = index[index >= 0]
        sums[head].index_add_(0, index, rows)
        magnitudes[head].index_add_(0, index, rows.abs())
        counts[head].index_add_(0, index, torch.ones(len(index), dtype=torch.float64))
    return sums, counts, magnitudes


def assert_sums(x: Tensor, indices: Tensor, num_codes: int, backend: str) -> None:
    """Within the bound of a chunked sum: a chunk adds at most CHUNK terms, then the chunks are added."""
    sums, counts = codebook_sum(x, indices, num_codes, backend)
    expected, expected_counts, magnitudes = oracle(x, indices, num_codes)
    assert sums.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert counts.dtype == torch.float32
    assert sums.is_contiguous()
    assert counts.is_contiguous()
    assert torch.equal(counts.double(), expected_counts)
    unit = 2.0**-53 if x.dtype == torch.float64 else 2.0**-24
    chunks = (expected_counts / CHUNK).ceil()[:, :, None]
    # The float64 oracle has an error of its own, far below the bound except for float64 input.
    own = expected_counts[:, :, None] * 2.0**-53
    assert ((sums.double() - expected).abs() <= ((CHUNK + chunks) * unit + own) * magnitudes).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("h", "b", "s", "d", "k"),
    [
        (1, 1, 1, 1, 1),
        (2, 3, 63, 5, 7),
        (1, 2, 257, 33, 3),
        (3, 100, 1, 8, 257),
        (1, 1, 2000, 17, 2),
        (1, 4, 25, 100, 63),
    ],
)
def test_agrees_with_float64(
    backend: str, layout: str, dtype: torch.dtype, h: int, b: int, s: int, d: int, k: int
) -> None:
    x = make_rows(layout, h, b, s, d, dtype)
    assert_sums(x, torch.randint(-1, k, (h, b, s)), k, backend)


@pytest.mark.parametrize("layout", ["rows", "channel_first"])
def test_one_code_owns_nine_rows_in_ten(backend: str, layout: str) -> None:
    x = make_rows(layout, 1, 3, 5000, 20, torch.float32)
    indices = torch.randint(0, 50, (1, 3, 5000)).where(torch.rand(1, 3, 5000) < 0.1, 7)
    assert_sums(x, indices, 50, backend)


@pytest.mark.parametrize("layout", ["rows", "channel_first"])
def test_more_codes_than_rows(backend: str, layout: str) -> None:
    x = make_rows(layout, 2, 1, 3, 9, torch.float32)
    indices = torch.tensor([[[9999, 0, 9999]], [[5, -1, 4]]])
    sums, counts = codebook_sum(x, indices, 10000, backend)
    assert counts.nonzero().tolist() == [[0, 0], [0, 9999], [1, 4], [1, 5]]
    assert torch.equal(sums[0, 9999], x[0, 0, 0] + x[0, 0, 2])
    assert torch.equal(sums[1, 4], x[1, 0, 2])
    assert sums.abs().sum(2).count_nonzero() == 4


def test_literal_table_with_an_empty_code_and_a_masked_row(backend: str) -> None:
    x = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0], [1000.0, 2000.0]])[None, None]
    sums, counts = codebook_sum(x, torch.tensor([[[2, 0, 2, -1]]]), 4, backend)
    assert sums.tolist() == [[[10.0, 20.0], [0.0, 0.0], [101.0, 202.0], [0.0, 0.0]]]
    assert counts.tolist() == [[1.0, 0.0, 2.0, 0.0]]


@pytest.mark.parametrize("layout", ["rows", "channel_first"])
def test_no_rows_give_zeros(backend: str, layout: str) -> None:
    x = make_rows(layout, 2, 1, 0, 3, torch.bfloat16)
    sums, counts = codebook_sum(x, torch.empty((2, 1, 0), dtype=torch.int64), 5, backend)
    assert torch.equal(sums, torch.zeros(2, 5, 3))
    assert torch.equal(counts, torch.zeros(2, 5))


@pytest.mark.parametrize("layout", ["rows", "channel_first"])
def test_all_rows_masked_give_zeros(backend: str, layout: str) -> None:
    x = make_rows(layout, 1, 2, 100, 3, torch.float32)
    sums, counts = codebook_sum(x, torch.full((1, 2, 100), -1), 1, backend)
    assert torch.equal(sums, torch.zeros(1, 1, 3))
    assert counts.tolist() == [[0.0]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads_and_any_run(backend: str, layout: str, dtype: torch.dtype) -> None:
    # Enough rows for the native counting sort to work in blocks; the reference runs the same code at any size.
    s = 9001 if backend == "native" else 701
    x = make_rows(layout, 1, 3, s, 19, dtype)
    indices = torch.randint(-1, 100, (1, 3, s)).where(torch.rand(1, 3, s) < 0.5, 3)
    results = []
    for count in (1, 2, 5, 2):
        with threads(count):
            results.append(codebook_sum(x, indices, 100, backend))
    for sums, counts in results[1:]:
        assert torch.equal(sums, results[0][0])
        assert torch.equal(counts, results[0][1])


def test_layout_does_not_change_a_bit(backend: str) -> None:
    x = torch.randn(2, 3, 700, 21)
    indices = torch.randint(-1, 3, (2, 3, 700))
    rows, _ = codebook_sum(x, indices, 3, backend)
    columns, _ = codebook_sum(x.transpose(2, 3).contiguous().transpose(2, 3), indices, 3, backend)
    assert torch.equal(rows, columns)


def test_rows_are_added_in_chunks_counted_from_the_first_row_of_the_code(backend: str) -> None:
    # 2^24 absorbs a 1 that is added to it; chunks of 256 ones survive when their sums are added to it.
    ones = torch.ones(1, 1, 3 * CHUNK, 1)
    ones[0, 0, 0] = 2.0**24
    indices = torch.zeros(1, 1, 3 * CHUNK, dtype=torch.int64)
    sums, _ = codebook_sum(ones, indices, 1, backend)
    assert sums.item() == 2.0**24 + 2 * CHUNK


@needs_cpu
@pytest.mark.parametrize("layout", ["rows", "channel_first"])
@pytest.mark.parametrize("wrong", [-2, 4, 2**40, -(2**63), 2**63 - 1])
def test_index_out_of_range_is_named(backend: str, layout: str, wrong: int) -> None:
    indices = torch.tensor([[[0, wrong, 3]]])
    with pytest.raises(ValueError, match=rf"codebook_sum: indices contains {wrong}, expected -1 or a code in \[0, 4\)"):
        codebook_sum(make_rows(layout, 1, 1, 3, 2, torch.float32), indices, 4, backend)


def test_non_finite_rows_stay_in_their_code(backend: str) -> None:
    x = torch.ones(1, 1, 4, 2)
    x[0, 0, 1, 0] = float("nan")
    x[0, 0, 3, 1] = float("inf")
    sums, counts = codebook_sum(x, torch.tensor([[[0, 1, -1, 2]]]), 3, backend)
    assert sums[0, 0].tolist() == [1.0, 1.0]
    assert sums[0, 1].isnan().tolist() == [True, False]
    assert sums[0, 2].tolist() == [1.0, float("inf")]
    assert counts.tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(backend: str, layout: str) -> None:
    x = make_rows(layout, 2, 3, 5, 4, torch.float16)
    torch.library.opcheck(torch.ops.vqkernels.codebook_sum.default, (x, torch.randint(-1, 7, (2, 3, 5)), 7, backend))


@given(
    h=st.integers(1, 3),
    b=st.integers(1, 4),
    s=st.integers(0, 70),
    d=st.integers(1, 40),
    k=st.integers(1, 300),
    order=st.permutations(range(4)),
    step=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_stride_and_dtype(
    h: int, b: int, s: int, d: int, k: int, order: list[int], step: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = (h, b, s, d)
    # Memory in the order `order`, its last axis spread out by `step`.
    stored = [sizes[axis] for axis in order]
    stored[-1] *= step
    x = torch.randn(stored, generator=generator).to(dtype)[..., ::step].permute([order.index(i) for i in range(4)])
    assert x.shape == sizes
    indices = torch.randint(-1, k, (h, b, s), generator=generator)
    results = []
    for backend in dispatch.BACKENDS:
        if backend.probe("cpu") is None:
            assert_sums(x, indices, k, backend.name)
            results.append(codebook_sum(x, indices, k, backend.name)[0])
    # Stronger than the contract, which lets backends differ in the last bits: on CPU these two do not.
    assert all(torch.equal(r, results[0]) for r in results)
