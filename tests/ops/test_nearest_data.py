"""``nearest`` on data that breaks other searches: ties, offsets, tiny and huge values, outliers, NaN and infinity."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from shapes import check, search
from torch import Tensor

from vqkernels.ops.nearest import METRICS, nearest
from vqkernels.testing import oracle_nearest

Data = tuple[Tensor, Tensor]


def normal(rows: int, codes: int, dim: int, dtype: torch.dtype = torch.float32) -> Data:
    generator = torch.Generator().manual_seed(rows + codes + dim)
    return torch.randn(rows, dim, generator=generator, dtype=dtype), torch.randn(
        codes, dim, generator=generator, dtype=dtype
    )


def scaled(scale: float, dim: int, dtype: torch.dtype = torch.float32) -> Data:
    x, codes = normal(63, 100, dim, dtype)
    x[::3] = codes[:63][::3]
    return x * scale, codes * scale


def shifted(shift: float, dim: int, dtype: torch.dtype = torch.float32) -> Data:
    x, codes = normal(100, 257, dim)
    return (x + shift).to(dtype), (codes + shift).to(dtype)


def classic_init(rows: int, codes: int, dim: int) -> Data:
    """Codes at U(+-1/K): all at nearly the same distance of a row."""
    x, codebook = normal(rows, 1, dim)[0], torch.rand(codes, dim, generator=torch.Generator().manual_seed(codes))
    return x, (codebook * 2 - 1) / codes


def one_place() -> Data:
    x, codes = normal(63, 6000, 8)
    codes[500:5500] = codes[17]
    return torch.cat([x, codes[495:505]]), codes


def half_repeated() -> Data:
    x, codes = normal(100, 300, 16)
    codes[150:] = codes[:150].flip(0)
    x[::2] = codes[torch.arange(50) * 5]
    return x, codes


def grid(levels: int, dim: int) -> Data:
    generator = torch.Generator().manual_seed(dim)
    x, codes = (torch.randint(-levels, levels + 1, (n, dim), generator=generator).float() for n in (200, 500))
    return x / 2, codes


def neighbours(dtype: torch.dtype) -> Data:
    """Codes one unit in the last place apart, rows on and between them."""
    codes = torch.full((64, 1), 1.0, dtype=dtype)
    for i in range(1, 64):
        codes[i] = torch.nextafter(codes[i - 1], torch.tensor([2.0], dtype=dtype))
    codes = codes[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    return torch.cat([codes, codes - codes * 1e-3, codes + 1]), codes


def outlier_code() -> Data:
    x, codes = normal(100, 257, 32)
    codes[100] *= 1e6
    codes[200] *= 1e30
    return x, codes


def outlier_row() -> Data:
    x, codes = normal(100, 257, 32)
    x[3] *= 1e6
    x[50] *= 1e30
    x[51] *= 1e-30
    return x, codes


def zero_codes() -> Data:
    x, codes = normal(100, 50, 12)
    codes[[0, 7, 8, 49]] = 0
    x[::9] = 0
    x[1::9] = -codes.sum(0)  # mostly against every code: zeros win by "cosine"
    return x, codes


def clustered(noise: float, dim: int) -> Data:
    x, centres = normal(200, 20, dim)
    generator = torch.Generator().manual_seed(1)
    codes = centres.repeat(30, 1) + noise * torch.randn(600, dim, generator=generator)
    return centres.repeat(10, 1) + 10 * noise * x, codes


def all_magnitudes(dtype: torch.dtype, reach: int) -> Data:
    """Every row and every code at a magnitude of its own."""
    x, codes = normal(100, 200, 5, dtype)
    generator = torch.Generator().manual_seed(2)
    for value in (x, codes):
        power = torch.randint(-reach, reach + 1, (len(value), 1), generator=generator).to(dtype)
        value *= 10.0**power
    x[::4] = codes[:100][::4]
    return x, codes


def products_beyond_float32(row_scale: float, code_scale: float, dim: int) -> Data:
    """Products and sums overflow float32 though rows, codes and norms do not; terms of both signs nearly cancel."""
    x, codes = normal(60, 300, dim)
    generator = torch.Generator().manual_seed(6)
    codes[::2] *= 10.0 ** -torch.randint(0, 12, (150, 1), generator=generator)
    codes[1::4] -= (codes[1::4] @ x[0])[:, None] * x[0] / x[0].square().sum()  # orthogonal to the first row
    return x * row_scale, codes * code_scale


def largest(dtype: torch.dtype) -> Data:
    """x - e overflows in the dtype itself."""
    x, codes = normal(31, 65, 7)
    limit = torch.finfo(dtype).max
    return (x.sign() * limit).to(dtype), (codes.sign() * limit).to(dtype) * (codes.abs() > 0.5)


def signed_zeros() -> Data:
    x = torch.tensor([[0.0, -0.0], [-0.0, 0.0], [1.0, -0.0]])
    return x, torch.tensor([[-0.0, -0.0], [0.0, 0.0], [0.0, -0.0], [1.0, 0.0]])


def half_a_codebook_far_away() -> Data:
    x, codes = normal(100, 512, 24)
    codes[::2] += 1e4
    x[::5] += 1e4
    return x, codes


def codes_of_many_lengths(codes: int, dim: int) -> Data:
    """Sums divided by what a codec calls their usage, some of it next to nothing; codes of all lengths are repeated."""
    x, codebook = normal(150, codes, dim)
    generator = torch.Generator().manual_seed(7)
    usage = torch.empty(codes, 1).exponential_(generator=generator)
    usage[torch.randperm(codes, generator=generator)[: codes // 10]] = 0
    codebook /= usage.clamp(min=1e-5)
    third = codes // 3
    codebook[-third:] = codebook[:third].flip(0)
    x[::5] = codebook[torch.randint(codes, (30,), generator=generator)]
    return x, codebook


def few_short_codes() -> Data:
    x, codes = normal(100, 400, 24)
    codes[torch.arange(400) % 8 > 0] *= 1e5
    return x, codes


def beyond_float32() -> Data:
    """Codes that are equal in float32 and different in float64."""
    x, codes = normal(63, 1, 16, torch.float64)
    generator = torch.Generator().manual_seed(3)
    codes = codes + 1e-12 * torch.randn(200, 16, generator=generator, dtype=torch.float64)
    return codes[:63] + 1e-12 * x, codes


def a_length_beyond_float64() -> Data:
    """One code has an infinite length: a cosine of 0, or none at all (NaN) where the product overflows too.

    All other codes look the other way, so that a cosine of 0 would be the best.
    """
    x = 1 + 0.1 * torch.randn(70, 40, dtype=F64)
    x[::2] *= 4
    codes = -1 - 0.1 * torch.randn(20, 40, dtype=F64)
    codes[5] = 0
    codes[5, 3] = 1e308
    return x, codes


def near_ties(row_scale: float, code_scale: float) -> Data:
    """Codes that differ in the last bits of float64 only, half of them repeated; rows at another scale."""
    x, codes = normal(63, 1, 16, torch.float64)
    generator = torch.Generator().manual_seed(4)
    codes = codes * (1 + 2e-16 * torch.randint(3, (300, 16), generator=generator, dtype=torch.float64))
    return x * row_scale, codes[torch.arange(300) // 2] * code_scale


F64 = torch.float64
DATA: dict[str, Callable[[], Data]] = {
    "classic init of 16384 codes": lambda: classic_init(100, 16384, 256),
    "classic init of 1000 codes": lambda: classic_init(100, 1000, 63),
    "classic init of few dims": lambda: classic_init(100, 4000, 8),
    "identical codes": lambda: (normal(63, 1, 8)[0], normal(1, 1, 8)[1].expand(500, 8).contiguous()),
    "zero codebook": lambda: (normal(63, 1, 17)[0], torch.zeros(500, 17)),
    "zero rows and codes": lambda: (torch.zeros(17, 3), torch.zeros(33, 3)),
    "5000 codes at one place": one_place,
    "half of the codes repeated": half_repeated,
    "rows are codes": lambda: (normal(1, 257, 40)[1][torch.arange(100) * 2], normal(1, 257, 40)[1]),
    "grid of 5^4": lambda: grid(2, 4),
    "grid of 3^16": lambda: grid(1, 16),
    "grid of 3^64": lambda: grid(1, 64),
    "shift +3": lambda: shifted(3, 64),
    "shift +100": lambda: shifted(100, 64),
    "shift +100, few dims": lambda: shifted(100, 8),
    "shift +1e4": lambda: shifted(1e4, 33),
    "shift +100, bfloat16": lambda: shifted(100, 32, torch.bfloat16),
    "scale 1e-40": lambda: scaled(1e-40, 8),
    "scale 1e-40, many dims": lambda: scaled(1e-40, 100),
    "scale 1e-44": lambda: scaled(1e-44, 5),
    "scale 1e-30": lambda: scaled(1e-30, 64),
    "scale 1e-20": lambda: scaled(1e-20, 12),
    "scale 1e18": lambda: scaled(1e18, 33),
    "scale 1e30": lambda: scaled(1e30, 64),
    "scale 1e38": lambda: scaled(3e37, 9),
    "float64, scale 1e-160": lambda: scaled(1e-160, 9, F64),
    "float64, scale 1e-142": lambda: scaled(1e-142, 9, F64),
    "float64, scale 1e-200": lambda: scaled(1e-200, 9, F64),
    "float64, scale 1e-310": lambda: scaled(1e-310, 9, F64),
    "float64, scale 1e140": lambda: scaled(1e140, 9, F64),
    "float64, scale 1e160": lambda: scaled(1e160, 9, F64),
    "float64, scale 1e300": lambda: scaled(1e300, 9, F64),
    "float64, beyond float32": beyond_float32,
    "float16, denormals": lambda: tuple(v.half() for v in scaled(1e-7, 16)),  # type: ignore[dict-item,return-value]
    "largest float32": lambda: largest(torch.float32),
    "largest float64": lambda: largest(F64),
    "largest bfloat16": lambda: largest(torch.bfloat16),
    "largest float16": lambda: largest(torch.float16),
    "float32, all magnitudes": lambda: all_magnitudes(torch.float32, 37),
    "float64, all magnitudes": lambda: all_magnitudes(F64, 300),
    "products beyond float32": lambda: products_beyond_float32(1e30, 1e10, 2),
    "products beyond float32, more dims": lambda: products_beyond_float32(1e20, 1e18, 64),
    "products beyond float32, tiny rows": lambda: products_beyond_float32(1e-30, 1e17, 24),
    "products below float32": lambda: products_beyond_float32(1e-28, 1e-9, 24),
    "float64, near ties": lambda: near_ties(1, 1),
    "float64, near ties of tiny rows": lambda: near_ties(1e-200, 1),
    "float64, near ties of tiny codes": lambda: near_ties(1, 1e-200),
    "float64, near ties of huge rows": lambda: near_ties(1e120, 1),
    "float64, near ties of huge codes": lambda: near_ties(1, 1e120),
    "float64, near ties of products that underflow": lambda: near_ties(1e-155, 1e-155),
    "float64, near ties of huge rows and tiny codes": lambda: near_ties(1e200, 1e-120),
    "float64, a length beyond it": a_length_beyond_float64,
    "neighbouring float32": lambda: neighbours(torch.float32),
    "neighbouring float64": lambda: neighbours(F64),
    "an outlier among the codes": outlier_code,
    "an outlier among the rows": outlier_row,
    "zero codes": zero_codes,
    "tight clusters": lambda: clustered(1e-6, 16),
    "clusters": lambda: clustered(1e-3, 65),
    "signed zeros": signed_zeros,
    "half a codebook far away": half_a_codebook_far_away,
    "codes of many lengths": lambda: codes_of_many_lengths(1000, 40),
    "codes of many lengths, few dims": lambda: codes_of_many_lengths(9000, 5),
    "few short codes among long ones": few_short_codes,
}


@functools.cache
def prepared(name: str) -> Data:
    return DATA[name]()


@functools.cache
def answer(name: str, metric: str) -> Data:
    return oracle_nearest(*prepared(name), metric)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("metric", METRICS)
def test_every_isa_is_exact(isa: str, metric: str, name: str) -> None:
    check(*prepared(name), metric, "native", answer(name, metric))


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("metric", METRICS)
def test_a_few_rows_are_exact(isa: str, metric: str, name: str) -> None:
    """Searches of one to eight rows may take a path of their own."""
    x, codes = prepared(name)
    index, score = answer(name, metric)
    for begin, end in ((0, 1), (1, 3), (3, 6), (6, 10), (10, 18), (-7, None), (-1, None)):
        part = slice(begin, end)
        check(x[part], codes, metric, "native", (index[part], score[part]))


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("metric", METRICS)
def test_reference_is_exact(metric: str, name: str) -> None:
    check(*prepared(name), metric, "reference", answer(name, metric))


def test_heads_of_one_length_and_of_many(isa: str) -> None:
    """Each head has an order of its own."""
    x, codes = torch.randn(3, 1, 63, 24), torch.randn(3, 300, 24)
    codes[1, ::3] *= 1e5
    indices, score = nearest(x, codes, "l2", "exact", "native")
    for h in range(3):
        index, value = oracle_nearest(x[h, 0], codes[h], "l2")
        assert indices[h, 0].equal(index)
        assert score[h, 0].equal(value)


NAN, INF = float("nan"), float("inf")
BAD_ROWS = {
    "one NaN": [(5, 3, NAN)],
    "one infinity": [(5, 3, INF)],
    "both infinities": [(5, 0, INF), (5, 7, -INF)],
    "first, middle and last row": [(0, 0, NAN), (31, 1, INF), (62, 7, -INF)],
}
BAD_CODES = {
    "one NaN": [(7, 2, NAN)],
    "first code NaN": [(0, 0, NAN)],
    "one infinity": [(7, 2, INF)],
    "minus infinity": [(99, 7, -INF)],
    "first and last code": [(0, 1, INF), (99, 0, NAN)],
    "NaN and infinity": [(7, 2, NAN), (7, 3, INF), (8, 1, -INF)],
    "all NaN": [(k, k % 8, NAN) for k in range(100)],
    "all infinite": [(k, k % 8, -INF) for k in range(100)],
    "all but one": [(k, 3, NAN if k % 2 else INF) for k in range(100) if k != 61],
}


def damaged(value: Tensor, places: list[tuple[int, int, float]]) -> Tensor:
    value = value.clone()
    for row, dim, bad in places:
        value[row, dim] = bad
    return value


@pytest.mark.parametrize("bad", BAD_ROWS)
@pytest.mark.parametrize("metric", METRICS)
def test_bad_rows_leave_other_rows_alone(isa: str, metric: str, bad: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, codes = (value.to(dtype) for value in normal(63, 100, 8))
        broken = damaged(x, BAD_ROWS[bad])
        clean, clean_score = search(x, codes, metric)
        kept = broken.isfinite().all(1)
        for backend in ("native", "reference"):
            indices, score = search(broken, codes, metric, backend)
            assert indices[kept].equal(clean[kept])
            assert score[kept].equal(clean_score[kept])
            check(broken, codes, metric, backend)


@pytest.mark.parametrize("bad", BAD_CODES)
@pytest.mark.parametrize("metric", METRICS)
def test_bad_codes_never_win(isa: str, metric: str, bad: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, codes = (value.to(dtype) for value in normal(63, 100, 8))
        codes = damaged(codes, BAD_CODES[bad])
        finite = codes.isfinite().all(1)
        for backend in ("native", "reference"):
            check(x, codes, metric, backend)
            if metric != "dot" and finite.any():  # an infinite dot product is the largest
                assert finite[search(x, codes, metric, backend)[0]].all()


@pytest.mark.parametrize("metric", METRICS)
def test_bad_rows_meet_bad_codes(isa: str, metric: str) -> None:
    for dim in (1, 8, 40):
        x, codes = normal(63, 100, dim)
        for value in (x, codes):
            value[5, 0], value[6, -1], value[7, 0], value[8] = INF, -INF, NAN, INF
        for backend in ("native", "reference"):
            check(x, codes, metric, backend)


def test_where_nothing_can_win_the_answer_is_code_0(isa: str) -> None:
    x = torch.tensor([[NAN, 1.0], [INF, 0.0], [2.0, 0.0]])
    codes = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    for backend in ("native", "reference"):
        indices, score = search(x, codes, "l2", backend)
        assert indices.tolist() == [0, 0, 0]
        assert torch.equal(score.isnan(), torch.tensor([True, False, False]))
        assert score[1:].tolist() == [INF, 1.0]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 20])
def test_sums_that_overflow_float32_neither_win_nor_lose(isa: str, rows: int) -> None:
    """In float32 the first code has the value +inf (or -inf), in truth the second is better (or worse)."""
    ones = torch.ones(16)
    for repeat in (1, 16):  # one vector, or one step after the other into the same sums
        first = (3e19 * torch.tensor([1, 1, -1, -1.04])).repeat_interleave(repeat)
        x, codes = torch.full((rows, 4 * repeat), 1e19), torch.stack([first, 1e15 * ones.repeat(16)[: 4 * repeat]])
        assert search(x, codes, "dot")[0].tolist() == [1] * rows
        assert search(x, -codes, "dot")[0].tolist() == [0] * rows
    x, codes = torch.tensor([[1e30, 0.0]]).expand(rows, 2), torch.tensor([[1e10, 1e10], [1.0, 0.1]])
    assert search(x, codes, "cosine")[0].tolist() == [1] * rows
    assert search(-x, codes, "cosine")[0].tolist() == [0] * rows


def test_more_pairs_than_an_int32_counts() -> None:
    """N*K = 2.4e9; in one dim the answer is a neighbour in the sorted codes, found without looking at every pair."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(2**22, (40000,), generator=generator) / 2**10
    codes = torch.randint(2**20, (60000,), generator=generator) / 2**8
    ordered, first = codes.double().sort(stable=True)
    keep = torch.cat([torch.tensor([True]), ordered[1:] != ordered[:-1]])  # of equal codes the lowest index
    ordered, first = ordered[keep], first[keep]
    right = torch.searchsorted(ordered, x.double()).clamp(1, len(ordered) - 1)
    near, far = (x - ordered[right - 1]).abs(), (x - ordered[right]).abs()
    tie = torch.minimum(first[right - 1], first[right])
    index = torch.where(near < far, first[right - 1], torch.where(far < near, first[right], tie))
    assert (near == far).sum() > 100
    indices, score = search(x[:, None], codes[:, None])
    assert indices.equal(index)
    assert score.equal(torch.minimum(near, far).square().float())
