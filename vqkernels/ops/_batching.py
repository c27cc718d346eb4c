"""The ops under ``torch.vmap``, in one call: samples become rows, or heads where every sample has codes of its own.

Called by torch. Without a rule it calls an op once per sample, and warns: the two ops behind losses and their gradients
have none, because inside of ``torch.func`` these are plain torch (:mod:`vqkernels._gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vqkernels.ops import _register
from vqkernels.ops.codebook_sum import codebook_sum
from vqkernels.ops.ema_update import ema_update
from vqkernels.ops.lookup import lookup
from vqkernels.ops.nearest import nearest
from vqkernels.ops.residual_nearest import residual_nearest


class _Samples:
    """V samples laid along the rows' dim B (``place`` 1), or along the heads' dim H (``place`` 0).

    Args:
        size: V.
        codes_at: in which dim a codebook has its samples, ``None`` for one codebook in all of them.
    """

    def __init__(self, size: int, *codes_at: int | None) -> None:
        self.size = size
        self.place = 1 if all(at is None for at in codes_at) else 0

    def rows(self, x: Tensor, at: int | None) -> Tensor:
        """(H, B, S, ...) with V in dim ``at`` as (H, V B, S, ...) or (V H, B, S, ...); a view for H = 1."""
        return self._laid(x, at, self.place)

    def codes(self, codebook: Tensor, at: int | None) -> Tensor:
        """(H, K, ...) with V in dim ``at`` as it is where there is no V, or as (V H, K, ...)."""
        return codebook if self.place == 1 else self._laid(codebook, at, 0)

    def back(self, x: Tensor, before: int = 0) -> Tensor:
        """What :meth:`rows` or :meth:`codes` made, with V as its first dim; after ``before`` others."""
        place = self.place + before
        return torch.unflatten(x, place, (self.size, -1)).movedim(place, 0)

    def _laid(self, x: Tensor, at: int | None, place: int) -> Tensor:
        if at is None:
            x = x.unsqueeze(place).expand(*x.shape[:place], self.size, *x.shape[place:])
        else:
            x = x.movedim(at, place)
        return x.flatten(place, place + 1)


def _nearest(
    info: Any, at: Sequence[Any], x: Tensor, codebook: Tensor, metric: str, precision: str, backend: str
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    v = _Samples(info.batch_size, at[1])
    found = nearest(v.rows(x, at[0]), v.codes(codebook, at[1]), metric, precision, backend)
    return tuple(v.back(t) for t in found), (0, 0)


def _residual_nearest(
    info: Any, at: Sequence[Any], x: Tensor, codebooks: list[Tensor], channel_first: bool, backend: str
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    v = _Samples(info.batch_size, *at[1])
    codes = [v.codes(codebook, dim) for codebook, dim in zip(codebooks, at[1], strict=True)]
    indices, values, score = residual_nearest(v.rows(x, at[0]), codes, channel_first, backend)
    return (v.back(indices, 1), v.back(values), v.back(score, 1)), (0, 0, 0)


def _lookup(
    info: Any,
    at: Sequence[Any],
    codebook: Tensor,
    indices: Tensor,
    channel_first: bool,
    dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, int]:
    v = _Samples(info.batch_size, at[0])
    return v.back(lookup(v.codes(codebook, at[0]), v.rows(indices, at[1]), channel_first, dtype, backend)), 0


def _codebook_sum(
    info: Any, at: Sequence[Any], x: Tensor, indices: Tensor, num_codes: int, backend: str
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    v = _Samples(info.batch_size, 0)  # a sum per sample
    found = codebook_sum(v.rows(x, at[0]), v.rows(indices, at[1]), num_codes, backend)
    return tuple(v.back(t) for t in found), (0, 0)


def _ema_update(info: Any, at: Sequence[Any], *_: Any) -> Any:
    raise RuntimeError(
        "vqkernels: a codebook in training cannot follow its moving averages under torch.vmap, where every sample "
        "would move it; call eval() or freeze()"
    )


def _batch(op: Any, rule: Callable[..., Any]) -> None:
    defaults = tuple(a.default_value for a in op._schema.arguments)

    def run(info: Any, at: Sequence[Any], *args: Any) -> Any:
        missing = defaults[len(args) :]  # torch drops trailing arguments that equal their default
        return rule(info, (*at, *(None,) * len(missing)), *args, *missing)

    torch.library.register_vmap(op, run, lib=_register.library)


for _op, _rule in (
    (nearest, _nearest),
    (residual_nearest, _residual_nearest),
    (lookup, _lookup),
    (codebook_sum, _codebook_sum),
    (ema_update, _ema_update),
):
    _batch(_op, _rule)
