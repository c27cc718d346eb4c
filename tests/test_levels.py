"""``vqkernels.residual_nearest``: rows of any shape, codebooks as a tensor or a list, errors that say what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vqkernels
from vqkernels.testing import oracle_nearest


def codebooks(*sizes: int, dim: int = 6) -> list[Tensor]:
    return [torch.randn(k, dim) * 0.7**q for q, k in enumerate(sizes)]


@pytest.mark.parametrize("shape", [(6,), (1, 6), (50, 6), (3, 21, 6), (2, 3, 5, 6), (0, 6)])
def test_each_level_is_exact_for_what_was_left_over(backend: str, shape: tuple[int, ...]) -> None:
    x, codes = torch.randn(shape), codebooks(40, 1, 33)
    out = vqkernels.residual_nearest(x, codes, backend=backend)
    assert out.indices.shape == out.score.shape == (*shape[:-1], 3)
    residual, total = x.clone(), torch.zeros_like(x)
    for q, codebook in enumerate(codes):
        assert out.indices[..., q].reshape(-1).equal(oracle_nearest(residual.reshape(-1, 6), codebook)[0])
        chosen = codebook[out.indices[..., q]]
        distance = (residual.double() - chosen.double()).square().sum(-1)
        torch.testing.assert_close(out.score[..., q], distance.float(), rtol=2e-7, atol=0)
        residual, total = residual - chosen, total + chosen
    assert out.quantized.equal(total)


def test_a_tensor_of_codebooks_is_a_list_of_them() -> None:
    x, stacked = torch.randn(30, 6), torch.stack(codebooks(9, 9, 9))
    for a, b in zip(vqkernels.residual_nearest(x, stacked), vqkernels.residual_nearest(x, list(stacked)), strict=True):
        assert a.equal(b)


def test_a_feature_map_is_read_and_written_where_it_is() -> None:
    z, codes = torch.randn(2, 6, 5, 7), codebooks(20, 20)
    out = vqkernels.residual_nearest(z.movedim(1, -1), codes)
    assert out.quantized.movedim(-1, 1).is_contiguous()
    assert out.indices.movedim(-1, 0).is_contiguous()
    plain = vqkernels.residual_nearest(z.movedim(1, -1).contiguous(), codes)
    assert out.indices.equal(plain.indices)
    assert out.quantized.equal(plain.quantized)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_sums_are_float64_or_float32(dtype: torch.dtype) -> None:
    out = vqkernels.residual_nearest(torch.randn(9, 6).to(dtype), codebooks(20, 20))
    assert out.quantized.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.score.dtype == torch.float32


def test_results_are_detached() -> None:
    x, codes = torch.randn(9, 6, requires_grad=True), [c.requires_grad_() for c in codebooks(20, 20)]
    assert not any(result.requires_grad for result in vqkernels.residual_nearest(x, codes))


BOOK = torch.randn(4, 6)
WRONG: list[tuple[Any, Any, type[Exception], str]] = [
    (torch.randn(3, 6), [], ValueError, "codebooks is empty; expected one"),
    (torch.randn(3, 6), BOOK, ValueError, r"codebooks has shape \(4, 6\); expected \(Q, K, D\)"),
    (torch.randn(3, 6), [BOOK, BOOK[None]], ValueError, r"codebooks\[1\] has shape \(1, 4, 6\); expected \(K, D\)"),
    (torch.randn(3, 6), [BOOK, BOOK[:, :5]], ValueError, r"x has shape \(3, 6\); expected \(\.\.\., 5\)"),
    (torch.randn(3, 6), [BOOK, BOOK[:0]], ValueError, r"codebooks\[1\] is empty"),
    (torch.randn(3, 6), [BOOK.long()], TypeError, r"codebooks\[0\] has dtype torch.int64"),
    (torch.randn(3, 6), None, TypeError, "codebooks is a NoneType; expected"),
    (torch.randn(3, 6), [BOOK.to_sparse()], TypeError, r"codebooks\[0\] is a sparse_coo tensor"),
    (torch.arange(6), [BOOK], TypeError, "x has dtype torch.int64"),
    ([1.0], [BOOK], TypeError, "x is a list"),
]


@pytest.mark.parametrize(("x", "codes", "error", "message"), WRONG)
def test_errors_name_the_argument(x: Any, codes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vqkernels.residual_nearest(x, codes)


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        vqkernels.residual_nearest(torch.randn(3, 6), [BOOK], backend="cuda")


def test_explain_says_what_runs() -> None:
    text = vqkernels.explain("residual_nearest", torch.randn(3, 6), [BOOK, BOOK], backend="reference")
    assert text.startswith("residual_nearest on cpu: reference\n")
    assert "residual_nearest on cpu: " in vqkernels.explain("residual_nearest", torch.randn(3, 6), BOOK[None])


def test_compiles_without_graph_breaks() -> None:
    x, codes = torch.randn(30, 6), codebooks(20, 20)
    compiled = torch.compile(vqkernels.residual_nearest, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, codes), vqkernels.residual_nearest(x, codes), strict=True):
        assert a.equal(b)
