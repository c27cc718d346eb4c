"""``nearest`` does not care how inputs lie in memory, how rows are batched, or how many threads run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapes import DTYPES, ISAS, search
from torch import Tensor

import vqkernels
from vqkernels.ops.nearest import METRICS, nearest
from vqkernels.ops.nearest.native import clear_cache
from vqkernels.testing import assert_nearest

BACKENDS = ("native", "reference") if ISAS else ("reference",)


def check(x: Tensor, codebook: Tensor, metric: str, backend: str) -> None:
    """(H, B, S, D) and (H, K, D) of any strides: every row equals the oracle's."""
    indices, score = nearest(x, codebook, metric, "exact", backend)
    for h in range(x.shape[0]):
        rows = x[h].reshape(-1, x.shape[-1])
        assert_nearest(indices[h].flatten(), rows, codebook[h], metric, score[h].flatten())


# (B, S, D): S below, above and between multiples of 16 rows, so that tiles and blocks cross images.
MAPS = [
    (1, 1, 3),
    (3, 7, 8),
    (5, 15, 17),
    (2, 37, 32),
    (3, 63, 65),
    (1, 100, 100),
    (40, 9, 4),
    (2, 257, 12),
    (1, 16, 16),
]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", MAPS, ids=str)
def test_channel_first_maps_are_read_in_place(isa: str, size: tuple[int, int, int], metric: str) -> None:
    b, s, d = size
    for dtype in DTYPES:
        for heads in (1, 2):
            x = torch.randn(b, heads, d, s).to(dtype).permute(1, 0, 3, 2)
            codes = torch.randn(heads, 47, d)
            x[:, :, ::3] = codes[:, :1, None].to(dtype)
            for backend in BACKENDS:
                check(x, codes, metric, backend)


