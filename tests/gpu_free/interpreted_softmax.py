"""``soft_assign`` and ``soft_assign_grad`` on Triton's kernels, against the reference.

Run by test_triton_interpreter.py in Triton's interpreter, and by test_ptx_triton.py as compiled.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gpu_data import LAYOUTS, laid_out
from torch import Tensor

import vqkernels
from vqkernels import _triton, dispatch, ops
from vqkernels._triton import soft_scores

DTYPES = (torch.float32, torch.float16, *(() if _triton.interpreted() else (torch.bfloat16,)))
# H, N, K, D: one tile, several, and several with tails in rows, codes and dims; a gradient in two parts.
SIZES = ((1, 1, 1, 1), (2, 33, 9, 5), (1, 70, 130, 40), (1, 66, 70, 140))


def case(sizes: tuple[int, ...], dtype: torch.dtype, layout: str) -> list[Tensor]:
    """Rows, codes, and weights of which some are 0."""
    h, n, k, d = sizes
    x, codes = torch.randn(h, n, d).to(dtype), torch.randn(h, k, d).to(dtype)
    return [laid_out(x, layout), laid_out(codes, layout), (torch.rand(h, n) > 0.2) * torch.rand(h, n) / n]


def says(sizes: tuple[int, ...], dtype: torch.dtype, kind: str) -> list[Tensor | None]:
    """What a loss says of entropy, usage and soft codes, and the values of these."""
    h, n, k, d = sizes
    given: list[Tensor | None] = [torch.randn(h), torch.randn(h, k), torch.randn(h, n, d), torch.randn(h, k, d)]
    return [t.to(dtype) if t is not None and name in kind else None for t, name in zip(given, "eugg", strict=True)]


def agree(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        close = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[a.dtype]
        torch.testing.assert_close(a, b, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_soft_assign_agrees_with_the_reference(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    for layout in LAYOUTS if dtype == torch.float32 and sizes[3] < 100 else LAYOUTS[:1]:
        given = case(sizes, dtype, layout)
        for squared in (True, False):
            found = ops.soft_assign(*given, squared, 2.0 * sizes[3], "triton")
            agree(found, ops.soft_assign(*given, squared, 2.0 * sizes[3], "reference"))
            again = ops.soft_assign(*given, squared, 2.0 * sizes[3], "triton")
            assert all(a.equal(b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "kind"),
    [(s, kind) for s in SIZES for kind in ("e", "u", "g", "eug") if kind == "eug" or s[3] < 100],
    ids=str,
)
def test_soft_assign_grad_agrees_with_the_reference(sizes: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    for layout in LAYOUTS if dtype == torch.float32 and kind == "eug" and sizes[3] < 100 else LAYOUTS[:1]:
        given = [*case(sizes, dtype, layout), *says(sizes, dtype, kind)]
        for squared in (True, False):
            found = ops.soft_assign_grad(*given, squared, 2.0 * sizes[3], "triton")
            agree(found, ops.soft_assign_grad(*given, squared, 2.0 * sizes[3], "reference"))


def test_chunks_of_rows_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_scores, "LEAST_ROWS", 64)
    sizes = (2, 300, 3, 2)
    given = case(sizes, torch.float32, "rows")
    agree(ops.soft_assign(*given, True, 1.0, "triton"), ops.soft_assign(*given, True, 1.0, "reference"))
    given += says(sizes, torch.float32, "eug")
    expected = ops.soft_assign_grad(*given, True, 1.0, "reference")
    from vqkernels.ops.soft_assign_grad import triton as backend

    for elements, chunks in ((backend.CHUNK_ELEMENTS, 5), (1, 1)):
        monkeypatch.setattr(backend, "CHUNK_ELEMENTS", elements)
        tile = soft_scores.machine(given[0].device, 2).dcodes
        assert soft_scores.chunks(2, 300, 3, tile, max(1, elements // 12))[0] == chunks
        agree(ops.soft_assign_grad(*given, True, 1.0, "triton"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_splits_of_the_codes_add_up(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_scores, "LEAST_CODES", 64)
    sizes = (2, 3, 200, 5)
    assert soft_scores.splits(*sizes[:3], (soft_scores.machine(torch.device("cpu"), 5).scores,)) == (4, 64)
    given = case(sizes, dtype, "rows")
    # Rows whose largest scores lie in different splits, as far apart as exp can tell and further.
    given[1][:, 130:] *= 40.0
    agree(ops.soft_assign(*given, True, 1.0, "triton"), ops.soft_assign(*given, True, 1.0, "reference"))
    given += says(sizes, dtype, "eug")
    found = ops.soft_assign_grad(*given, True, 10.0, "triton")
    agree(found, ops.soft_assign_grad(*given, True, 10.0, "reference"))


def test_work_is_divided_by_the_sizes_alone() -> None:
    # Every code and every row once, little memory for many codes, and enough programs for few rows.
    for heads, rows, codes, dims in ((1, 64, 262144, 256), (1, 65536, 262144, 256), (8, 1000, 70, 8), (1, 1, 1, 1)):
        _, *tiles, tile = soft_scores.machine(torch.device("cpu"), dims)
        splits, each = soft_scores.splits(heads, rows, codes, tuple(tiles))
        assert (splits - 1) * each < codes <= splits * each
        assert splits * heads * rows * dims <= heads * rows * dims + 512 * 64 * dims
        chunks, chunk = soft_scores.chunks(heads, rows, codes, tile, max(1, 2**24 // (heads * codes * dims)))
        assert (chunks - 1) * chunk < rows <= chunks * chunk
        assert chunks == 1 or chunks * heads * codes * dims <= 2**24
    tile = soft_scores.Tile(64, 64, 16, 8, 2)
    assert soft_scores.splits(1, 64, 262144, (tile,)) == (256, 1024)
    assert soft_scores.chunks(1, 65536, 16384, tile, 4) == (1, 65536)
    assert soft_scores.chunks(1, 65536, 4096, tile) == (4, 16384)


def test_rows_of_weight_zero_and_scores_of_any_size() -> None:
    sizes = (1, 40, 70, 3)
    given = [*case(sizes, torch.float32, "rows"), *says(sizes, torch.float32, "eug")]
    given[2][:, ::3] = 0.0
    expected = [*ops.soft_assign(*given[:3], True, 0.5, "triton"), *ops.soft_assign_grad(*given, True, 0.5, "triton")]
    given[0][:, ::3], given[5][:, ::3] = math.nan, math.inf
    found = [*ops.soft_assign(*given[:3], True, 0.5, "triton"), *ops.soft_assign_grad(*given, True, 0.5, "triton")]
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    assert not found[2][:, ::3].any()
    for size in (1e-20, 1e10, 1e14):
        x, codes, weight = torch.randn(1, 40, 3) * size, torch.randn(1, 70, 3) * size, torch.ones(1, 40) / 40
        entropy, usage = ops.soft_assign(x, codes, weight, True, 0.01, "triton")
        agree((entropy, usage), ops.soft_assign(x, codes, weight, True, 0.01, "reference"))
        for t in ops.soft_assign_grad(x, codes, weight, *says(sizes, torch.float32, "eu"), True, 0.01, "triton"):
            assert t.isfinite().all()


def test_more_dims_than_pay_are_left_to_the_reference() -> None:
    x, codes, weight = torch.randn(1, 3, 513), torch.randn(1, 5, 513), torch.ones(1, 3)
    with pytest.raises(dispatch.Unsupported, match=r"x has 513 dims: beyond 512 scores that are made twice cost more"):
        ops.soft_assign(x, codes, weight, True, 1.0, "triton")
    x, codes = x[..., :257], codes[..., :257]
    agree(
        ops.soft_assign(x, codes, weight, True, 9.0, "triton"),
        ops.soft_assign(x, codes, weight, True, 9.0, "reference"),
    )
    with pytest.raises(dispatch.Unsupported, match=r"x has 257 dims: beyond 256 scores are made too often"):
        ops.soft_assign_grad(x, codes, weight, None, None, None, None, True, 1.0, "triton")


def test_no_rows_and_float64() -> None:
    x, codes, weight = torch.randn(2, 0, 3), torch.randn(2, 5, 3), torch.ones(2, 0)
    assert [t.tolist() for t in ops.soft_assign(x, codes, weight, True, 1.0, "triton")] == [[0.0] * 2, [[0.0] * 5] * 2]
    dx, dcodes = ops.soft_assign_grad(x, codes, weight, None, None, None, None, True, 1.0, "triton")
    assert dx.shape == x.shape
    assert dcodes.tolist() == torch.zeros(2, 5, 3).tolist()
    with pytest.raises(dispatch.Unsupported, match=r"x is torch\.float64, not one of float32, float16, bfloat16"):
        ops.soft_assign(x.double(), codes, weight, True, 1.0, "triton")
    with pytest.raises(dispatch.Unsupported, match=r"values is torch\.float64, not one of float32, float16, bfloat16"):
        ops.soft_assign_grad(x, codes, weight, None, None, x, codes.double(), True, 1.0, "triton")


@pytest.mark.parametrize(
    "options",
    [{"gradient": "softmax", "metric": "dot"}, {"batch_entropy_weight": 0.2, "entropy_temperature": 2.0}],
    ids=str,
)
def test_a_quantizer_learns(options: dict[str, Any]) -> None:
    results = []
    for name in ("triton", "reference"):
        torch.manual_seed(3)
        vq, z = vqkernels.VectorQuantizer(20, 6, init="normal", **options), torch.randn(2, 6, 12, requires_grad=True)
        with vqkernels.use_backend(name):
            out = vq(z)
            (out.quantized.square().sum() + out.loss).backward()
        results.append((out.loss, z.grad, vq.codebook.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
