"""Re-statements, continued: VAR's multi-scale quantizer, the SimVQ repository's, and IBQ's.

Contracts in our own words, as in ``restated.py``: what the classes take, compute, return and store.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from restated import channels_last, channels_second, expanded, mean_square, stands_for, through
from torch import Tensor, nn
from torch.nn import functional


class LossBreakdown(NamedTuple):
    """The SimVQ repository's."""

    per_sample_entropy: Tensor
    codebook_entropy: Tensor
    commitment: Tensor
    avg_probs: Tensor


@stands_for("taming.modules.vqvae.quantize.SimVQ")
class RepositorySimVQ(nn.Module):
    """Frozen codes, a linear layer over them that learns; the entry of an index is the frozen code."""

    def __init__(
        self, n_e: int, e_dim: int, beta: float = 0.25, sane_index_shape: bool = False, legacy: bool = True
    ) -> None:
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.sane_index_shape, self.remap, self.re_embed = sane_index_shape, None, n_e
        self.embedding = nn.Embedding(n_e, e_dim).requires_grad_(False)
        self.embedding_proj = nn.Linear(e_dim, e_dim)

    def remap_to_used(self, inds: Tensor) -> Tensor:
        raise AssertionError("never called: remap is None here, and the method stands for the contract's names")

    def forward(self, z: Tensor, temp: Any = None, rescale_logits: bool = False, return_logits: bool = False) -> Any:
        assert temp is None or temp == 1.0
        z = z.movedim(1, -1).contiguous()
        assert z.shape[-1] == self.e_dim
        codes = self.embedding_proj(self.embedding.weight)
        indices = expanded(z.flatten(0, -2), codes).argmin(1)
        q = codes[indices].view(z.shape)
        to_input, to_codes = mean_square(q.detach(), z), mean_square(q, z.detach())
        loss = to_input + self.beta * to_codes if self.legacy else self.beta * to_input + to_codes
        if self.sane_index_shape:
            indices = indices.view(z.shape[0], z.shape[1], z.shape[2])
        zero = torch.tensor(0.0)
        return (through(z, q).movedim(-1, 1).contiguous(), zero, indices), LossBreakdown(zero, zero, loss, zero)

    def get_codebook_entry(self, indices: Tensor, shape: Any) -> Tensor:
        q = self.embedding(indices)
        return q if shape is None else channels_second(q.view(shape))


@stands_for("taming.modules.vqvae.quantize.SimVQ1D")
class RepositorySimVQ1D(RepositorySimVQ):
    """The same for sequences, with a ``forward`` of its own."""

    def forward(self, z: Tensor, temp: Any = None, rescale_logits: bool = False, return_logits: bool = False) -> Any:
        return RepositorySimVQ.forward(self, z, temp, rescale_logits, return_logits)


@stands_for("src.IBQ.modules.vqvae.quantize.IndexPropagationQuantize")
class Ibq(nn.Module):
    """The largest dot product; ``hard - sg(soft) + soft`` times the codes; three error terms, entropies if asked."""

    def __init__(self, n_e: int, e_dim: int, beta: float = 0.25, temperature: float | None = None) -> None:
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.use_entropy_loss = n_e, e_dim, beta, temperature is not None
        self.remap, self.entropy_temperature = None, temperature
        self.sample_minimization_weight, self.batch_maximization_weight = 1.0, 0.7
        self.embedding = nn.Embedding(n_e, e_dim)

    def forward(self, z: Tensor, temp: Any = None, return_logits: bool = False) -> Any:
        rows = channels_last(z)
        logits = rows @ self.embedding.weight.t()
        soft = logits.softmax(-1)
        indices = soft.argmax(-1)
        hard = functional.one_hot(indices, self.n_e).to(soft)
        q = (hard - soft.detach() + soft) @ self.embedding.weight
        chosen = hard @ self.embedding.weight
        loss = mean_square(q, rows) + mean_square(chosen.detach(), rows)
        loss = loss + self.beta * mean_square(chosen, rows.detach())
        diff: Any = loss
        if self.use_entropy_loss:
            affinity = (logits / self.entropy_temperature).flatten(0, -2)
            p = affinity.softmax(-1)
            own = -(p * (affinity + 1e-5).log_softmax(-1)).sum(-1).mean()
            batch = -(p.mean(0) * (p.mean(0) + 1e-5).log()).sum()
            both = self.sample_minimization_weight * own - self.batch_maximization_weight * batch
            diff = (loss, own, batch, both)
        return channels_second(q), diff, (None, None, indices.flatten())


