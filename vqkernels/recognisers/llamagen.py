"""LlamaGen's tokenizer, a repository whose file people copy: known by the end of its path and by its attributes.

Read by :mod:`vqkernels.patch`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vqkernels.recognisers._adapter import Adapter
from vqkernels.recognisers._copies import unknown_attributes
from vqkernels.recognisers._feature_maps import quantize_map

__all__ = ["ADAPTERS"]


class LlamaGenQuantizer(Adapter):
    """LlamaGen's: unit vectors if ``l2_norm``, four training losses in a tuple, usage over the last 65536 tokens.

    The original computes the entropy loss over N x K also when its weight is 0; here only with a weight, in chunks of
    rows that the backward pass computes again.
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
        return norm + ("" if module.entropy_loss_ratio == 0 else f", entropy loss x {module.entropy_loss_ratio:g}")

    def forward(self, z: Tensor) -> tuple[Tensor, tuple[Any, Any, Any, float], tuple[None, None, Tensor]]:
        module: Any = self
        codes = module.embedding.weight
        if module.l2_norm:
            z, codes = functional.normalize(z, dim=1), functional.normalize(codes, dim=-1)
        # Without losses nothing reaches the codes: no gradient then, as in the original, rather than one of zeros.
        out = quantize_map(z, codes if module.training else codes.detach())
        if not module.training:
            return out.quantized, (None, None, None, 0), (None, None, out.indices)
        usage: float = self._count_usage(out.indices) if module.show_usage else 0
        # A weight of 0 is the default: then nothing but a 0 that can be differentiated.
        ratio = module.entropy_loss_ratio
        entropy = ratio * (_entropy(z.movedim(1, -1).flatten(0, -2), codes) if ratio else out.codebook_loss)
        losses = (out.codebook_loss, module.beta * out.commitment_loss, entropy, usage)
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


# Distances of a chunk of rows to all codes, at most.
_CHUNK_ELEMENTS = 2**22


def _entropy(rows: Tensor, codes: Tensor) -> Tensor:
    """Mean entropy of each row's softmax over -distance / 0.01, less the entropy of the mean softmax."""
    step = max(1, _CHUNK_ELEMENTS // len(codes))
    own, average = codes.new_zeros(()), codes.new_zeros(len(codes))
    for part in torch.split(rows, step):
        entropy, shares = checkpoint(_entropy_sums, part, codes, use_reentrant=False)
        own, average = own + entropy / len(rows), average + shares / len(rows)
    return own + (average * torch.log(average + 1e-5)).sum()


def _entropy_sums(rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    distance = rows.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * (rows @ codes.t())
    logits = distance / -0.01
    shares = logits.softmax(-1)
    return -(shares * (logits + 1e-5).log_softmax(-1)).sum(), shares.sum(0)


ADAPTERS = (LlamaGenQuantizer,)