def strided() -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """How inputs may lie in memory; H = 2, D = 9."""
    return {
        "compact": lambda: (torch.randn(2, 3, 21, 9), torch.randn(2, 33, 9)),
        "transposed codebook": lambda: (torch.randn(2, 3, 21, 9), torch.randn(2, 9, 33).mT),
        "heads inside of a row": lambda: (
            torch.randn(3, 21, 2, 9).permute(2, 0, 1, 3),
            torch.randn(33, 2, 9).transpose(0, 1),
        ),
        "every second dim": lambda: (torch.randn(2, 3, 21, 18)[..., ::2], torch.randn(2, 33, 18)[..., 1::2]),
        "every third row": lambda: (torch.randn(2, 3, 63, 9)[:, :, ::3], torch.randn(2, 99, 9)[:, ::3]),
        "an odd offset": lambda: (torch.randn(2, 3, 22, 10)[:, :, 1:, 1:], torch.randn(2, 34, 10)[:, 1:, 1:]),
        "one image for all": lambda: (torch.randn(2, 1, 21, 9).expand(2, 3, 21, 9), torch.randn(2, 33, 9)),
        "one row for all": lambda: (torch.randn(2, 3, 1, 9).expand(2, 3, 21, 9), torch.randn(2, 33, 9)),
        "one value for all dims": lambda: (
            torch.randn(2, 3, 21, 1).expand(2, 3, 21, 9),
            torch.randn(2, 33, 1).expand(2, 33, 9),
        ),
        "one number": lambda: (torch.randn(1, 1, 1, 1).expand(2, 3, 21, 9), torch.randn(1, 1, 1).expand(2, 33, 9)),
        "one codebook for all heads": lambda: (torch.randn(2, 3, 21, 9), torch.randn(1, 33, 9).expand(2, 33, 9)),
        "one code for all": lambda: (torch.randn(2, 3, 21, 9), torch.randn(2, 1, 9).expand(2, 33, 9)),
        "dims outermost": lambda: (
            torch.randn(9, 3, 21, 2).permute(3, 1, 2, 0),
            torch.randn(9, 33, 2).permute(2, 1, 0),
        ),
    }


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", strided())
def test_any_strides(isa: str, name: str, metric: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, codes = strided()[name]()
        wide_x, wide_codes = x.to(dtype), codes.to(dtype)  # keeps strides of dense views, not of expanded ones
        for backend in BACKENDS:
            check(wide_x, wide_codes, metric, backend)
            check(x, codes, metric, backend)


@pytest.mark.parametrize("metric", METRICS)
def test_heads_are_searched_apart(isa: str, metric: str) -> None:
    for heads, b, s, k, d in ((3, 2, 50, 100, 12), (2, 1, 300, 65, 3), (3, 1, 1, 1, 1), (2, 3, 7, 8193, 5)):
        x, codes = torch.randn(heads, b, s, d), torch.randn(heads, k, d)
        together = nearest(x, codes, metric, "exact", "native")
        for h in range(heads):
            alone = nearest(x[h : h + 1], codes[h : h + 1], metric, "exact", "native")
            assert together[0][h].equal(alone[0][0])
            assert together[1][h].equal(alone[1][0])
        check(x, codes, metric, "native")


@pytest.mark.parametrize("metric", METRICS)
def test_inputs_that_require_grad(backend: str, metric: str) -> None:
    x, codes = torch.randn(63, 5), torch.randn(17, 5)
    plain = vqkernels.nearest(x, codes, metric=metric, backend=backend)
    for x_grad, codes_grad in ((True, False), (False, True), (True, True)):
        found = vqkernels.nearest(
            x.clone().requires_grad_(x_grad), codes.clone().requires_grad_(codes_grad), metric=metric, backend=backend
        )
        assert found[0].equal(plain[0])
        assert found[1].equal(plain[1])
        assert not found[0].requires_grad


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Few rows and many codes are split over threads by codes: (1 to 5) x 20000.
THREADED = [(1, 20000, 8), (2, 20000, 64), (3, 20000, 3), (5, 20000, 33), (17, 8193, 12), (700, 257, 20), (2000, 63, 8)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", THREADED, ids=str)
def test_any_number_of_threads_gives_the_same_bits(
    isa: str, threads: Callable[[int], None], size: tuple[int, int, int], metric: str
) -> None:
    n, k, d = size
    x, codes = torch.randn(n, d), torch.randn(k, d)
    codes[k // 2 :] = codes[: k - k // 2].flip(0)  # ties between what different threads look at
    threads(1)
    index, value = search(x, codes, metric)
    for count in (2, 3, 7):
        threads(count)
        clear_cache()  # packing is threaded too
        indices, score = search(x, codes, metric)
        assert indices.equal(index)
        assert score.equal(value)
    threads(1)
    assert_nearest(index, x, codes, metric, value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_reference_and_native_agree_for_any_number_of_threads(
    threads: Callable[[int], None], metric: str, backend: str
) -> None:
    x, codes = torch.randn(257, 17), torch.randn(1000, 17)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(search(x, codes, metric, backend))
    for indices, score in found:
        assert indices.equal(found[0][0])
        assert score.equal(found[0][1])
    assert_nearest(found[0][0], x, codes, metric, found[0][1])


def splits(total: int) -> list[list[int]]:
    return [[size] * (total // size) + [total % size] * (total % size > 0) for size in (1, 7, 100)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("metric", METRICS)
def test_any_batch_split_gives_the_same_bits(isa: str, metric: str, dtype: torch.dtype) -> None:
    for d in (5, 33):
        x, codes = torch.randn(257, d).to(dtype), torch.randn(300, d)
        index, value = search(x, codes, metric)
        assert_nearest(index, x, codes, metric, value)
        for sizes in splits(257):
            for backend in BACKENDS if sizes[0] > 1 else ("native",):
                parts = [search(part, codes, metric, backend) for part in x.split(sizes)]
                assert torch.cat([p[0] for p in parts]).equal(index)
                assert torch.cat([p[1] for p in parts]).equal(value)


@pytest.mark.parametrize("metric", METRICS)
def test_order_of_rows_and_codes_does_not_matter(isa: str, metric: str) -> None:
    x, codes = torch.randn(200, 24), torch.randn(500, 24)
    index, value = search(x, codes, metric)
    rows, places = torch.randperm(200), torch.randperm(500)
    moved, score = search(x[rows], codes[places], metric)
    assert places[moved].equal(index[rows])
    assert score.equal(value[rows])


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    heads=st.integers(1, 3),
    b=st.integers(0, 4),
    s=st.integers(0, 70),
    k=st.integers(1, 150),
    d=st.integers(1, 70),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    metric=st.sampled_from(METRICS),
    x_order=st.permutations(range(4)),
    codes_order=st.permutations(range(3)),
    step=st.integers(1, 3),
    levels=st.sampled_from([None, 1, 3]),
    scale=st.sampled_from([1.0, 1e-3, 100.0]),
    isa=st.sampled_from(ISAS or ("scalar",)),
)
def test_random_shapes_strides_and_dtypes(
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    heads: int,
    b: int,
    s: int,
    k: int,
    d: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    metric: str,
    x_order: list[int],
    codes_order: list[int],
    step: int,
    levels: int | None,
    scale: float,
    isa: str,
) -> None:
    """Values on a coarse grid (``levels``) tie all the time; ``step`` > 1 leaves gaps in memory."""

    def values(shape: tuple[int, ...], order: list[int], dtype: torch.dtype) -> Tensor:
        # Laid out in the given order of dims, innermost last, with gaps.
        inverse = [order.index(i) for i in range(len(order))]
        laid = torch.randn([shape[i] * (step if i == order[-1] else 1) for i in order], generator=generator)
        value = (laid if levels is None else (laid * levels).round()) * scale
        return value.to(dtype)[..., ::step].permute(inverse)

    generator = torch.Generator().manual_seed(seed)
    x, codes = values((heads, b, s, d), x_order, dtypes[0]), values((heads, k, d), codes_order, dtypes[1])
    assert x.shape == (heads, b, s, d)
    assert codes.shape == (heads, k, d)
    monkeypatch.setenv("VQKERNELS_ISA", isa)
    for backend in BACKENDS:
        check(x, codes, metric, backend)


@pytest.mark.parametrize("metric", METRICS)
def test_one_to_nine_rows_equal_the_oracle_at_the_edges_of_vectors(isa: str, metric: str) -> None:
    """Up to eight rows are searched without packing: codes and dims need not fill a vector, sums may overflow."""
    for k, d in ((1, 1), (3, 2), (15, 3), (16, 4), (17, 8), (31, 15), (33, 17), (257, 33), (1100, 31)):
        codes, rows = torch.randn(k, d), torch.randn(9, d)
        codes[k // 2] = codes[-1]  # a tie
        rows[4] = codes[-1]
        rows[5:7] *= torch.tensor([[1e19], [1e-25]])
        if k > 3:
            codes[0] *= 2e19
            codes[1] *= 1e-30
            codes[2] = 0
        for n in range(1, 10):
            part = rows[9 - n :]
            index, score = search(part, codes, metric)
            assert_nearest(index, part, codes, metric, score)