class Phi(nn.Conv2d):
    """A share of a 3 x 3 convolution, added to the rest of the map itself."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = ratio

    def forward(self, h: Tensor) -> Tensor:
        return h * (1 - self.ratio) + self.ratio * super().forward(h)


class FewPhi(nn.Module):
    """The convolution for a position between the first scale (0) and the last (1)."""

    def __init__(self, channels: int, count: int, ratio: float) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(channels, ratio) for _ in range(count))
        edge = 1 / 3 / count if count == 4 else 1 / 2 / count
        self.ticks = torch.linspace(edge, 1 - edge, count, dtype=torch.float64)

    def __getitem__(self, at: float) -> nn.Module:
        return self.qresi_ls[int((self.ticks - at).abs().argmin())]


def one_scale(var: Any, rest: Tensor, scale: int, sizes: Any) -> tuple[Tensor, Tensor]:
    """Indices (B, h, w) of one scale, and what it adds to the map."""
    last = scale == len(sizes) - 1
    rows = rest if last else functional.interpolate(rest, size=sizes[scale], mode="area")
    rows, codes = channels_last(rows).flatten(0, 2), var.embedding.weight.detach()
    if var.using_znorm:
        found = (functional.normalize(rows, dim=-1) @ functional.normalize(codes, dim=-1).t()).argmax(1)
    else:
        found = expanded(rows, codes).argmin(1)
    found = found.view(len(rest), *sizes[scale])
    h = channels_second(var.embedding(found))
    h = h if last else functional.interpolate(h, size=sizes[-1], mode="bicubic")
    return found, var.quant_resi[scale / (len(sizes) - 1)](h)


@stands_for("models.quant.VectorQuantizer2")
class Var(nn.Module):
    """VAR: average the residual down, search, look up, upsample, smooth, subtract; training needs a process group."""

    def __init__(self, vocab_size: int, Cvae: int, using_znorm: bool, v_patch_nums: tuple[int, ...]) -> None:
        super().__init__()
        self.vocab_size, self.Cvae, self.using_znorm, self.v_patch_nums = vocab_size, Cvae, using_znorm, v_patch_nums
        self.quant_resi = FewPhi(Cvae, 2, 0.5)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(v_patch_nums), vocab_size))
        self.record_hit, self.prog_si, self.beta = 0, -1, 0.25
        self.embedding = nn.Embedding(vocab_size, Cvae)

    def forward(self, f_BChw: Tensor, ret_usages: bool = False) -> Any:
        f = f_BChw.float()
        processes = torch.distributed.get_world_size()  # without a group: an error
        sizes = [(n, n) for n in self.v_patch_nums]
        rest, f_hat, loss = f.detach().clone(), torch.zeros_like(f), torch.zeros(())
        for scale in range(len(sizes)):
            found, h = one_scale(self, rest, scale, sizes)
            f_hat, rest = f_hat + h, rest - h.detach()
            loss = loss + self.beta * mean_square(f_hat.detach(), f) + mean_square(f_hat, f.detach())
            if self.training:
                hits = torch.bincount(found.flatten(), minlength=self.vocab_size).float()
                torch.distributed.all_reduce(hits)
                step = 1.0 if self.record_hit == 0 else 0.1 if self.record_hit < 100 else 0.01
                self.ema_vocab_hit_SV[scale].lerp_(hits, step)
                self.record_hit += 1
        least = processes * f.numel() / self.Cvae / self.vocab_size * 0.08
        usages = [100 * (hit >= least).float().mean().item() for hit in self.ema_vocab_hit_SV]
        return through(f, f_hat), usages if ret_usages else None, loss / len(sizes)

    def f_to_idxBl_or_fhat(self, f_BChw: Tensor, to_fhat: bool, v_patch_nums: Any = None) -> list[Tensor]:
        sizes = [(n, n) if isinstance(n, int) else tuple(n) for n in v_patch_nums or self.v_patch_nums]
        rest, f_hat, out = f_BChw.detach().clone(), torch.zeros_like(f_BChw), []
        for scale in range(len(sizes)):
            found, h = one_scale(self, rest, scale, sizes)
            f_hat, rest = f_hat + h, rest - h.detach()
            out.append(f_hat if to_fhat else found.flatten(1))
        return out
