"""The SimVQ repository (a taming-transformers fork): frozen codes seen through a learned linear map.

Read by :mod:`vqkernels.patch`; ``SimVQ`` of vector-quantize-pytorch is another class. Known by the end of the class
path, by attributes and by the parameters of the methods that are replaced.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vqkernels.recognisers._adapter import Adapter
from vqkernels.recognisers._copies import unknown_attributes
from vqkernels.recognisers._feature_maps import quantize_map
from vqkernels.recognisers._remapping import remap_to_used, shaped_indices, weighted_loss

__all__ = ["ADAPTERS"]


class SimVQRepository(Adapter):
    """``SimVQ``: (B, C, H, W) to ((quantized, 0, indices), LossBreakdown), beta by ``legacy``."""

    targets: ClassVar[tuple[str, ...]] = ("*.vqvae.quantize.SimVQ",)
    overrides = ("forward", "remap_to_used", "get_codebook_entry")
    signatures: ClassVar = {
        "forward": ("z", "temp", "rescale_logits", "return_logits"),
        "remap_to_used": ("inds",),
        "get_codebook_entry": ("indices", "shape"),
    }
    attributes = ("embedding", "embedding_proj", "beta", "legacy", "remap", "sane_index_shape")
    available_fixes: ClassVar = {"simvq-entry": "get_codebook_entry() gives the projected codes that forward() outputs"}
    dims = 4

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        known = ("n_e", "e_dim", "re_embed", "used", "unknown_index", "unmap_to_all")
        return unknown_attributes(module, cls.overrides, (*cls.attributes, *known))

    @classmethod
    def describe(cls, module: Any) -> str:
        return (
            f"legacy={module.legacy}: beta={module.beta:g} on the {'codebook' if module.legacy else 'commitment'} loss"
        )

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> Any:
        module: Any = self
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            return super().forward(z, temp, rescale_logits, return_logits)  # its assertion
        out = quantize_map(z, module.embedding_proj(module.embedding.weight), self.dims)
        loss, indices = weighted_loss(module, out), shaped_indices(module, out.indices, z)
        # The named tuple is defined in the original's file.
        original: Any = self.original_of(type(self))
        breakdown = original.forward.__globals__["LossBreakdown"]
        zero = torch.tensor(0.0)
        return (out.quantized, zero, indices), breakdown(zero, zero, loss, zero)

    def remap_to_used(self, inds: Tensor) -> Tensor:
        return remap_to_used(self, inds)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        module: Any = self
        if "simvq-entry" not in self.fixes:
            frozen: Tensor = super().get_codebook_entry(indices, shape)  # type: ignore[misc]
            return frozen
        if module.remap is not None and shape is not None:
            indices = module.unmap_to_all(indices.reshape(shape[0], -1)).reshape(-1)
        codes: Tensor = module.embedding_proj(module.embedding(indices))
        return codes if shape is None else codes.view(shape).permute(0, 3, 1, 2).contiguous()


class SimVQ1DRepository(SimVQRepository):
    """``SimVQ1D``: the same for (B, C, L); index rows with ``sane_index_shape``, where the original raises."""

    targets = ("*.vqvae.quantize.SimVQ1D",)
    dims = 3


ADAPTERS = (SimVQRepository, SimVQ1DRepository)
