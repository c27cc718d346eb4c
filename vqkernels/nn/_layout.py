"""Where a module's channels and heads are: views between (B, C, ...) or (..., C) and the (H, B, S, D) of the ops.

Called by the quantizers beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqkernels import _arguments as arguments

__all__ = ["Layout", "check_channel_dim"]


def check_channel_dim(channel_dim: int) -> None:
    """It is one of the two places that channels may have."""
    if channel_dim not in (1, -1):
        raise ValueError(f"channel_dim is {channel_dim!r}; expected 1 for (B, C, ...) or -1 for (..., C)")


@dataclass(frozen=True)
class Layout:
    """C = ``heads * dim`` channels in dim ``channel_dim`` (1 or -1) of the input."""

    heads: int
    dim: int
    channel_dim: int

    @property
    def channels(self) -> int:
        """C."""
        return self.heads * self.dim

    def _first(self, ndim: int) -> bool:
        # (N, C) is the same either way.
        return self.channel_dim == 1 and ndim > 2

    def places(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The input's shape without the channels: (B, ...)."""
        return (shape[0], *shape[2:]) if self._first(len(shape)) else tuple(shape[:-1])

    def shape(self, places: Sequence[int]) -> tuple[int, ...]:
        """The inverse of :meth:`places`."""
        if self._first(len(places) + 1):
            return (places[0], self.channels, *places[1:])
        return (*places, self.channels)

    def check(self, z: Tensor, codebook: Tensor) -> None:
        """``z`` is a floating tensor of this layout on the codebook's device."""
        arguments.check_float_tensor("z", z)
        least = 2 if self.channel_dim == 1 else 1
        if z.dim() < least or z.shape[1 if self._first(z.dim()) else -1] != self.channels:
            wanted = f"(B, {self.channels}, ...)" if self.channel_dim == 1 else f"(..., {self.channels})"
            heads = f" ({self.heads} heads of {self.dim} dims)" if self.heads > 1 else ""
            raise ValueError(f"z has shape {arguments.shape_of(z)}; expected {wanted}{heads}")
        if z.device != codebook.device:
            raise ValueError(f"z is on {z.device}, the codebook on {codebook.device}; expected one device")

    def rows(self, z: Tensor) -> Tensor:
        """The input as (H, B, S, D): a view wherever its spatial dims can be flattened in place."""
        if self._first(z.dim()):
            return torch.unflatten(z.flatten(2), 1, (self.heads, self.dim)).permute(1, 0, 3, 2)
        if self.heads == 1:
            return arguments.to_rows(z, False)
        return arguments.to_rows(torch.unflatten(z, -1, (self.heads, self.dim)).movedim(-2, 0), True)

    def mask(self, mask: Tensor, z: Tensor, rows: Tensor) -> Tensor:
        """A checked mask (B, ...), the same for every head, as (H, B, S)."""
        arguments.check_mask(mask, self.places(z.shape), z, False)
        return mask.reshape(rows.shape[1:3]).expand(rows.shape[:3])

    def blank(self, mask: Tensor, z: Tensor) -> Tensor:
        """``z`` with zeros where the checked ``mask`` (B, ...) is False.

        For arithmetic outside of the ops: what lies there may be NaN, and its gradient is 0 times what it was.
        """
        arguments.check_mask(mask, self.places(z.shape), z, False)
        return torch.where(mask.unsqueeze(1 if self._first(z.dim()) else -1), z, 0.0)

    def lens_mask(self, lens: Tensor, z: Tensor, mask: Tensor | None) -> Tensor:
        """Lengths (B,) as a mask (B, T)."""
        places = self.places(z.shape)
        if mask is not None:
            raise ValueError("mask and lens are both given; expected one of them")
        arguments.check_indices(lens, "lens")
        if len(places) != 2 or tuple(lens.shape) != (places[0],):
            raise ValueError(
                f"lens has shape {arguments.shape_of(lens)} for positions {tuple(places)}; expected (B,) and z of "
                f"{'(B, C, T)' if self.channel_dim == 1 else '(B, T, C)'}"
            )
        arguments.check_range("lens", lens, 0, places[1])
        return torch.arange(places[1], device=z.device) < lens.to(z.device).unsqueeze(1)

    def weights(self, weights: Tensor, z: Tensor, rows: Tensor) -> Tensor:
        """Weights (B, ...) of positions, the same for every head, as (H, B, S)."""
        arguments.check_float_tensor("weights", weights)
        if tuple(weights.shape) != (places := self.places(z.shape)):
            raise ValueError(f"weights has shape {arguments.shape_of(weights)}; expected {tuple(places)}")
        if weights.device != z.device:
            raise ValueError(f"weights is on {weights.device}, z on {z.device}; expected one device")
        return weights.detach().reshape(rows.shape[1:3]).expand(rows.shape[:3])

    def output(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """(H, B, S, D) in the shape of the input: a view for one head."""
        if self._first(len(shape)):
            values = values.permute(1, 0, 3, 2)
        elif self.heads > 1:
            values = values.movedim(0, 2)
        return values.reshape(tuple(shape))

    def indices(self, indices: Tensor, shape: Sequence[int]) -> Tensor:
        """(H, B, S) as (B, ...), or (B, ..., H) with several heads."""
        places = self.places(shape)
        return indices.reshape(places) if self.heads == 1 else indices.movedim(0, 2).reshape((*places, self.heads))

    def settle(self, quantized: Tensor, indices: Tensor) -> Tensor:
        """``quantized`` as it is; for Inductor on CPU as a result of its own instead of a view.

        Near convolutions Inductor (torch 2.13) asks for channels-last strides on saved 4-d views, and it cannot order
        them when the spatial dims are dynamic. Masked positions are zeros already, so the ``where`` changes nothing,
        and it is fused into the copy that the convolution wants anyway.
        """
        dynamo = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        if dynamo and quantized.device.type == "cpu" and quantized.dim() == 4 and self.heads == 1:
            return torch.where(indices.unsqueeze(self.channel_dim) >= 0, quantized, 0.0)
        return quantized

    def positions(self, indices: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The inverse of :meth:`indices`, checked: (H, B, S) and the shape of the output that belongs to it."""
        arguments.check_indices(indices)
        if self.heads > 1 and (indices.dim() < 1 or indices.shape[-1] != self.heads):
            raise ValueError(
                f"indices has shape {arguments.shape_of(indices)}; expected (..., {self.heads}), one per head"
            )
        places = tuple(indices.shape[:-1]) if self.heads > 1 else tuple(indices.shape)
        if not places and self.channel_dim == 1:
            raise ValueError(f"indices has shape {arguments.shape_of(indices)}; expected (B, ...)")
        split = indices.long() if self.heads > 1 else indices.long().unsqueeze(-1)
        return arguments.to_positions(split.movedim(-1, 0), True), self.shape(places)
