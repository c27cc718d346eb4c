"""Re-statements: the contracts of quantizers that only exist as repositories, in our own words and as few lines as do.

Written from what the classes take, compute, return and store, not from their code; each takes the class path of what
it stands for, so that ``patch`` recognises it. Remapping, k-means and dead codes are in where an adapter touches them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def stands_for(path: str) -> Any:
    """Give a class the module and the name of the class whose contract it re-states."""

    def rename(cls: type) -> type:
        cls.__module__, _, cls.__qualname__ = path.rpartition(".")
        cls.__name__ = cls.__qualname__
        return cls

    return rename


def expanded(x: Tensor, e: Tensor) -> Tensor:
    """The usual formula, N x K."""
    return x.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * (x @ e.t())


def channels_last(z: Tensor) -> Tensor:
    return z.permute(0, 2, 3, 1).contiguous()


def channels_second(z: Tensor) -> Tensor:
    return z.permute(0, 3, 1, 2).contiguous()


def through(z: Tensor, q: Tensor) -> Tensor:
    """Straight-through, as everybody writes it."""
    return z + (q - z).detach()


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean()


class _Table(nn.Module):
    def __init__(self, n_e: int, e_dim: int, beta: float) -> None:
        super().__init__()
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.embedding = nn.Embedding(n_e, e_dim)


@stands_for("taming.modules.vqvae.quantize.VectorQuantizer2")
class Taming2(_Table):
    """taming-transformers: beta on the codebook term if ``legacy``; indices remapped to positions in ``used``."""

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: Tensor | None = None,
        unknown_index: Any = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__(n_e, e_dim, beta)
        self.legacy, self.sane_index_shape, self.remap = legacy, sane_index_shape, remap
        self.re_embed = n_e
        if remap is not None:
            self.register_buffer("used", remap)
            extra = unknown_index == "extra"
            self.unknown_index = len(remap) if extra else unknown_index
            self.re_embed = len(remap) + extra

    def remap_to_used(self, inds: Tensor) -> Tensor:
        hit = inds.flatten(1)[..., None] == self.used
        new = hit.long().argmax(-1)
        missing = ~hit.any(-1)
        if self.unknown_index == "random":
            new[missing] = torch.randint(0, self.re_embed, size=new[missing].shape)
        else:
            new[missing] = self.unknown_index
        return new.reshape(inds.shape)

    def forward(self, z: Tensor, temp: Any = None, rescale_logits: bool = False, return_logits: bool = False) -> Any:
        assert temp is None or temp == 1.0
        assert not rescale_logits
        assert not return_logits
        z = channels_last(z)
        indices = expanded(z.flatten(0, 2), self.embedding.weight).argmin(1)
        q = self.embedding(indices).view(z.shape)
        to_input, to_codes = mean_square(q.detach(), z), mean_square(q, z.detach())
        loss = to_input + self.beta * to_codes if self.legacy else self.beta * to_input + to_codes
        if self.remap is not None:
            indices = self.remap_to_used(indices.view(len(z), -1)).view(-1, 1)
        if self.sane_index_shape:
            indices = indices.view(z.shape[:3])
        return channels_second(through(z, q)), loss, (None, None, indices)


@stands_for("taming.modules.vqvae.quantize.VectorQuantizer")
class Taming1(_Table):
    """taming-transformers, first version: always legacy; returns perplexity, one-hot codes and indices (N, 1)."""

    def forward(self, z: Tensor) -> Any:
        z = channels_last(z)
        indices = expanded(z.flatten(0, 2), self.embedding.weight).argmin(1)
        one_hot = functional.one_hot(indices, self.n_e).to(z)
        q = (one_hot @ self.embedding.weight).view(z.shape)
        loss = mean_square(q.detach(), z) + self.beta * mean_square(q, z.detach())
        share = one_hot.mean(0)
        perplexity = (-(share * (share + 1e-10).log()).sum()).exp()
        return channels_second(through(z, q)), loss, (perplexity, one_hot, indices[:, None])

    def get_codebook_entry(self, indices: Tensor, shape: Any) -> Tensor:
        q = functional.one_hot(indices, self.n_e).float() @ self.embedding.weight
        return q if shape is None else channels_second(q.view(shape))


class _EmaTable(nn.Module):
    def __init__(self, codes: int, dim: int, decay: float, eps: float) -> None:
        super().__init__()
        self.decay, self.eps, self.update = decay, eps, True
        weight = torch.randn(codes, dim)
        for name, value in {"weight": weight, "cluster_size": torch.zeros(codes), "embed_avg": weight.clone()}.items():
            setattr(self, name, nn.Parameter(value, requires_grad=False))

    def forward(self, indices: Tensor) -> Tensor:
        return functional.embedding(indices, self.weight)

    def cluster_size_ema_update(self, counts: Tensor) -> None:
        self.cluster_size.data.lerp_(counts, 1 - self.decay)

    def embed_avg_ema_update(self, sums: Tensor) -> None:
        self.embed_avg.data.lerp_(sums, 1 - self.decay)

    def weight_update(self, codes: int) -> None:
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) / (total + codes * self.eps) * total
        self.weight.data.copy_(self.embed_avg / smoothed[:, None])


@stands_for("taming.modules.vqvae.quantize.EMAVectorQuantizer")
class TamingEma(nn.Module):
    """taming-transformers, as its constructor means it (the original's raises NameError)."""

    def __init__(self, n_embed: int, embedding_dim: int, beta: float, decay: float = 0.99, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_tokens, self.codebook_dim, self.beta = n_embed, embedding_dim, beta
        self.embedding = _EmaTable(n_embed, embedding_dim, decay, eps)

    def forward(self, z: Tensor) -> Any:
        z = channels_last(z)
        rows = z.flatten(0, 2)
        indices = expanded(rows, self.embedding.weight).argmin(1)
        q = self.embedding(indices).view(z.shape)
        one_hot = functional.one_hot(indices, self.num_tokens).to(z)
        share = one_hot.mean(0)
        if self.training and self.embedding.update:
            self.embedding.cluster_size_ema_update(one_hot.sum(0))
            self.embedding.embed_avg_ema_update((one_hot.t() @ rows).detach())
            self.embedding.weight_update(self.num_tokens)
        perplexity = (-(share * (share + 1e-10).log()).sum()).exp()
        loss = self.beta * mean_square(q.detach(), z)
        return channels_second(through(z, q)), loss, (perplexity, one_hot, indices)


@stands_for("taming.modules.vqvae.quantize.GumbelQuantize")
class TamingGumbel(nn.Module):
    """taming-transformers: samples instead of searching."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(codes, dim)

    def forward(self, logits: Tensor) -> Tensor:
        return functional.gumbel_softmax(logits) @ self.embed.weight


@stands_for("tokenizer.tokenizer_image.vq_model.VectorQuantizer")
class LlamaGen(_Table):
    """LlamaGen: unit vectors, four training losses, usage over a window of tokens."""

    def __init__(
        self, n_e: int, e_dim: int, beta: float, entropy_loss_ratio: float, l2_norm: bool, show_usage: bool
    ) -> None:
        super().__init__(n_e, e_dim, beta)
        self.entropy_loss_ratio, self.l2_norm, self.show_usage = entropy_loss_ratio, l2_norm, show_usage
        if show_usage:
            self.register_buffer("codebook_used", torch.zeros(65536))

    def forward(self, z: Tensor) -> Any:
        z, codes = channels_last(z), self.embedding.weight
        if self.l2_norm:
            z, codes = functional.normalize(z, dim=-1), functional.normalize(codes, dim=-1)
        distance = expanded(z.flatten(0, 2), codes)
        indices = distance.argmin(1)
        q = codes[indices].view(z.shape)
        losses: Any = (None, None, None, 0)
        if self.training:
            usage: float = 0
            if self.show_usage:
                self.codebook_used.copy_(torch.cat([self.codebook_used, indices])[len(indices) :])
                usage = len(self.codebook_used.unique()) / self.n_e
            probability = (-distance / 0.01).softmax(-1)
            entropy = -(probability * (-distance / 0.01 + 1e-5).log_softmax(-1)).sum(-1).mean()
            average = probability.mean(0)
            entropy = entropy + (average * (average + 1e-5).log()).sum()
            to_input, to_codes = mean_square(q.detach(), z), mean_square(q, z.detach())
            losses = (to_codes, self.beta * to_input, self.entropy_loss_ratio * entropy, usage)
        return through(z, q).permute(0, 3, 1, 2), losses, (None, None, indices)


@stands_for("dac.nn.quantize.VectorQuantize")
class Descript(nn.Module):
    """descript-audio-codec: search between unit vectors, everything else with the raw ones; losses per sample."""

    def __init__(self, input_dim: int, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.codebook_size, self.codebook_dim = codebook_size, codebook_dim
        self.in_proj = nn.utils.parametrizations.weight_norm(nn.Conv1d(input_dim, codebook_dim, 1))
        self.out_proj = nn.utils.parametrizations.weight_norm(nn.Conv1d(codebook_dim, input_dim, 1))
        self.codebook = nn.Embedding(codebook_size, codebook_dim)

    def decode_code(self, embed_id: Tensor) -> Tensor:
        return functional.embedding(embed_id, self.codebook.weight).transpose(1, 2)

    def decode_latents(self, latents: Tensor) -> Any:
        rows = functional.normalize(latents.transpose(1, 2).flatten(0, 1))
        indices = (-expanded(rows, functional.normalize(self.codebook.weight))).max(1)[1].view(len(latents), -1)
        return self.decode_code(indices), indices

    def forward(self, z: Tensor) -> Any:
        latents = self.in_proj(z)
        q, indices = self.decode_latents(latents)
        to_input = (latents - q.detach()).square().mean([1, 2])
        to_codes = (q - latents.detach()).square().mean([1, 2])
        return self.out_proj(through(latents, q)), to_input, to_codes, indices, latents


def sample_rows(rows: Tensor, count: int) -> Tensor:
    """Different rows if there are enough, else with repetition."""
    enough = len(rows) >= count
    return rows[torch.randperm(len(rows))[:count] if enough else torch.randint(0, len(rows), (count,))]


@stands_for("encodec.quantization.core_vq.EuclideanCodebook")
class EncodecCodebook(nn.Module):
    """EnCodec and AudioCraft: k-means start, moving averages, expiry that the update undoes."""

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        threshold_ema_dead_code: int = 2,
    ) -> None:
        super().__init__()
        self.decay, self.epsilon, self.codebook_size = decay, epsilon, codebook_size
        self.kmeans_iters, self.threshold_ema_dead_code = kmeans_iters, threshold_ema_dead_code
        embed = torch.zeros(codebook_size, dim) if kmeans_init else torch.randn(codebook_size, dim)
        self.register_buffer("inited", torch.tensor([float(not kmeans_init)]))
        self.register_buffer("cluster_size", torch.zeros(codebook_size))
        self.register_buffer("embed", embed)
        self.register_buffer("embed_avg", embed.clone())

    def init_embed_(self, data: Tensor) -> None:
        if self.inited:
            return
        data = data.detach()
        means = sample_rows(data, self.codebook_size)
        for _ in range(self.kmeans_iters):
            nearest = (data[:, None] - means).square().sum(-1).argmin(1)
            counts = torch.bincount(nearest, minlength=self.codebook_size)
            sums = torch.zeros_like(means).index_add_(0, nearest, data)
            means = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], means)
        for buffer, value in ((self.embed, means), (self.embed_avg, means), (self.cluster_size, counts)):
            buffer.copy_(value)
        self.inited.fill_(1)

    def expire_codes_(self, batch_samples: Tensor) -> None:
        expired = self.cluster_size < self.threshold_ema_dead_code
        if self.threshold_ema_dead_code and expired.any():
            self.embed.copy_(
                torch.where(expired[:, None], sample_rows(batch_samples.detach(), self.codebook_size), self.embed)
            )

    def preprocess(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def postprocess_emb(self, embed_ind: Tensor, shape: Any) -> Tensor:
        return embed_ind.view(*shape[:-1])

    def quantize(self, x: Tensor) -> Tensor:
        return (-expanded(x, self.embed)).max(-1).indices

    def dequantize(self, embed_ind: Tensor) -> Tensor:
        return functional.embedding(embed_ind, self.embed)

    def encode(self, x: Tensor) -> Tensor:
        return self.postprocess_emb(self.quantize(self.preprocess(x)), x.shape)

    def decode(self, embed_ind: Tensor) -> Tensor:
        return self.dequantize(embed_ind)

    def forward(self, x: Tensor) -> Any:
        rows = self.preprocess(x)
        self.init_embed_(rows)
        flat = self.quantize(rows)
        indices = self.postprocess_emb(flat, x.shape)
        quantized = self.dequantize(indices)
        if self.training:
            self.expire_codes_(rows)
            one_hot = functional.one_hot(flat, self.codebook_size).to(rows)
            self.cluster_size.lerp_(one_hot.sum(0), 1 - self.decay)
            self.embed_avg.lerp_((one_hot.t() @ rows).detach(), 1 - self.decay)
            total = self.cluster_size.sum()
            smoothed = (self.cluster_size + self.epsilon) / (total + self.codebook_size * self.epsilon) * total
            self.embed.copy_(self.embed_avg / smoothed[:, None])
        return quantized, indices


class EncodecLevels(nn.Module):
    """EnCodec's residual levels around it: (B, D, N) in and out, straight-through at each level, losses (Q, 1)."""

    def __init__(self, levels: int, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncodecCodebook(**options) for _ in range(levels))

    def forward(self, x: Tensor) -> Any:
        residual, total, indices, losses = x, torch.zeros(()), [], []
        for layer in self.layers:
            rows = residual.transpose(1, 2)
            q, found = layer(rows)
            q = through(rows, q) if self.training else q
            losses.append(functional.mse_loss(q.detach(), rows).reshape(1))
            residual, total = residual - q.transpose(1, 2), total + q.transpose(1, 2)
            indices.append(found)
        return total, torch.stack(indices), torch.stack(losses)


@stands_for("moshi.quantization.core_vq.EuclideanCodebook")
class MoshiCodebook(nn.Module):
    """Moshi: codes are sums over usage, computed when asked for and kept; updates by scatter-add."""

    def __init__(self, dim: int, codebook_size: int, decay: float = 0.99, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.dim, self.codebook_size, self.decay, self.epsilon = dim, codebook_size, decay, epsilon
        self.register_buffer("_initialized", torch.ones(1))
        self.register_buffer("cluster_usage", torch.ones(codebook_size))
        self.register_buffer("embedding_sum", torch.randn(codebook_size, dim))
        self.register_buffer("_embedding", None, persistent=False)

    @property
    def embedding(self) -> Tensor:
        if self._embedding is None:
            self._embedding = self.embedding_sum / self.cluster_usage.clamp(min=self.epsilon)[:, None]
        return self._embedding

    def _reshape_input(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def _reshape_codes(self, codes: Tensor, shape: Any) -> Tensor:
        return codes.view(*shape[:-1])

    def _quantize(self, x: Tensor) -> Tensor:
        return torch.cdist(x[None], self.embedding[None])[0].argmin(-1)

    def encode(self, x: Tensor) -> Tensor:
        return self._reshape_codes(self._quantize(self._reshape_input(x)), x.shape)

    def decode(self, codes: Tensor) -> Tensor:
        return functional.embedding(codes, self.embedding)

    def forward(self, x: Tensor, initialize: bool = True) -> Any:
        rows = self._reshape_input(x)
        flat = self._quantize(rows)
        codes = self._reshape_codes(flat, x.shape)
        quantized = self.decode(codes)
        if self.training:
            self.cluster_usage.lerp_(torch.bincount(flat, minlength=self.codebook_size).float(), 1 - self.decay)
            sums = torch.zeros_like(self.embedding_sum).index_add_(0, flat, rows.detach())
            self.embedding_sum.lerp_(sums, 1 - self.decay)
            self._embedding = None
        return quantized, codes, {}
