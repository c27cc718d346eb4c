"""The shapes that ``nearest`` is tested on, with inputs and exact answers computed once per session, and how to search.

Called by tests/ops/test_nearest*.py.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from vqkernels import _native
from vqkernels.ops.nearest import nearest
from vqkernels.testing import assert_nearest, oracle_nearest

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ISAS = tuple(_native.supported()) if _native.unavailable() is None else ()


@dataclass(frozen=True)
class Case:
    """N rows, K codes, D dims."""

    n: int
    k: int
    d: int

    def __str__(self) -> str:
        return f"{self.n}x{self.k}x{self.d}"


# Every D around the widths of vectors and tiles (4, 8, 16, 32 dims), every K around theirs (16, 32, 64 codes; groups of
# several blocks beyond 8192), every N around row tiles (8 to 48) and blocks of rows (192, 240, 256).
CASES = tuple(
    Case(*sizes)
    for sizes in (
        (0, 3, 2),
        (0, 1, 1),
        (1, 1, 1),
        (1, 1, 768),
        (5, 1, 12),
        (1, 2, 3),
        (2, 3, 1),
        (3, 7, 2),
        (7, 3, 16),
        (8, 15, 4),
        (9, 16, 5),
        (15, 17, 7),
        (16, 16, 16),
        (17, 31, 8),
        (23, 32, 9),
        (24, 33, 10),
        (25, 63, 11),
        (31, 64, 12),
        (32, 65, 15),
        (33, 100, 17),
        (47, 127, 31),
        (48, 128, 32),
        (49, 257, 33),
        (63, 500, 63),
        (64, 1000, 64),
        (65, 1024, 65),
        (100, 129, 100),
        (127, 255, 128),
        (191, 100, 24),
        (192, 64, 40),
        (193, 33, 48),
        (239, 47, 13),
        (240, 48, 6),
        (241, 49, 20),
        (255, 95, 3),
        (256, 96, 1),
        (257, 97, 2),
        (300, 2049, 8),
        (100, 1025, 200),
        (33, 500, 256),
        (63, 257, 257),
        (17, 1000, 512),
        (7, 300, 768),
        (3, 4096, 64),
        (130, 8193, 4),
        (20, 8193, 16),
        (50, 20000, 3),
        (3, 20000, 11),
        (1, 16385, 33),
        (2000, 100, 10),
        (5000, 3, 8),
        (1000, 500, 14),
    )
)


@functools.cache
def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (N, D) and codebook (K, D); every fourth row lies on a code or halfway between two."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    x = torch.randn(case.n, case.d, generator=generator)
    codes = torch.randn(case.k, case.d, generator=generator)
    first, second = torch.randint(case.k, (2, case.n), generator=generator)
    x[1::4] = codes[first[1::4]]
    x[3::8] = (codes[first[3::8]] + codes[second[3::8]]) / 2
    return x.to(dtype), codes.to(dtype)


@functools.cache
def expected(case: Case, metric: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The oracle's indices (N,) and scores (N,)."""
    return oracle_nearest(*inputs(case, dtype), metric)


def search(
    x: Tensor, codes: Tensor, metric: str = "l2", backend: str = "native", precision: str = "exact"
) -> tuple[Tensor, Tensor]:
    """(N, D) and (K, D) to indices and scores (N,)."""
    indices, score = nearest(x[None, None], codes[None], metric, precision, backend)
    return indices[0, 0], score[0, 0]


def check(x: Tensor, codes: Tensor, metric: str, backend: str, answer: tuple[Tensor, Tensor] | None = None) -> None:
    """Assert that all rows equal the oracle's ``answer``: the index, and the bits of the score but for -0 and NaN."""
    indices, score = search(x, codes, metric, backend)
    index, value = oracle_nearest(x, codes, metric) if answer is None else answer
    if not (indices.equal(index) and score.view(torch.int32).equal(value.view(torch.int32))):
        assert_nearest(indices, x, codes, metric, score)  # says what differs
