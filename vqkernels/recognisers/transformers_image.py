"""The image tokenizers of transformers: Chameleon, Janus, GLM-Image and Emu3.

Read by :mod:`vqkernels.patch`. The originals hold the distances of every row to every code, in the dtype of the
weights: in bfloat16 that names another code than the nearest in a few per cent of the rows.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from vqkernels.functional import nearest
from vqkernels.recognisers._adapter import Adapter
from vqkernels.recognisers._feature_maps import check_map, quantize_map

__all__ = ["ADAPTERS"]

_MODELS = "transformers.models"


class ChameleonQuantizer(Adapter):
    """Chameleon's and Janus': (B, C, H, W) to (quantized, loss, indices (B * H * W,)), beta on the codebook loss."""

    targets: ClassVar[tuple[str, ...]] = (
        f"{_MODELS}.chameleon.modeling_chameleon.ChameleonVQVAEVectorQuantizer",
        f"{_MODELS}.janus.modeling_janus.JanusVQVAEVectorQuantizer",
    )
    signatures: ClassVar = {"forward": ("hidden_state",)}
    attributes = ("embedding", "embedding_dim", "beta")

    @classmethod
    def describe(cls, module: Any) -> str:
        return f"beta={module.beta:g} on the codebook loss, as the original has it"

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        module: Any = self
        out = quantize_map(hidden_state, module.embedding.weight)
        return out.quantized, out.commitment_loss + module.beta * out.codebook_loss, out.indices


class GlmImageQuantizer(ChameleonQuantizer):
    """GLM-Image's: unit vectors against unit codes, straight-through to the unit vectors."""

    targets = (f"{_MODELS}.glm_image.modeling_glm_image.GlmImageVQVAEVectorQuantizer",)

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        module: Any = self
        units = functional.normalize(hidden_state, dim=1)
        out = quantize_map(units, functional.normalize(module.embedding.weight, dim=-1))
        return out.quantized, out.commitment_loss + module.beta * out.codebook_loss, out.indices


class Emu3Quantizer(Adapter):
    """Emu3's: (B, T, C, H, W) to indices (B, T, H, W), nothing else."""

    targets = (f"{_MODELS}.emu3.modeling_emu3.Emu3VQVAEVectorQuantizer",)
    signatures: ClassVar = {"forward": ("hidden_state",)}
    attributes = ("embedding",)

    def forward(self, hidden_state: Tensor) -> Tensor:
        module: Any = self
        check_map(hidden_state, module.embedding.weight, 5, 2)
        batch, frames = hidden_state.shape[:2]
        indices, _ = nearest(hidden_state.flatten(0, 1).movedim(1, -1), module.embedding.weight)
        return indices.reshape(batch, frames, *indices.shape[1:])


ADAPTERS = (ChameleonQuantizer, GlmImageQuantizer, Emu3Quantizer)
