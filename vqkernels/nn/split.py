"""``SplitResidualVectorQuantizer``: a semantic quantizer and an acoustic one side by side on the same input.

Called by users. The scheme of Mimi (Defossez et al. 2024, "Moshi", sec. 3.3.3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vqkernels import _arguments as arguments
from vqkernels.nn import checkpoints
from vqkernels.nn.level_dropout import check_levels
from vqkernels.nn.residual import ResidualVectorQuantizer, ResidualVQOutput

__all__ = ["SplitResidualVectorQuantizer"]

_NAMES = {
    "semantic_residual_vector_quantizer.": "semantic.",
    "acoustic_residual_vector_quantizer.": "acoustic.",
    "rvq_first.": "semantic.",
    "rvq_rest.": "acoustic.",
}


class SplitResidualVectorQuantizer(nn.Module):
    """The first levels and the others quantize the same input, not each other's residual; the outputs are added.

    Args:
        num_embeddings, embedding_dim, **options: of :class:`vqkernels.ResidualVectorQuantizer`; ``dropout`` acts on the
            acoustic levels only, the semantic ones always stay.
        num_levels: Q, of both together.
        semantic_levels: how many of them are semantic.
        projection_bias: as there; Mimi's projections have none.

    State: ``semantic.*`` and ``acoustic.*``; checkpoints of transformers' Mimi and of Moshi load too.

    Shape:
        as :class:`vqkernels.ResidualVectorQuantizer`: indices (B, ..., Q), semantic levels first; losses (Q,).

    Example:
        >>> import torch, vqkernels
        >>> vq = vqkernels.SplitResidualVectorQuantizer(64, 8, 4, input_dim=16)
        >>> vq(torch.randn(2, 16, 10)).indices.shape
        torch.Size([2, 10, 4])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_levels: int,
        *,
        semantic_levels: int = 1,
        dropout: str | None = None,
        projection_bias: bool = False,
        reduction: str = "sum",
        channel_dim: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        arguments.check_count("num_levels", num_levels)
        arguments.check_count("semantic_levels", semantic_levels)
        if semantic_levels >= num_levels:
            raise ValueError(f"semantic_levels is {semantic_levels}; expected fewer than the {num_levels} levels")
        self.num_levels, self.semantic_levels, self.channel_dim = num_levels, semantic_levels, channel_dim
        self.reduction = reduction
        options |= {"projection_bias": projection_bias, "channel_dim": channel_dim, "reduction": reduction}
        self.semantic = ResidualVectorQuantizer(
            num_embeddings,
            embedding_dim,
            semantic_levels,
            **{k: v for k, v in options.items() if not k.startswith("dropout")},
        )
        self.acoustic = ResidualVectorQuantizer(
            num_embeddings, embedding_dim, num_levels - semantic_levels, dropout=dropout, **options
        )

    def forward(
        self,
        z: Tensor,
        mask: Tensor | None = None,
        *,
        lens: Tensor | None = None,
        num_levels: int | None = None,
        keep: Tensor | None = None,
    ) -> ResidualVQOutput:
        """Quantize ``z``; ``num_levels`` counts both kinds, ``keep`` the acoustic ones.

        Raises:
            ValueError, TypeError: shapes, dtype or device do not fit.
        """
        levels = self._acoustic(num_levels)
        arguments.check_float_tensor("z", z)
        if keep is not None:
            self.acoustic.check_keep(keep, z)
        wide = z if z.dtype in (torch.float32, torch.float64) else z.float()  # the sum is rounded once
        first = self.semantic(wide, mask, lens=lens)
        if levels:
            rest = self.acoustic(wide, mask, lens=lens, num_levels=levels, keep=keep)
        else:
            skipped = first.codebook_loss.new_zeros(self.acoustic.num_levels)
            none = first.indices.new_full((*first.indices.shape[:-1], self.acoustic.num_levels), -1)
            rest = ResidualVQOutput(torch.zeros_like(wide), none, skipped.new_zeros(()), skipped, skipped)
        shares = (self.semantic_levels, self.acoustic.num_levels)
        weights = [n / self.num_levels if self.reduction == "mean" else 1.0 for n in shares]
        return ResidualVQOutput(
            (first.quantized + rest.quantized).to(z.dtype),
            torch.cat([first.indices, rest.indices], -1),
            weights[0] * first.loss + weights[1] * rest.loss,
            torch.cat([first.codebook_loss, rest.codebook_loss]),
            torch.cat([first.commitment_loss, rest.commitment_loss]),
        )

    def _acoustic(self, num_levels: int | None) -> int:
        """How many acoustic levels there are among ``num_levels``."""
        return check_levels(num_levels, self.num_levels, self.semantic_levels) - self.semantic_levels

    def codes_to_output(self, indices: Tensor) -> Tensor:
        """What :meth:`forward` outputs for indices (B, ..., q), q at least the semantic levels; -1 gives zeros.

        Raises:
            ValueError, TypeError: shape or dtype do not fit.
        """
        arguments.check_indices(indices)
        least = 2 if self.channel_dim == 1 else 1
        if indices.dim() < least or not self.semantic_levels <= indices.shape[-1] <= self.num_levels:
            raise ValueError(
                f"indices has shape {arguments.shape_of(indices)}; expected (B, ..., q), q from {self.semantic_levels} "
                f"to {self.num_levels}"
            )
        levels = indices.shape[-1] - self.semantic_levels
        out = self.semantic.codes_to_output(indices[..., : self.semantic_levels])
        return out if levels == 0 else out + self.acoustic.codes_to_output(indices[..., self.semantic_levels :])

    def bitrate(self, frame_rate: float, num_levels: int | None = None) -> float:
        """Bits per second of ``frame_rate`` positions per second."""
        levels = self._acoustic(num_levels)
        return self.semantic.bitrate(frame_rate) + (self.acoustic.bitrate(frame_rate, levels) if levels else 0.0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        checkpoints.rename_parts(state_dict, prefix, _NAMES)
        super()._load_from_state_dict(state_dict, prefix, *args)
