"""The Triton backend as compiled for a GPU: what a compiler makes a difference to, and no interpreter.

Run on the PTX machine: by test_ptx_triton.py what is not slow, all of it by `make emulate`. Vectors of 16 bytes where
pointers and strides allow them and single elements where they do not, tiles as shipped, dtypes with their rounding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_checks import EXACT, SEARCHES, WITHOUT_CUDA, Place, given, run, same
from gpu_data import Search, data
from ptx_machine import SEEDS, set_seed
from torch import Tensor

from vqkernels import dispatch
from vqkernels.ops.nearest import METRICS
from vqkernels.ops.nearest import triton as backend
from vqkernels.ops.residual_nearest import triton as residual

CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Dtypes, and elements by which tensors miss the alignment that a fresh one has.
KINDS = ((torch.float32, 0), (torch.float32, 1), (torch.bfloat16, 0), (torch.float16, 1), (torch.float64, 0))
# N, K, D, metric, dtypes of rows and codes: every configuration that is shipped, the last ones with fewer rows.
SEARCH = (
    (130, 70, 3, "l2", torch.float32, torch.float32),
    (130, 70, 8, "cosine", torch.bfloat16, torch.float32),
    (130, 140, 32, "l2", torch.float16, torch.float16),
    (130, 70, 64, "dot", torch.float32, torch.bfloat16),
    (130, 140, 100, "l2", torch.bfloat16, torch.bfloat16),
    (140, 260, 256, "l2", torch.float32, torch.float32),
    (50, 140, 256, "cosine", torch.bfloat16, torch.float32),
    (8, 300, 256, "dot", torch.float16, torch.float32),
)
# Quick ones: tiles of 128 and of 16 rows.
QUICK = (SEARCH[1], SEARCH[7])
search = Search("triton")


def moved(value: Any, by: int) -> Any:
    """A tensor (or each of a list) at an address that many elements behind an aligned one."""
    if isinstance(value, list):
        return [moved(v, by) for v in value]
    if not isinstance(value, Tensor):
        return value
    storage = torch.empty(value.untyped_storage().nbytes() // value.element_size() + by, dtype=value.dtype)
    return storage[by:].as_strided(value.shape, value.stride(), by).copy_(value)


def converted(value: Any, dtype: torch.dtype, dim: int) -> Any:
    """Rows and codes in the dtype."""
    if isinstance(value, list):
        return [converted(v, dtype, dim) for v in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.dim() > 2 and value.shape[-1] == dim else value


@pytest.mark.parametrize(
    ("dtype", "by"),
    [pytest.param(*kind, marks=pytest.mark.slow if kind == (torch.float32, 1) else ()) for kind in KINDS],
    ids=str,
)
@pytest.mark.parametrize("op", dispatch.OPS)
def test_op(op: str, dtype: torch.dtype, by: int, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = op in SEARCHES or op in WITHOUT_CUDA
    if (op == "ema_update" and dtype != torch.float32) or (narrow and dtype == torch.float64):
        pytest.skip("not of the Triton backend")
    sizes = (1, 2, 150, 32, 3) if op == "codebook_sum" else (2, 1, 5, 32, 37)
    # By the kernels for a few rows and by those for many.
    for many in (False, True) if op in SEARCHES and dtype != torch.float32 else (False,):
        monkeypatch.setattr(backend, "FEW_ROWS", 0 if many else 2048)
        monkeypatch.setattr(residual, "FEW_WORK", 0 if many else 2**24)
        every = op == "quantize_grad" or (op == "soft_assign_grad" and dtype == torch.float32)
        for seed in (0, 1, 2) if every else (by,):
            arguments = converted(given(op, Place("reference"), seed, sizes), dtype, 32)
            if op == "lookup" and dtype == torch.float32:
                arguments[3] = torch.bfloat16  # rounded to nearest
            found = run(op, moved(arguments, by), "triton")
            expected = run(op, arguments, "reference")
            assert op not in EXACT or same(found, expected)
            for a, b in zip(found, expected, strict=True):
                close = CLOSE[dtype if a.dtype == dtype else torch.float32]
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b, rtol=close, atol=close)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow, id=str(case[:3])) for case in SEARCH]
)
def test_search_as_shipped(case: tuple[Any, ...]) -> None:
    n, k, d, metric, x_dtype, e_dtype = case
    x, codes = data(n, k, d)
    search.check(x.to(x_dtype), codes.to(e_dtype), metric)


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("few", [0, 2048])
def test_orders_of_execution_do_not_matter(few: int, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "FEW_ROWS", few)
    x, codes = data(70, 140, 40)
    found = []
    for seed in SEEDS:
        set_seed(seed)
        search.check(x, codes, metric)
        found.append(search(x, codes, metric, "fast"))
    assert all(same(list(a), list(found[0])) for a in found)
