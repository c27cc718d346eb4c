"""taming-transformers' quantizers and their descendants: latent-diffusion's copies, diffusers' ``VQModel``.

Read by :mod:`vqkernels.patch`. taming and latent-diffusion exist as repositories whose files people copy, so they are
recognised by the end of the class path, by attributes and by the parameters of ``forward``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from vqkernels.functional import codebook_sum, lookup
from vqkernels.nn.statistics import count_codes
from vqkernels.recognisers._adapter import Adapter
from vqkernels.recognisers._copies import unknown_attributes
from vqkernels.recognisers._feature_maps import quantize_map
from vqkernels.recognisers._remapping import remap_to_used, shaped_indices, weighted_loss

__all__ = ["ADAPTERS", "IGNORED"]


class Quantizer2(Adapter):
    """``VectorQuantizer2``: (B, C, H, W) to (quantized, loss, (None, None, indices)), beta by ``legacy``, remapping."""

    targets = ("*.vqvae.quantize.VectorQuantizer2",)
    overrides = ("forward", "remap_to_used")
    signatures: ClassVar = {"forward": ("z", "temp", "rescale_logits", "return_logits"), "remap_to_used": ("inds",)}
    attributes = ("embedding", "beta", "legacy", "remap", "sane_index_shape")

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        sizes = ("n_e", "e_dim", "vq_embed_dim", "re_embed", "used", "unknown_index")
        return unknown_attributes(module, cls.overrides, (*cls.attributes, *sizes))

    @classmethod
    def describe(cls, module: Any) -> str:
        side = "codebook" if module.legacy else "commitment"
        remap = f", {module.re_embed} indices by remap" if module.remap is not None else ""
        return f"legacy={module.legacy}: beta={module.beta:g} on the {side} loss{remap}"

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            # The original's assertion, in its words.
            refused: tuple[Tensor, Tensor, tuple[None, None, Tensor]]
            refused = super().forward(z, temp, rescale_logits, return_logits)
            return refused
        return _forward2(self, z)

    def remap_to_used(self, inds: Tensor) -> Tensor:
        return remap_to_used(self, inds)

    def embed_code(self, embed_id: Tensor) -> Tensor:
        """Codes (B, C, H, W) of indices (B, H, W): taming's ``VQModel.decode_code`` calls it, and it is not there."""
        module: Any = self
        if hasattr(super(), "embed_code"):
            own: Tensor = super().embed_code(embed_id)  # type: ignore[misc]
            return own
        return lookup(module.embedding.weight, embed_id).movedim(-1, 1)


class DiffusersQuantizer(Quantizer2):
    """diffusers' ``VectorQuantizer``: the same without the arguments for Gumbel."""

    targets = ("diffusers.models.autoencoders.vae.VectorQuantizer",)
    signatures: ClassVar = {"forward": ("z",), "remap_to_used": ("inds",)}

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:  # type: ignore[override]
        return _forward2(self, z)


def _forward2(module: Any, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
    out = quantize_map(z, module.embedding.weight)
    return out.quantized, weighted_loss(module, out), (None, None, shaped_indices(module, out.indices, z))


class Quantizer1(Adapter):
    """``VectorQuantizer``: as above, always legacy, with (perplexity, one-hot codes, indices (N, 1)).

    The one-hot matrix is part of what it returns, so this N x K matrix is still made, once and at the end.
    """

    targets = ("*.vqvae.quantize.VectorQuantizer",)
    overrides = ("forward", "get_codebook_entry")
    signatures: ClassVar = {"forward": ("z",), "get_codebook_entry": ("indices", "shape")}
    attributes = ("embedding", "beta", "n_e", "e_dim")

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        return unknown_attributes(module, cls.overrides, cls.attributes)

    @classmethod
    def describe(cls, module: Any) -> str:
        return f"beta={module.beta:g} on the codebook loss; still returns its N x K one-hot matrix"

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        module: Any = self
        out = quantize_map(z, module.embedding.weight)
        one_hot, perplexity = _one_hot(out.indices, module.n_e, z)
        loss = out.commitment_loss + module.beta * out.codebook_loss
        return out.quantized, loss, (perplexity, one_hot, out.indices.unsqueeze(1))

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        module: Any = self
        codes: Tensor = lookup(module.embedding.weight, indices)
        return codes if shape is None else codes.view(*shape).movedim(-1, 1).contiguous()


class EmaQuantizer(Adapter):
    """``EMAVectorQuantizer`` where somebody has mended its constructor: codes by moving averages, in ``embedding``."""

    targets = ("*.vqvae.quantize.EMAVectorQuantizer",)
    signatures: ClassVar = {"forward": ("z",)}
    attributes = ("embedding", "beta", "num_tokens", "codebook_dim")

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        if getattr(module, "remap", None) is not None:
            return "remap is set, which the original's forward ignores or not, depending on the copy"
        return unknown_attributes(module, cls.overrides, cls.attributes)

    @classmethod
    def describe(cls, module: Any) -> str:
        return f"EMA codebook, beta={module.beta:g}; still returns its N x K one-hot matrix"

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        module: Any = self
        table = module.embedding
        update = module.training and table.update
        # The backward pass reads the codes that were chosen, not what the update below makes of them.
        codes = table.weight.detach()
        out = quantize_map(z, codes.clone() if update else codes)
        one_hot, perplexity = _one_hot(out.indices, module.num_tokens, z)
        if update:
            rows = z.detach().movedim(1, -1).flatten(0, -2)
            sums, counts = codebook_sum(rows, out.indices, module.num_tokens)
            table.cluster_size_ema_update(counts.to(z.dtype))
            table.embed_avg_ema_update(sums.to(z.dtype))
            table.weight_update(module.num_tokens)
        return out.quantized, module.beta * out.commitment_loss, (perplexity, one_hot, out.indices)


def _one_hot(indices: Tensor, codes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The one-hot matrix that these classes return, and the perplexity from counts instead of from it."""
    one_hot = functional.one_hot(indices, codes).to(like)
    share = count_codes(indices.unsqueeze(0), codes)[0].to(like) / max(1, len(indices))
    return one_hot, torch.exp(-torch.sum(share * torch.log(share + 1e-10)))


ADAPTERS = (Quantizer2, DiffusersQuantizer, Quantizer1, EmaQuantizer)
IGNORED = {
    "taming.modules.vqvae.quantize.GumbelQuantize": (
        "samples from a softmax over all codes: there is no nearest code to search for"
    ),
}
