"""``nearest`` against the float64 oracle, on every backend and every instruction set."""

from __future__ import annotations

import pytest
import torch

from vqkernels.ops.nearest import METRICS, nearest
from vqkernels.testing import assert_nearest

SHAPES = [(0, 3, 2), (1, 1, 1), (3, 2, 5), (63, 17, 8), (100, 65, 33), (257, 257, 4), (33, 1000, 64), (7, 100, 257)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def check(x: torch.Tensor, codes: torch.Tensor, metric: str, backend: str) -> None:
    indices, score = nearest(x[None, None], codes[None], metric, "exact", backend)
    assert_nearest(indices[0, 0], x, codes, metric, score[0, 0])


def sweep(metric: str, dtype: torch.dtype, backend: str) -> None:
    for n, k, d in SHAPES:
        x, codes = torch.randn(n, d).to(dtype), torch.randn(k, d).to(dtype)
        check(x, codes, metric, backend)
        check(x + 100, codes + 100, metric, backend)
        check(x, codes[torch.arange(k) // 2], metric, backend)
        check(x.round(), codes.round(), metric, backend)
        check(x, codes * 0, metric, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_reference_equals_the_oracle(metric: str, dtype: torch.dtype) -> None:
    sweep(metric, dtype, "reference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_every_isa_equals_the_oracle(isa: str, metric: str, dtype: torch.dtype) -> None:
    sweep(metric, dtype, "native")


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30])
@pytest.mark.parametrize("metric", METRICS)
def test_extreme_scales(isa: str, metric: str, scale: float) -> None:
    check(torch.randn(63, 8) * scale, torch.randn(100, 8) * scale, metric, "native")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("metric", METRICS)
def test_a_bad_row_or_code_leaves_others_alone(isa: str, metric: str, bad: float) -> None:
    x, codes = torch.randn(63, 8), torch.randn(100, 8)
    x[5, 3] = codes[7, 2] = bad
    check(x, codes, metric, "native")
