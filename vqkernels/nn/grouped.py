"""``GroupedResidualVectorQuantizer`` and ``ProductQuantizer``: the channels in groups, a quantizer of its own for each.

Called by users. Groups of one level are what :class:`vqkernels.VectorQuantizer` does with ``heads`` in one search.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vqkernels import _arguments as arguments
from vqkernels.nn.residual import ResidualVectorQuantizer, ResidualVQOutput
from vqkernels.nn.vector_quantizer import VectorQuantizer

__all__ = ["GroupedResidualVectorQuantizer", "ProductQuantizer"]


class GroupedResidualVectorQuantizer(nn.Module):
    """Split the channels into groups and quantize each by Q residual levels (Yang et al. 2023, "HiFi-Codec").

    Args:
        num_embeddings, num_levels, **options: of :class:`vqkernels.ResidualVectorQuantizer`. All groups drop the same
            levels.
        embedding_dim: dims D of a code; the input has ``groups * embedding_dim`` channels (or ``groups * input_dim``).
        groups: G.

    State: ``rvqs.{g}.*`` of each group, as in vector-quantize-pytorch's ``GroupedResidualVQ``.

    Shape:
        as :class:`vqkernels.ResidualVectorQuantizer`, with indices (B, ..., G, Q) and losses (G, Q).

    Example:
        >>> import torch, vqkernels
        >>> vq = vqkernels.GroupedResidualVectorQuantizer(64, 8, 4, groups=2, channel_dim=-1)
        >>> vq(torch.randn(3, 10, 16)).indices.shape
        torch.Size([3, 10, 2, 4])
    """

    def __init__(
        self,
        num_embeddings: int | Sequence[int],
        embedding_dim: int,
        num_levels: int | None = None,
        *,
        groups: int = 2,
        channel_dim: int = 1,
        reduction: str = "sum",
        **options: Any,
    ) -> None:
        super().__init__()
        arguments.check_count("groups", groups)
        self.groups, self.channel_dim, self.reduction = groups, channel_dim, reduction
        self.rvqs = nn.ModuleList(
            ResidualVectorQuantizer(
                num_embeddings, embedding_dim, num_levels, channel_dim=channel_dim, reduction=reduction, **options
            )
            for _ in range(groups)
        )
        self.num_levels = self.group(0).num_levels

    def group(self, index: int) -> ResidualVectorQuantizer:
        """The quantizer of one group."""
        module = self.rvqs[index]
        assert isinstance(module, ResidualVectorQuantizer)
        return module

    def forward(
        self,
        z: Tensor,
        mask: Tensor | None = None,
        *,
        lens: Tensor | None = None,
        num_levels: int | None = None,
        keep: Tensor | None = None,
    ) -> ResidualVQOutput:
        """Quantize ``z`` (B, C, ...) or (..., C); see :meth:`vqkernels.ResidualVectorQuantizer.forward`.

        Raises:
            ValueError, TypeError: shapes, dtype or device do not fit.
        """
        arguments.check_float_tensor("z", z)
        dim = 1 if self.channel_dim == 1 and z.dim() > 2 else -1
        if z.dim() < 1 or z.shape[dim] % self.groups:
            raise ValueError(
                f"z has shape {arguments.shape_of(z)}; expected channels divisible by {self.groups} groups"
            )
        parts = z.chunk(self.groups, dim)
        found = [self.group(g)(part, mask, lens=lens, num_levels=num_levels, keep=keep) for g, part in enumerate(parts)]
        loss = torch.stack([out.loss for out in found]).sum()
        return ResidualVQOutput(
            torch.cat([out.quantized for out in found], dim),
            torch.stack([out.indices for out in found], dim=-2),
            loss / self.groups if self.reduction == "mean" else loss,
            torch.stack([out.codebook_loss for out in found]),
            torch.stack([out.commitment_loss for out in found]),
        )

    def codes_to_output(self, indices: Tensor) -> Tensor:
        """What :meth:`forward` outputs for indices (B, ..., G, q); -1 gives zeros.

        Raises:
            ValueError, TypeError: shape or dtype do not fit.
        """
        arguments.check_indices(indices)
        if indices.dim() < (3 if self.channel_dim == 1 else 2) or indices.shape[-2] != self.groups:
            raise ValueError(f"indices has shape {arguments.shape_of(indices)}; expected (B, ..., {self.groups}, q)")
        parts = [self.group(g).codes_to_output(indices[..., g, :]) for g in range(self.groups)]
        return torch.cat(parts, 1 if self.channel_dim == 1 and parts[0].dim() > 2 else -1)

    def bitrate(self, frame_rate: float, num_levels: int | None = None) -> float:
        """Bits per second of ``frame_rate`` positions per second."""
        return sum(self.group(g).bitrate(frame_rate, num_levels) for g in range(self.groups))


class ProductQuantizer(VectorQuantizer):
    """Split the channels into M parts with a codebook each (Jegou et al. 2011): K^M codes for the price of M K.

    :class:`vqkernels.VectorQuantizer` with ``heads=parts``; all parts are searched in one call.

    Args:
        num_embeddings: codes K of each part.
        dim: channels of the input, divisible by ``parts``.
        parts: M.
        **options: of :class:`vqkernels.VectorQuantizer`.

    Example:
        >>> import torch, vqkernels
        >>> pq = vqkernels.nn.ProductQuantizer(256, 64, parts=8, channel_dim=-1)
        >>> pq(torch.randn(5, 64)).indices.shape
        torch.Size([5, 8])
    """

    def __init__(self, num_embeddings: int, dim: int, *, parts: int, **options: Any) -> None:
        arguments.check_count("dim", dim)
        arguments.check_count("parts", parts)
        if dim % parts:
            raise ValueError(f"dim is {dim}; expected a multiple of the {parts} parts")
        super().__init__(num_embeddings, dim // parts, heads=parts, **options)
