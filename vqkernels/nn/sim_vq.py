"""``SimVQ``: a frozen random codebook seen through a learned linear map, so that every code moves in every step.

Called by users. Zhu et al. 2024, "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vqkernels import _arguments as arguments
from vqkernels.functional import VQOutput, lookup_rows, quantize_rows
from vqkernels.nn import checkpoints, statistics
from vqkernels.nn._distributed import all_reduce
from vqkernels.nn._layout import Layout, check_channel_dim
from vqkernels.nn.learning import in_backward

__all__ = ["SimVQ"]


class SimVQ(nn.Module):
    """Nearest code among W c_k, with c_k fixed and W trained by the codebook loss.

    The gradient of the projected codes is one deterministic sum per code (``codebook_sum``), and that of W one matrix
    product with the frozen codes; nothing is N x K. Indices, outputs and :meth:`codes_to_output` all speak of the
    projected codes.

    Args:
        num_embeddings: number of codes K.
        embedding_dim: dims D of the input and of the projected codes.
        frozen_dim: dims of the frozen codes; default D.
        transform: a module from (K, frozen_dim) to (K, D) instead of a linear layer.
        bias: of the linear layer.
        commitment_cost: weight of the commitment loss.
        gradient: as in :class:`vqkernels.VectorQuantizer`.
        channel_dim: 1 for (B, C, ...), -1 for (..., C).
        sync: count the codes of all processes in :meth:`usage`, by one all-reduce per training step.
        device: of the parameters and buffers.

    State: ``frozen_codebook`` (K, frozen_dim), ``code_transform.weight`` (D, frozen_dim), as in
    vector-quantize-pytorch; ``code_counts`` int64 (K,). The authors' ``embedding.weight`` and ``embedding_proj.*``
    load too.

    Shape:
        as :class:`vqkernels.VectorQuantizer`.

    Example:
        >>> import torch, vqkernels
        >>> vq = vqkernels.nn.SimVQ(1024, 32)
        >>> out = vq(torch.randn(2, 32, 8, 8))
        >>> [name for name, _ in vq.named_parameters()], out.indices.shape
        (['code_transform.weight'], torch.Size([2, 8, 8]))
    """

    frozen_codebook: Tensor
    code_counts: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        frozen_dim: int | None = None,
        transform: nn.Module | None = None,
        bias: bool = False,
        commitment_cost: float = 0.25,
        gradient: str = "straight_through",
        channel_dim: int = 1,
        sync: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        frozen_dim = embedding_dim if frozen_dim is None else frozen_dim
        for name, value in (
            ("num_embeddings", num_embeddings), ("embedding_dim", embedding_dim), ("frozen_dim", frozen_dim)
        ):  # fmt: skip
            arguments.check_count(name, value)
        arguments.check_number("commitment_cost", commitment_cost)
        arguments.check_choice("gradient", gradient)
        check_channel_dim(channel_dim)
        self.num_embeddings, self.embedding_dim, self.channel_dim = num_embeddings, embedding_dim, channel_dim
        self.commitment_cost, self.gradient, self.sync = commitment_cost, gradient, sync
        self._layout = Layout(1, embedding_dim, channel_dim)
        self.register_buffer("frozen_codebook", torch.empty((num_embeddings, frozen_dim), device=device))
        self._draw()
        self.code_transform = transform or nn.Linear(frozen_dim, embedding_dim, bias=bias, device=device)
        self.register_buffer("code_counts", torch.zeros(num_embeddings, dtype=torch.int64, device=device))

    def _draw(self) -> None:
        codes = self.frozen_codebook
        codes.copy_(torch.randn_like(codes) * codes.shape[-1] ** -0.5)

    def reset_parameters(self) -> None:
        """Draw the frozen codes anew and forget the counts, as after ``to_empty``; the transform has its own method."""
        self._draw()
        self.reset_usage()

    @property
    def codebook(self) -> Tensor:
        """The projected codes (K, D), float32 whatever autocast says."""
        with arguments.without_autocast(self.frozen_codebook):
            # FSDP's mixed precision rounds parameters but no buffers.
            like = next(self.code_transform.parameters(), self.frozen_codebook)
            codes: Tensor = self.code_transform(self.frozen_codebook.to(like.dtype))
        if tuple(codes.shape) != (self.num_embeddings, self.embedding_dim):
            wanted = (self.num_embeddings, self.embedding_dim)
            raise ValueError(f"transform gave shape {arguments.shape_of(codes)}; expected {wanted}")
        return codes

    def forward(self, z: Tensor, mask: Tensor | None = None, *, lens: Tensor | None = None) -> VQOutput:
        """Quantize ``z``; see :meth:`vqkernels.VectorQuantizer.forward`.

        Raises:
            ValueError, TypeError: shapes, dtype or device do not fit.
        """
        self._layout.check(z, self.frozen_codebook)
        if lens is not None:
            mask = self._layout.lens_mask(lens, z, mask)
        rows = self._layout.rows(z)
        valid = None if mask is None else self._layout.mask(mask, z, rows)
        out = quantize_rows(rows, self.codebook.unsqueeze(0), metric="l2", gradient=self.gradient, mask=valid)
        if self.training and not in_backward():
            counted = torch.where(out.score.isfinite(), out.indices, -1)
            (counts,) = all_reduce([statistics.count_codes(counted, self.num_embeddings)], self.sync)
            self.code_counts.add_(counts[0])
        indices = self._layout.indices(out.indices, z.shape)
        return VQOutput(
            self._layout.settle(self._layout.output(out.quantized, z.shape), indices),
            indices,
            torch.add(out.codebook_loss, out.commitment_loss, alpha=self.commitment_cost),
            out.codebook_loss,
            out.commitment_loss,
        )

    def codes_to_output(self, indices: Tensor) -> Tensor:
        """What :meth:`forward` outputs for indices (B, ...): float32; -1 gives zeros.

        Raises:
            ValueError, TypeError: shape or dtype do not fit.
        """
        positions, shape = self._layout.positions(indices)
        first = self.channel_dim == 1 and len(shape) > 2
        return self._layout.output(lookup_rows(self.codebook.unsqueeze(0), positions, first), shape)

    def usage(self) -> float:
        """Fraction of codes used in training since :meth:`reset_usage`."""
        return float(statistics.usage(self.code_counts))

    def perplexity(self) -> float:
        """exp(entropy) of the codes used in training since :meth:`reset_usage`, in [1, K]."""
        return float(statistics.perplexity(self.code_counts))

    def reset_usage(self) -> None:
        """Start counting anew."""
        self.code_counts.zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = {"embedding.weight": "frozen_codebook", "embedding_proj.": "code_transform."}
        checkpoints.rename_parts(state_dict, prefix, names)
        # Other libraries do not count.
        codes = state_dict.get(prefix + "frozen_codebook", self.code_counts)
        state_dict.setdefault(prefix + "code_counts", torch.zeros_like(self.code_counts, device=codes.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
