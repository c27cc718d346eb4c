"""``ResidualVQ`` of vector-quantize-pytorch in eval: all levels in one search, where they only search and gather.

Everything else is the library's loop over its levels, whose ``VectorQuantize`` are switched on their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules import module as modules

from vqkernels._arguments import autocast_dtype
from vqkernels._gradients import transformed
from vqkernels.levels import residual_nearest
from vqkernels.recognisers._adapter import Adapter, class_path
from vqkernels.recognisers.vector_quantize_pytorch.codebook import CodebookAdapter
from vqkernels.recognisers.vector_quantize_pytorch.modules import VectorQuantizeAdapter

__all__ = ["ResidualVQAdapter"]


class ResidualVQAdapter(Adapter):
    """``ResidualVQ``, and ``GroupedResidualVQ`` with it."""

    targets = ("vector_quantize_pytorch.residual_vq.ResidualVQ",)
    signatures: ClassVar = {
        "forward": (
            "x",
            "mask",
            "indices",
            "return_all_codes",
            "sample_codebook_temp",
            "freeze_codebook",
            "beam_size",
            "rand_quantize_dropout_fixed_seed",
        )
    }
    attributes = (
        "layers",
        "project_in",
        "project_out",
        "eval_beam_size",
        "implicit_neural_codebook",
        "diveq",
        "accept_image_fmap",
    )

    @classmethod
    def describe(cls, module: Any) -> str:
        one = not (module.implicit_neural_codebook or module.diveq or (module.eval_beam_size or 1) > 1)
        return f"{len(module.layers)} levels" + (", in one search in eval without gradients" if one else "")

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Any = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> Any:
        module: Any = self
        plain = not (
            module.training
            or mask is not None
            or indices is not None
            or return_all_codes
            or torch.is_grad_enabled()
            or transformed(x)
            or module.implicit_neural_codebook
            or module.diveq
            or module.accept_image_fmap
            or (beam_size or module.eval_beam_size or 1) > 1
            or x.dim() != 3
            or x.dtype != torch.float32
            or autocast_dtype(x) is not None
            or modules._has_any_global_hook()  # type: ignore[no-untyped-call]
        )
        codebooks = _codebooks(module.layers) if plain else None
        if codebooks is None:
            return super().forward(
                x,
                mask=mask,
                indices=indices,
                return_all_codes=return_all_codes,
                sample_codebook_temp=sample_codebook_temp,
                freeze_codebook=freeze_codebook,
                beam_size=beam_size,
                rand_quantize_dropout_fixed_seed=rand_quantize_dropout_fixed_seed,
            )
        found = residual_nearest(module.project_in(x), codebooks)
        return module.project_out(found.quantized), found.indices.contiguous(), x.new_zeros(len(codebooks))


def _codebooks(layers: Sequence[Any]) -> list[Tensor] | None:
    """The codebooks (K, D) if every level does nothing but search its own; else ``None``."""
    found = []
    for layer in layers:
        codebook = layer._codebook
        if not (
            _is_own(layer, VectorQuantizeAdapter)
            and _is_own(codebook, CodebookAdapter)
            and layer.heads == 1
            and layer.channel_last
            and not layer.training
            and not codebook.use_cosine_sim
            and not codebook.affine_param
            and codebook.vq_bridge is None
            and codebook.embed.dtype == torch.float32
            and codebook.initted
        ):
            return None
        found.append(codebook.embed[0])
    return found


def _is_own(module: Any, adapter: type[Adapter]) -> bool:
    """Whether a module is the library's own class on ``adapter``, with nothing hung on it."""
    key = getattr(type(module), "_vqkernels_key", (None, object))
    return (
        key[0] is adapter
        and class_path(key[1]) in adapter.targets
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not any(name in vars(module) for name in ("forward", "quantize"))
    )
