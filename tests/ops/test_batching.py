"""The ops under ``torch.vmap``: every sample's own result, in one call of the op."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import vqkernels
from vqkernels import dispatch, ops

H, B, S, D, K, V = 2, 3, 5, 4, 7, 6
X, OTHER = torch.randn(V, H, B, S, D), torch.randn(H, B, S, D)
CODES, ONE = torch.randn(V, H, K, D), torch.randn(H, K, D)
INDICES = torch.randint(-1, K, (V, H, B, S))
# op -> arguments with samples in dim 0 or without samples, and which of them have samples.
CALLS: dict[str, tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = {
    "rows": (ops.nearest, (X, ONE, "cosine"), (0, None, None)),
    "codes": (ops.nearest, (OTHER, CODES), (None, 0)),
    "rows and codes": (ops.nearest, (X, CODES, "dot"), (0, 0, None)),
    "levels": (ops.residual_nearest, (X, [ONE, ONE[:, :3]]), (0, [None, None])),
    "levels, some with samples": (ops.residual_nearest, (X, [ONE, CODES], True), (0, [None, 0], None)),
    "indices": (ops.lookup, (ONE, INDICES, True), (None, 0, None)),
    "looked-up codes": (ops.lookup, (CODES, INDICES[0], False, torch.float64), (0, None, None, None)),
    "summed rows": (ops.codebook_sum, (X, INDICES[0], K), (0, None, None)),
    "sums by indices": (ops.codebook_sum, (OTHER, INDICES, K), (None, 0, None)),
    "sums": (ops.codebook_sum, (X, INDICES, K), (0, 0, None)),
}


def moved(argument: Any, at: Any, dim: int) -> Any:
    if isinstance(at, list):
        return [moved(a, i, dim) for a, i in zip(argument, at, strict=True)]
    return argument if at is None else argument.movedim(0, dim).contiguous()


def taken(argument: Any, at: Any, sample: int) -> Any:
    if isinstance(at, list):
        return [taken(a, i, sample) for a, i in zip(argument, at, strict=True)]
    return argument if at is None else argument[sample]


def placed(at: Any, dim: int) -> Any:
    return [placed(i, dim) for i in at] if isinstance(at, list) else None if at is None else dim


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("name", CALLS)
def test_each_sample_is_what_it_is_alone(name: str, dim: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, arguments, at = CALLS[name]
    calls: list[str] = []
    call = dispatch.call
    monkeypatch.setattr(dispatch, "call", lambda name, *rest: (calls.append(name), call(name, *rest))[1])
    with warnings.catch_warnings(), vqkernels.use_backend(backend):
        warnings.simplefilter("error")
        given = [moved(a, i, dim) for a, i in zip(arguments, at, strict=True)]
        dims = tuple(placed(i, dim) for i in at)
        found = torch.vmap(op, in_dims=dims, out_dims=1)(*given)
        assert len(calls) == 1
        for sample in range(V):
            want = op(*(taken(a, i, sample) for a, i in zip(arguments, at, strict=True)))
            for part, expected in zip(*((t,) if isinstance(t, Tensor) else t for t in (found, want)), strict=True):
                assert torch.equal(part.select(1, sample), expected)


def test_two_vmaps() -> None:
    found = torch.vmap(torch.vmap(lambda x, c: ops.nearest(x, c)[0], (0, None)), (None, 0))(X, CODES)
    for i in range(V):
        assert torch.equal(found[i], torch.stack([ops.nearest(x, CODES[i])[0] for x in X]))


def test_moving_averages_refuse() -> None:
    state = torch.ones(H, K), torch.zeros(H, K, D), torch.zeros(H, K, D)
    with pytest.raises(RuntimeError, match="cannot follow its moving averages under torch"):
        torch.vmap(lambda counts: ops.ema_update(*state, counts, state[1], 0.9))(torch.ones(V, H, K))
    assert not state[1].any()
