"""Audio codecs that live in repositories: descript-audio-codec, EnCodec and AudioCraft, Moshi, and copies of them.

Read by :mod:`vqkernels.patch`. Copies are known by the end of the class path, by attributes and by the parameters of
the methods that are replaced.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor

from vqkernels.functional import codebook_sum, nearest
from vqkernels.recognisers._adapter import Adapter
from vqkernels.recognisers._copies import unknown_attributes

__all__ = ["ADAPTERS"]


class DescriptQuantizer(Adapter):
    """One level of descript-audio-codec: latents (B, D, T) to the raw codes nearest by angle, and indices (B, T)."""

    targets = ("*.nn.quantize.VectorQuantize",)
    overrides = ("decode_latents",)
    signatures: ClassVar = {"decode_latents": ("latents",), "decode_code": ("embed_id",)}
    attributes = ("codebook", "in_proj", "out_proj", "codebook_dim")

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        return unknown_attributes(module, cls.overrides, (*cls.attributes, "codebook_size", "decode_code"))

    def decode_latents(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        module: Any = self
        indices, _ = nearest(latents.transpose(1, 2), module.codebook.weight, metric="cosine")
        return module.decode_code(indices), indices


class EuclideanCodebook(Adapter):
    """EnCodec's and AudioCraft's: search, k-means start and moving averages without N x K (or N x K x D) arrays.

    The order of a training step is the original's, and so are its random numbers: start, search, gather, expiry (which
    the update of ``embed`` at the end undoes, in the original too), moving averages, Laplace smoothing.
    """

    targets = ("*.core_vq.EuclideanCodebook",)
    overrides = ("quantize", "encode", "forward", "init_embed_")
    relies_on = ("preprocess", "postprocess_emb")
    signatures: ClassVar = {
        "quantize": ("x",),
        "encode": ("x",),
        "forward": ("x",),
        "init_embed_": ("data",),
        "expire_codes_": ("batch_samples",),
    }
    attributes = ("inited", "cluster_size", "embed", "embed_avg", "decay", "epsilon", "kmeans_iters")
    available_fixes: ClassVar = {
        "encodec-expiry": "dead codes are really replaced: after the moving averages, which follow to the new code"
    }

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        helpers = ("codebook_size", "threshold_ema_dead_code", "dequantize", "expire_codes_", "replace_")
        return unknown_attributes(module, cls.overrides, (*cls.attributes, *cls.relies_on, *helpers))

    @classmethod
    def describe(cls, module: Any) -> str:
        return f"EMA codebook, decay={module.decay:g}"

    def quantize(self, x: Tensor) -> Tensor:
        codes: Any = self.embed
        return nearest(x, codes)[0]

    def encode(self, x: Tensor) -> Tensor:
        return self.quantize(x)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        module: Any = self
        if not module.inited:
            self.init_embed_(x.reshape(-1, x.shape[-1]))
        indices = self.quantize(x)
        quantized = module.dequantize(indices)
        if module.training:
            rows = x.detach().reshape(-1, x.shape[-1])
            if "encodec-expiry" in self.fixes:
                self._update(rows, indices.reshape(-1))
                self._expire(rows)
            else:
                module.expire_codes_(rows)
                self._update(rows, indices.reshape(-1))
        return quantized, indices

    def _update(self, rows: Tensor, indices: Tensor) -> None:
        module: Any = self
        sums, counts = codebook_sum(rows, indices, module.codebook_size)
        size, total = module.cluster_size.data, module.embed_avg.data
        size.mul_(module.decay).add_(counts.to(size.dtype), alpha=1 - module.decay)
        total.mul_(module.decay).add_(sums.to(total.dtype), alpha=1 - module.decay)
        smoothed = (size + module.epsilon) / (size.sum() + module.codebook_size * module.epsilon) * size.sum()
        module.embed.data.copy_(total / smoothed.unsqueeze(1))

    def _expire(self, rows: Tensor) -> None:
        """The original's replacement, its broadcast included, and averages that agree with the new codes."""
        module: Any = self
        module.expire_codes_(rows)
        least = module.threshold_ema_dead_code
        size, total = module.cluster_size.data, module.embed_avg.data
        dead = size < least
        total.copy_(torch.where(dead.unsqueeze(1), module.embed * least, total))
        size.copy_(torch.where(dead, float(least), size))

    def init_embed_(self, data: Tensor) -> None:
        module: Any = self
        broadcast = _broadcast_of(module)
        if broadcast is None and torch.distributed.is_available() and torch.distributed.is_initialized():
            super().init_embed_(data)  # type: ignore[misc]
        elif not module.inited:
            codes, counts = _kmeans(data.detach(), module.codebook_size, module.kmeans_iters)
            module.embed.data.copy_(codes)
            module.embed_avg.data.copy_(codes)
            module.cluster_size.data.copy_(counts)
            module.inited.data.fill_(1)
            if broadcast is not None:
                broadcast(module.buffers())


def _broadcast_of(module: Any) -> Any:
    """The ``broadcast_tensors`` that the original's file uses to keep ranks in step, or ``None``."""
    source = sys.modules.get(EuclideanCodebook.original_of(type(module)).__module__)
    distrib = getattr(source, "distrib", None) or getattr(getattr(source, "flashy", None), "distrib", None)
    return getattr(distrib, "broadcast_tensors", None)


def _kmeans(rows: Tensor, codes: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations from random rows, drawn as the original draws them; an empty cluster keeps its old mean."""
    count = rows.shape[0]
    if count >= codes:
        chosen = torch.randperm(count, device=rows.device)[:codes]
    else:
        chosen = torch.randint(0, count, (codes,), device=rows.device)
    means = rows[chosen]
    counts = means.new_zeros(codes)
    for _ in range(iterations):
        sums, counts = codebook_sum(rows, nearest(rows, means)[0], codes)
        means = torch.where(counts[:, None] > 0, (sums / counts.clamp(min=1)[:, None]).to(means.dtype), means)
    return means, counts


class MoshiCodebook(Adapter):
    """Moshi's training codebook: ``_quantize`` (N, D) and ``encode`` (..., D) to indices.

    Its updates are scatter-adds without an N x K array and stay the original's, and so does its k-means start, which
    gathers the rows of all ranks and runs once.
    """

    targets = ("*.core_vq.EuclideanCodebook",)
    overrides = ("_quantize", "encode")
    relies_on = ("_reshape_input", "_reshape_codes")
    signatures: ClassVar = {"_quantize": ("x",), "encode": ("x",)}
    # Not "embedding": that property keeps what it computes, and would keep it from before a checkpoint is loaded.
    attributes = ("cluster_usage", "embedding_sum")

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        # "dim" is an attribute, and a method of the tensors that these methods are about.
        return unknown_attributes(module, cls.overrides, (*cls.attributes, *cls.relies_on, "embedding", "dim"))

    @classmethod
    def describe(cls, module: Any) -> str:
        return f"EMA codebook, decay={module.decay:g}; k-means start by the original"

    def _quantize(self, x: Tensor) -> Tensor:
        codes: Any = self.embedding
        return nearest(x, codes)[0]

    def encode(self, x: Tensor) -> Tensor:
        return self._quantize(x)


ADAPTERS = (DescriptQuantizer, EuclideanCodebook, MoshiCodebook)
