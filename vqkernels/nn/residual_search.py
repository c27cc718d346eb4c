"""All levels of a residual quantizer in one search, where that is what they would do one by one.

Called by :class:`vqkernels.ResidualVectorQuantizer`, which asks its levels itself for the rest: learning, gradients,
other metrics, and whatever was hung on or put in the place of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules import module as modules

from vqkernels import _arguments as arguments
from vqkernels import _devices, ops
from vqkernels._gradients import transformed
from vqkernels.nn._layout import Layout
from vqkernels.nn.vector_quantizer import VectorQuantizer

__all__ = ["LevelsOutput", "search_levels"]


class LevelsOutput(NamedTuple):
    """What the levels say together.

    Attributes:
        quantized: sum of the codes, shape of the input.
        indices: (B, ..., Q); -1 where the position was masked.
        loss: sum of the levels' ``loss``, 0-d.
        codebook_loss: (Q,).
        commitment_loss: (Q,).
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


def search_levels(
    levels: Sequence[VectorQuantizer], z: Tensor, layout: Layout, mask: Tensor | None
) -> LevelsOutput | None:
    """What ``levels`` make of ``z``, one on the residual of the other, without calling them; ``None`` if they must be.

    Indices and values are the levels' own to the bit, losses to the rounding of a float32 sum.
    """
    codebooks = _codebooks(levels, z)
    if codebooks is None:
        return None
    rows = layout.rows(z)
    valid = None if mask is None else layout.mask(mask, z, rows)
    channel_first = arguments.is_channel_first(rows)
    indices, values, score = ops.residual_nearest(rows, codebooks, channel_first)
    indices, score, widest = indices[:, 0], score[:, 0], _devices.widest(z.device)
    if valid is None:
        weight: float | Tensor = 1.0 / max(rows.numel(), 1)
    else:
        indices, score = torch.where(valid, indices, -1), torch.where(valid, score, 0.0)
        weight = (valid.sum(dtype=widest) * rows.shape[-1]).clamp(min=1.0).reciprocal()
        values = torch.where(valid.unsqueeze(2 if channel_first else 3), values, 0.0)
    losses = (score.sum((1, 2), dtype=widest) * weight).float()
    quantized = layout.output(values.transpose(-1, -2) if channel_first else values, z.shape)
    places = layout.places(z.shape)
    return LevelsOutput(
        quantized,
        indices.movedim(0, -1).reshape((*places, len(levels))).contiguous(),
        levels[0]._loss(losses, losses).sum(),
        losses,
        losses.clone(),
    )


def _codebooks(levels: Sequence[VectorQuantizer], z: Tensor) -> list[Tensor] | None:
    """The codebooks (1, K, D) if every level does nothing but search its own; else ``None``."""
    if z.dtype != torch.float32 or modules._has_any_global_hook():  # type: ignore[no-untyped-call]
        return None
    if transformed(z, *(level.codebook for level in levels)):
        return None
    grads = torch.is_grad_enabled()
    if grads and z.requires_grad:
        return None
    found, first = [], levels[0]
    for level in levels:
        codebook = level.codebook
        if (
            type(level) is not VectorQuantizer
            or level.training
            or level.metric != "l2"
            or level.normalize
            or level.gradient == "softmax"
            or level.input_dim is not None
            or level.affine is not None
            or level.orthogonal_weight > 0
            or (level.commitment_cost, level.decay is None, level.legacy)
            != (first.commitment_cost, first.decay is None, first.legacy)
            or level._forward_hooks
            or level._forward_pre_hooks
            or level._backward_hooks
            or level._backward_pre_hooks
            or "forward" in level.__dict__
            or (grads and codebook.requires_grad)
            or codebook.device != z.device
        ):
            return None
        found.append(codebook.unsqueeze(0))
    return found
