"""The codebook of vector-quantize-pytorch: search, gather, moving averages and k-means without an N x K matrix.

Switched together with the ``VectorQuantize`` around it (``modules.py``), never alone: it returns no distances unless
its owner says that they are needed.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vqkernels import ops
from vqkernels._arguments import is_channel_first, without_autocast
from vqkernels.functional import lookup_rows
from vqkernels.recognisers._adapter import Adapter

__all__ = ["CodebookAdapter"]

_MODULE = "vector_quantize_pytorch.vector_quantize_pytorch"


class CodebookAdapter(Adapter):
    """``Codebook``: the same steps in the same order, dead codes and their random draws left to the library."""

    targets = (f"{_MODULE}.Codebook",)
    overrides = ("forward", "init_embed_", "update_indices", "update_ema_indices")
    relies_on = ("update_codebook", "track_cluster_size_and_embed_avg", "update_ema")
    signatures: ClassVar = {
        "forward": (
            "x",
            "sample_codebook_temp",
            "mask",
            "freeze_codebook",
            "codebook_transform_fn",
            "ema_update_weight",
            "accum_ema_update",
            "ema_update",
            "topk",
            "update_usage",
        ),
        "init_embed_": ("data", "mask"),
        "update_indices": ("x", "embed_ind", "mask", "ema_update_weight", "accum_ema_update", "ema_update"),
        "expire_codes_": ("batch_samples", "seq_mask"),
    }
    attributes = (
        "initted",
        "embed",
        "embed_avg",
        "cluster_size",
        "gumbel_sample",
        "learnable_codebook",
        "affine_param",
    )

    # Set on the instance by its owner during a call that looks at all distances.
    needs_distances = False

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        sampler = module.gumbel_sample
        function = sampler.func if isinstance(sampler, functools.partial) else sampler
        if getattr(function, "__module__", None) != _MODULE or function.__name__ != "gumbel_sample":
            return "gumbel_sample() is a function of your own, which is given all distances"
        return None

    def forward(
        self,
        x: Tensor,
        sample_codebook_temp: float | None = None,
        mask: Tensor | None = None,
        freeze_codebook: bool = False,
        codebook_transform_fn: Any = None,
        ema_update_weight: Any = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
        topk: int | None = None,
        update_usage: bool = True,
    ) -> Any:
        rows = _to_rows(x)
        if (
            self.needs_distances
            or (topk is not None and topk != 1)
            or codebook_transform_fn is not None
            or self.draws_at_random(sample_codebook_temp)
            or (rows.shape[0], rows.shape[-1]) != (self.embed.shape[0], self.embed.shape[-1])  # its own error
        ):
            return super().forward(
                x,
                sample_codebook_temp=sample_codebook_temp,
                mask=mask,
                freeze_codebook=freeze_codebook,
                codebook_transform_fn=codebook_transform_fn,
                ema_update_weight=ema_update_weight,
                accum_ema_update=accum_ema_update,
                ema_update=ema_update,
                topk=topk,
                update_usage=update_usage,
            )
        with without_autocast(x):
            mask = _mask_of(rows, mask)
            self.initialize(rows, mask)
            codes = self.prepare(rows, mask)
            indices, _ = ops.nearest(rows.detach(), codes.detach(), self.metric)
            quantized = lookup_rows(codes, indices, is_channel_first(rows))
            if topk is None and self.training and update_usage and not freeze_codebook:
                self.update(rows, indices, mask, ema_update_weight, accum_ema_update, ema_update)
        quantized, indices = quantized.reshape(x.shape), indices.reshape(x.shape[:-1])
        return (quantized, indices, None) if topk is None else (quantized.unsqueeze(-2), indices.unsqueeze(-1), None)

    def update_indices(
        self,
        x: Tensor,
        embed_ind: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: Any = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """The moving averages' step for rows whose codes were chosen elsewhere (beam search)."""
        rows = _to_rows(x)
        indices = embed_ind.reshape(rows.shape[:-1]).clamp(min=0)
        self.update(rows, indices, _mask_of(rows, mask), ema_update_weight, accum_ema_update, ema_update)

    update_ema_indices = update_indices

    def init_embed_(self, data: Tensor, mask: Tensor | None = None) -> None:
        """k-means on the first batch: the library's loop and random draws, in O(N + K*D) memory."""
        if self.initted:
            return
        if mask is not None:
            data = data[mask].view(data.shape[0], -1, data.shape[-1])
        if data.shape[1] < self.codebook_size and (logger := getattr(sys.modules[_MODULE], "logger", None)):
            logger.warning(
                f"k-means init received {data.shape[1]} vectors for a codebook of {self.codebook_size} - duplicates "
                "will be sampled"
            )
        rows = data.detach().unsqueeze(1)
        means = self.sample_fn(data.detach(), self.codebook_size).contiguous()
        counts = torch.zeros_like(self.cluster_size)
        for _ in range(self.kmeans_iters):
            indices, _ = ops.nearest(rows, means, self.metric)
            sums, counts = ops.codebook_sum(rows, indices, self.codebook_size)
            bins = counts.long()
            self.kmeans_all_reduce_fn(bins)
            counts = bins.to(sums.dtype)
            new_means = sums / counts.clamp(min=1).unsqueeze(-1)
            self.kmeans_all_reduce_fn(new_means)
            if self.use_cosine_sim:
                new_means = F.normalize(new_means, dim=-1, eps=1e-6)
            means = torch.where((bins == 0).unsqueeze(-1), means, new_means)
        self.embed_avg.data.copy_(means * counts.unsqueeze(-1))
        self.cluster_size.data.copy_(counts)
        self.update_ema()
        self.initted.data.fill_(True)

    @property
    def metric(self) -> str:
        """The library's cosine similarity does not divide by the norms: stored codes have norm 1."""
        return "dot" if self.use_cosine_sim else "l2"

    def draws_at_random(self, temperature: float | None) -> bool:
        """Whether the index is drawn, or softened, from all distances and not simply the nearest."""
        temperature = self.sample_codebook_temp if temperature is None else temperature
        options = self.gumbel_sample.keywords if isinstance(self.gumbel_sample, functools.partial) else {}
        wanted = options.get("stochastic", False) or options.get("straight_through", False)
        return bool(wanted and self.training and temperature > 0)

    def initialize(self, rows: Tensor, mask: Tensor | None) -> None:
        """k-means on the first rows. Apart from :meth:`prepare`: a compiled graph breaks here, at the test of a buffer,
        and must not carry a detached view of the codes, which the update changes in place, across the gap."""
        if not self.initted:
            self.init_embed_(rows.flatten(1, 2).float(), mask=mask)

    def prepare(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        """The codes to compare with: learnable or not, through the bridge, through the affine map."""
        if self.affine_param:
            self.update_affine(rows.flatten(1, 2).float(), self.embed, mask=mask)
        embed = self.embed if self.learnable_codebook else self.embed.detach()
        # Never to half precision: the library compares rows of it with the codes in float32.
        embed = embed.to(torch.promote_types(rows.dtype, torch.float32))
        if self.vq_bridge is not None:
            embed = self.vq_bridge(embed)
        if self.affine_param:
            scale, _ = self._affine_scale()
            embed = (embed - self.codebook_mean) * scale + self.batch_mean
        codes: Tensor = embed
        return codes

    def _affine_scale(self) -> tuple[Tensor, Tensor]:
        """From codebook to batch statistics, and back."""
        codebook_std = self.codebook_variance.clamp(min=1e-5).sqrt()
        batch_std = self.batch_variance.clamp(min=1e-5).sqrt()
        return batch_std / codebook_std, codebook_std / batch_std

    def update(
        self, rows: Tensor, indices: Tensor, mask: Tensor | None, weight: Any, accumulate: bool, ema_update: bool | None
    ) -> None:
        """``update_codebook`` with indices where the library has a one-hot matrix."""
        ema_update = self.ema_update if ema_update is None else ema_update
        if not ema_update and not self.has_dead_code_replacement:
            return
        samples = rows = rows.detach()
        if self.affine_param:
            samples = (rows - self.batch_mean.unsqueeze(1)) * self._affine_scale()[1].unsqueeze(1)
            samples = samples + self.codebook_mean.unsqueeze(1)
        if mask is not None:
            indices = torch.where(mask.view(indices.shape), indices, -1)
        sums, counts = ops.codebook_sum(samples, indices, self.codebook_size)
        self.all_reduce_fn(counts)
        self.all_reduce_fn(sums)
        if callable(weight):
            weight = weight(sums, counts)
        if accumulate:
            _accumulate(self.cluster_size, counts)
            _accumulate(self.embed_avg, sums)
            return
        rescale = bool(ema_update and not self.manual_ema_update)
        pending = self.cluster_size.grad is not None or self.embed_avg.grad is not None
        if rescale and weight is None and not pending and self.embed.dtype == torch.float32:
            codes = self.embed.data
            ops.ema_update(
                self.cluster_size, self.embed_avg, codes, counts, sums, self.decay, self.eps, self.use_cosine_sim
            )
        else:
            _average(self.cluster_size, counts, self.decay, weight)
            _average(self.embed_avg, sums, self.decay, weight)
            if rescale:
                self.update_ema()
        self.expire_codes_(rows.flatten(1, 2).float(), seq_mask=mask)


def _to_rows(x: Tensor) -> Tensor:
    """(..., D), or (H, B, ..., D) from four dims on, as float32 (H, B, S, D): a view where it can be one."""
    x = x.float()
    if x.dim() < 4:
        x = x.unsqueeze(0)
    while x.dim() < 4:
        x = x.unsqueeze(1)
    return x.flatten(2, -2)


def _mask_of(rows: Tensor, mask: Tensor | None) -> Tensor | None:
    """The caller's (B, S) as (H, N): repeated for heads, which lie in the codebook's or in the batch's dim."""
    if mask is None:
        return None
    h, n = rows.shape[0], rows.shape[1] * rows.shape[2]
    b, s = mask.shape
    return mask.unsqueeze(1).expand(b, n // (b * s), s).reshape(1, n).expand(h, n)


def _accumulate(buffer: Tensor, value: Tensor) -> None:
    if buffer.grad is None:
        buffer.grad = value.clone()
    else:
        buffer.grad.add_(value)


def _average(buffer: Tensor, value: Tensor, decay: float, weight: Any) -> None:
    """One step of a moving average, with what micro-batches have put aside in ``.grad``, weighted per code if asked."""
    if buffer.grad is not None:
        value = value + buffer.grad
        buffer.grad = None
    step = 1.0 - decay
    if isinstance(weight, Tensor):
        weight = weight.unsqueeze(0) if weight.dim() == 1 else weight
        if weight.shape != buffer.shape[:2]:
            raise ValueError(
                f"ema_update_weight has shape {tuple(weight.shape)}; expected {tuple(buffer.shape[:2])}, one per code"
            )
        step = step * weight.reshape(*weight.shape, *[1] * (buffer.dim() - 2))
    elif weight is not None:
        step = step * weight
    buffer.data.lerp_(value.to(buffer), step)
