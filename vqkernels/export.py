"""``decompositions``: the ops of an exported program as operators of torch alone.

Called by users, on what ``torch.export`` made of a model: for ONNX, and where the program runs without this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vqkernels import ops

__all__ = ["decompositions"]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """A table for ``ExportedProgram.run_decompositions``, of the ops that a model in eval mode runs.

    The search is one matrix product in float64, over all codes at once: N x K numbers, and of two codes that are as
    near as float64 can tell, one in doubt. Everything else is what the op does.

    Example:
        >>> import torch, vqkernels
        >>> from vqkernels.export import decompositions
        >>> vq, z = vqkernels.VectorQuantizer(16, 4).eval(), torch.randn(2, 4, 5)
        >>> program = torch.export.export(vq, (z,)).run_decompositions(decompositions())
        >>> any("vqkernels" in str(node.target) for node in program.graph.nodes)
        False
        >>> torch.equal(program.module()(z).indices, vq(z).indices)
        True
    """
    return {
        ops.nearest: _nearest,
        ops.residual_nearest: _residual_nearest,
        ops.lookup: _lookup,
        ops.quantize_output: _quantize_output,
    }


def _nearest(
    x: Tensor, codebook: Tensor, metric: str = "l2", precision: str = "exact", backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    h, d = x.shape[0], x.shape[-1]
    rows, codes = x.reshape(h, -1, d).double(), codebook.double()
    if metric == "cosine":
        norm = codes.square().sum(-1, keepdim=True).sqrt()
        codes = codes / torch.where(norm > 0, norm, 1.0)
    value = rows @ codes.transpose(1, 2)
    if metric == "l2":
        value = value * 2 - codes.square().sum(-1).unsqueeze(1)
    # NaN wins nothing: in a row of NaN alone the first code does.
    indices = torch.where(value.isnan(), -torch.inf, value).argmax(-1)
    chosen = _lookup(codes, indices.unsqueeze(1)).squeeze(1)
    score = (rows - chosen).square().sum(-1) if metric == "l2" else (rows * chosen).sum(-1)
    return indices.reshape(x.shape[:-1]), score.float().reshape(x.shape[:-1])


def _residual_nearest(
    x: Tensor, codebooks: list[Tensor], channel_first: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rest, values = x, torch.zeros_like(x, dtype=wide)
    found = []
    for codebook in codebooks:
        found.append(_nearest(rest, codebook))
        codes = _lookup(codebook, found[-1][0], dtype=wide)
        rest, values = rest.to(wide) - codes, values + codes
    values = values.transpose(-1, -2) if channel_first else values
    indices, score = (torch.stack(parts) for parts in zip(*found, strict=True))
    return indices, values.clone(memory_format=torch.contiguous_format), score


def _lookup(
    codebook: Tensor,
    indices: Tensor,
    channel_first: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    h, k, d = codebook.shape
    first = torch.arange(h, device=indices.device).view(-1, 1, 1) * k
    values = codebook.reshape(h * k, d)[indices.clamp(min=0) + first]
    values = torch.where((indices >= 0).unsqueeze(-1), values, 0.0).to(dtype or codebook.dtype)
    return values.transpose(-1, -2).contiguous() if channel_first else values


def _quantize_output(
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    distance: Tensor | None,
    masked: bool = True,
    channel_first: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    known = indices >= 0
    if distance is None:
        distance = (z.to(wide) - _lookup(codebook, indices, dtype=wide)).square().sum(-1)
    weight = (known.sum().double() * z.shape[-1]).clamp(min=1.0).reciprocal()
    loss = (torch.where(known, distance, 0.0).double().sum() * weight).to(wide)
    return _lookup(codebook, indices, channel_first, z.dtype), loss, loss.clone(), weight
