"""LlamaGen's tokenizer, a repository whose file people copy: known by the end of its path and by its attributes.

Read by :mod:`vqkernels.patch`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from vqkernels.recognisers._adapter import Adapter
from vqkernels.recognisers._copies import unknown_attributes
from vqkernels.recognisers._feature_maps import quantize_map

__all__ = ["ADAPTERS"]


class LlamaGenQuantizer(Adapter):
    """LlamaGen's: unit vectors if ``l2_norm``, four training losses in a tuple, usage over the last 65536 tokens.

    The original computes the entropy loss over N x K also when its weight is 0; then it is 0 times another loss here.
    With a weight it needs all distances: such a module is left to the original in training.
    """

    targets = ("*.vq_model.VectorQuantizer",)
    signatures: ClassVar = {"forward": ("z",)}
    attributes = ("embedding", "beta", "n_e", "e_dim", "entropy_loss_ratio", "l2_norm", "show_usage")

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        return unknown_attributes(module, cls.overrides, (*cls.attributes, "codebook_used"))

    @classmethod
    def describe(cls, module: Any) -> str:
        norm = "unit vectors" if module.l2_norm else "plain vectors"
        return norm + ("" if module.entropy_loss_ratio == 0 else "; training steps by the original (entropy loss)")

    def forward(self, z: Tensor) -> tuple[Tensor, tuple[Any, Any, Any, float], tuple[None, None, Tensor]]:
        module: Any = self
        if module.training and module.entropy_loss_ratio != 0:
            original: tuple[Tensor, tuple[Any, Any, Any, float], tuple[None, None, Tensor]]
            original = super().forward(z)  # type: ignore[misc]
            return original
        codes = module.embedding.weight
        if module.l2_norm:
            z, codes = functional.normalize(z, dim=1), functional.normalize(codes, dim=-1)
        # Without losses nothing reaches the codes: no gradient then, as in the original, rather than one of zeros.
        out = quantize_map(z, codes if module.training else codes.detach())
        if not module.training:
            return out.quantized, (None, None, None, 0), (None, None, out.indices)
        usage: float = self._count_usage(out.indices) if module.show_usage else 0
        losses = (out.codebook_loss, module.beta * out.commitment_loss, 0.0 * out.codebook_loss, usage)
        return out.quantized, losses, (None, None, out.indices)

    @torch.no_grad()
    def _count_usage(self, indices: Tensor) -> float:
        """Share of the codes among the last tokens, whose number is the buffer's length.

        The original fails for more tokens than that, and on the CPU, where its buffer is a leaf that wants gradients.
        """
        module: Any = self
        seen: Tensor = module.codebook_used
        newest = indices[-len(seen) :].to(seen.dtype)
        seen.copy_(torch.cat([seen[len(newest) :], newest]))
        share: float = len(torch.unique(seen)) / module.n_e
        return share


ADAPTERS = (LlamaGenQuantizer,)
