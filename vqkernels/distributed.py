"""A codebook that is too large for one device: every process owns a range of its codes and searches only those.

Called by users with very large codebooks (K = 2^18 and up). One deterministic merge on (value, index) makes the answer
that of one process holding all codes, bit for bit, whatever the number of processes.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels import _arguments as arguments
from vqkernels import functional
from vqkernels.functional import VQOutput

__all__ = ["ShardedVectorQuantizer", "Shards", "lookup", "nearest", "shards"]

Group = Any  # torch.distributed.ProcessGroup, or None for the default one


class Shards(NamedTuple):
    """How K codes are dealt out: process ``rank`` of ``size`` owns the codes [begin, end) of ``num_codes``."""

    num_codes: int
    rank: int
    size: int
    begin: int
    end: int


def shards(num_codes: int, group: Group = None) -> Shards:
    """The range of codes that this process owns: contiguous, in the order of the ranks, sizes differing by one at most.

    Args:
        num_codes: K, at least the number of processes.
        group: of processes that share the codebook; default all of them, one if ``torch.distributed`` does not run.

    Raises:
        ValueError: there are fewer codes than processes.

    Example:
        >>> shards(10)
        Shards(num_codes=10, rank=0, size=1, begin=0, end=10)
    """
    arguments.check_count("num_codes", num_codes)
    running = dist.is_available() and dist.is_initialized()
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if running else (0, 1)
    if num_codes < size:
        raise ValueError(f"num_codes is {num_codes}; expected at least one code for each of the {size} processes")
    return Shards(num_codes, rank, size, num_codes * rank // size, num_codes * (rank + 1) // size)


def nearest(
    x: Tensor, shard: Tensor, part: Shards, *, metric: str = "l2", group: Group = None
) -> tuple[Tensor, Tensor]:
    """:func:`vqkernels.nearest` of this process's rows in the codes of all processes.

    Every process must call, with rows of its own (their number may differ, and may be 0). Each searches the rows of
    all in its own codes; then two small all-gathers, of (score, index) and of float64 values where float32 scores tie,
    settle every row alike on every process. Communication is O(N*D), memory O(N*D + K*D / size).

    Args:
        x: this process's rows (..., D).
        shard: this process's codes (end - begin, D).
        part: what :func:`shards` returned.
        metric: ``"l2"``, ``"cosine"`` or ``"dot"``.
        group: as for :func:`shards`.

    Returns:
        ``indices`` int64 (...) into all K codes and ``score`` float32 (...), equal to the single-process result.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Example:
        >>> import torch
        >>> nearest(torch.tensor([[0.9, 0.2]]), torch.eye(2), shards(2))[0].tolist()
        [0]
    """
    arguments.check_choice("metric", metric)
    _check_shard(x, shard, part)
    rows, sizes = _gather_rows(x.detach().reshape(-1, x.shape[-1]), part, group)
    indices, score = _search(rows, shard.detach(), part, metric, group)
    here = slice(sum(sizes[: part.rank]), sum(sizes[: part.rank + 1]))
    return indices[here].view(x.shape[:-1]), score[here].view(x.shape[:-1])


def lookup(shard: Tensor, indices: Tensor, part: Shards, *, group: Group = None) -> Tensor:
    """The codes with the given indices, wherever they live; -1 gives zeros. Every process must call; no gradient.

    Args:
        shard: this process's codes (end - begin, D).
        indices: int64 (...), each in [-1, K); every process passes its own.
        part, group: as for :func:`nearest`.

    Returns:
        (..., D) in the dtype of ``shard``.

    Example:
        >>> import torch
        >>> lookup(torch.eye(2), torch.tensor([1, -1]), shards(2)).tolist()
        [[0.0, 1.0], [0.0, 0.0]]
    """
    arguments.check_indices(indices)
    if indices.numel() and (int(indices.min()) < -1 or int(indices.max()) >= part.num_codes):
        raise ValueError(f"indices holds values outside of [-1, {part.num_codes}); expected indices of codes")
    every, sizes = _gather_rows(indices.reshape(-1, 1), part, group)
    values = _own(shard.detach(), every.squeeze(1), part)
    if part.size > 1:
        dist.all_reduce(values, group=group)  # one term of each sum is a code, the others are zeros: exact
    begin = sum(sizes[: part.rank])
    return values[begin : begin + sizes[part.rank]].view(*indices.shape, shard.shape[-1])


def _check_shard(x: Tensor, shard: Tensor, part: Shards) -> None:
    arguments.check_codebook(shard)
    if shard.dim() != 2 or shard.shape[0] != part.end - part.begin:
        raise ValueError(
            f"shard has shape {arguments.shape_of(shard)}; expected ({part.end - part.begin}, D), the codes "
            f"{part.begin} to {part.end - 1} that process {part.rank} owns"
        )
    arguments.check_rows("x", x, shard)


def _gather_rows(rows: Tensor, part: Shards, group: Group) -> tuple[Tensor, list[int]]:
    """Rows (n, D) of all processes, in the order of the ranks, and how many each has."""
    if part.size == 1:
        return rows.contiguous(), [len(rows)]
    counts = torch.empty(part.size, dtype=torch.int64, device=rows.device)
    dist.all_gather_into_tensor(counts, torch.tensor([len(rows)], device=rows.device), group=group)
    sizes: list[int] = counts.tolist()
    # Collectives want equal parts: pad, then cut.
    most = max(sizes)
    padded = F.pad(rows, (0, 0, 0, most - len(rows))).contiguous()
    gathered = _all_gather(padded, part, group)
    return torch.cat([gathered[r, :n] for r, n in enumerate(sizes)]), sizes


def _all_gather(x: Tensor, part: Shards, group: Group) -> Tensor:
    """(size, *x.shape), the same on every process."""
    if part.size == 1:
        return x[None]
    out = torch.empty((part.size * x.shape[0], *x.shape[1:]), dtype=x.dtype, device=x.device)
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out.view(part.size, *x.shape)


def _search(rows: Tensor, shard: Tensor, part: Shards, metric: str, group: Group) -> tuple[Tensor, Tensor]:
    """Winners of all rows in all codes, the same on every process."""
    indices, score = functional.nearest(rows, shard, metric=metric)
    if part.size == 1:
        return indices, score
    scores = _all_gather(score, part, group)
    places = _all_gather(indices + part.begin, part, group)
    cost = scores if metric == "l2" else -scores
    cost = torch.where(cost.isnan(), torch.inf, cost)
    best = cost.amin(0)
    first = (cost == best).int().argmax(0)  # the lowest rank among equals owns the lowest index
    # Scores are rounded to float32 once, which keeps their order but makes ties (and infinities) of float64 values.
    tied = ((cost == best).sum(0) > 1).nonzero().squeeze(1)
    if len(tied):  # read from gathered tensors: every process comes to the same decision
        value = _value(rows[tied], shard[indices[tied]], metric)
        exact = _all_gather(torch.where(value.isnan(), torch.inf, value), part, group)
        exact = torch.where(cost[:, tied] == best[tied], exact, torch.inf)
        least = exact.amin(0)
        winner = (exact == least).int().argmax(0)
        # Nothing can win (a NaN in the row, infinite distances): code 0, which the first process owns.
        first[tied] = torch.where(least == torch.inf, 0, winner)
    every = torch.arange(len(rows), device=rows.device)
    return places[first, every], scores[first, every]


def _value(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    """What is minimised, of row i with code i: float64, in the order of the contract (:mod:`vqkernels.ops.nearest`)."""
    x, codes = x.double(), codes.double()
    total, square = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0])
    for a, e in zip(x.unbind(1), codes.unbind(1), strict=True):
        if metric == "l2":
            difference = a - e
            total = total + difference * difference
        else:
            total = total + a * e
            square = square + e * e
    if metric == "l2":
        return total
    if metric == "cosine":
        # torch's CPU sqrt misses the correctly rounded result in some last bits; numpy's does not.
        length = square.sqrt() if square.device.type != "cpu" else torch.from_numpy(np.sqrt(square.numpy()))
        total = torch.where(length > 0, total / length, torch.where(total.isnan(), total, 0.0 * total))
    return -total


def _own(shard: Tensor, indices: Tensor, part: Shards) -> Tensor:
    """The codes of ``indices`` (n,) that live here, zeros for the others."""
    return functional.lookup(shard, _local(indices, part))


def _local(indices: Tensor, part: Shards) -> Tensor:
    """Global indices as indices into this shard, -1 where another process owns the code."""
    return torch.where((indices >= part.begin) & (indices < part.end), indices - part.begin, -1)


class ShardedVectorQuantizer(nn.Module):
    """:class:`vqkernels.VectorQuantizer` whose codebook is spread over the processes of a group.

    Process r holds the codes ``shards(num_embeddings).begin`` to ``.end`` and their statistics only, so K = 2^20 and
    beyond fit. Indices, outputs, gradients and codebooks are those of one process that sees the joined batch, bit for
    bit, whatever the number of processes; losses are scaled so that their mean over processes is the joined batch's.

    The parameters of other modules are replicated and averaged by DDP as usual; this module's are not: keep it out of
    DDP (``DistributedDataParallel._set_params_and_buffers_to_ignore_for_model``, or wrap encoder and decoder alone).
    ``backward`` uses this process's gradient of the loss for the rows of all: weight the loss alike on every process.

    Args:
        num_embeddings: number of codes K, in all processes together.
        embedding_dim: dims D of a code.
        commitment_cost: weight beta of the commitment loss.
        decay: of the moving averages, in (0, 1); ``None`` for a codebook trained by gradient.
        metric: ``"l2"`` or ``"dot"``.
        channel_dim: 1 for (B, C, ...), -1 for (..., C).
        eps: of the Laplace smoothing.
        seed: of the initial codes U(-1/K, 1/K), drawn code by code, so that they do not depend on the processes.
        group: of processes; default all.

    State: ``codebook`` (end - begin, D), ``cluster_size`` and ``embed_avg`` with a decay: this process's part.
    :meth:`gather_codebook` collects the whole on every process.

    Example:
        >>> import torch
        >>> vq = ShardedVectorQuantizer(64, 8, decay=0.99, channel_dim=-1)
        >>> vq(torch.randn(5, 8)).indices.shape
        torch.Size([5])
    """

    codebook: Tensor
    cluster_size: Tensor | None
    embed_avg: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        commitment_cost: float = 0.25,
        decay: float | None = None,
        metric: str = "l2",
        channel_dim: int = 1,
        eps: float = 1e-5,
        seed: int = 0,
        group: Group = None,
    ) -> None:
        super().__init__()
        arguments.check_count("num_embeddings", num_embeddings)
        arguments.check_count("embedding_dim", embedding_dim)
        arguments.check_number("commitment_cost", commitment_cost)
        arguments.check_number("eps", eps)
        arguments.check_choice("metric", metric, ("l2", "dot"))
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"decay is {decay!r}; expected a number in (0, 1), or None for a gradient codebook")
        if channel_dim not in (1, -1):
            raise ValueError(f"channel_dim is {channel_dim!r}; expected 1 for (B, C, ...) or -1 for (..., C)")
        self.num_embeddings, self.embedding_dim, self.commitment_cost = num_embeddings, embedding_dim, commitment_cost
        self.decay, self.metric, self.channel_dim, self.eps, self.group = decay, metric, channel_dim, eps, group
        self.part = part = shards(num_embeddings, group)
        codes = _initial_codes(part, embedding_dim, seed)
        if decay is None:
            self.codebook = nn.Parameter(codes)
        else:
            self.register_buffer("codebook", codes)
        self.register_buffer("cluster_size", None if decay is None else torch.ones(len(codes)))
        self.register_buffer("embed_avg", None if decay is None else codes.clone())

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedVectorQuantizer:
        """A copy for the same processes: a group of them cannot be copied."""
        memo[id(self.group)] = self.group
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def extra_repr(self) -> str:
        """Sizes and the range of codes that live here."""
        p = self.part
        return f"{self.num_embeddings}, {self.embedding_dim}, codes {p.begin} to {p.end - 1}, decay={self.decay}"

    def forward(self, z: Tensor) -> VQOutput:
        """Quantize this process's ``z`` (B, C, ...) or (..., C); every process must call.

        Raises:
            ValueError, TypeError: shape, dtype or device do not fit.
        """
        arguments.check_float_tensor("z", z)
        channel = self.channel_dim if z.dim() > 2 else -1
        if z.dim() < 2 or z.shape[channel] != self.embedding_dim:
            where = "(B, C, ...)" if self.channel_dim == 1 else "(..., C)"
            raise ValueError(f"z has shape {arguments.shape_of(z)}; expected {where} with C = {self.embedding_dim}")
        last = z.movedim(channel, -1)
        flat = last.reshape(-1, self.embedding_dim)
        flat = flat if flat.dtype == torch.float64 else flat.float()
        quantized, indices, losses = _Quantize.apply(flat, self.codebook, self)  # type: ignore[no-untyped-call]
        loss = self.commitment_cost * losses[1] + (losses[0] if self.decay is None else 0.0)
        out = quantized.to(z.dtype).view(last.shape).movedim(-1, channel)
        return VQOutput(out, indices.view(last.shape[:-1]), loss, losses[0], losses[1])

    @torch.no_grad()
    def gather_codebook(self) -> Tensor:
        """All codes (K, D), on every process; every process must call."""
        return _gather_rows(self.codebook.detach(), self.part, self.group)[0]

    @torch.no_grad()
    def codes_to_output(self, indices: Tensor) -> Tensor:
        """What :meth:`forward` outputs for these indices (B, ...); every process must call."""
        values = lookup(self.codebook, indices, self.part, group=self.group)
        return values.movedim(-1, 1) if self.channel_dim == 1 and values.dim() > 2 else values

    def _learn(self, rows: Tensor, indices: Tensor) -> None:
        """Moving averages of the codes that live here, from the rows of all processes: no all-reduce of (K, D)."""
        assert self.decay is not None
        assert self.cluster_size is not None
        assert self.embed_avg is not None
        sums, counts = functional.codebook_sum(rows, _local(indices, self.part), len(self.codebook))
        self.cluster_size.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.embed_avg.mul_(self.decay).add_(sums.float(), alpha=1 - self.decay)
        # The total over K must not depend on how codes are dealt out: every process sums the same gathered vector.
        sizes = _gather_rows(self.cluster_size[:, None], self.part, self.group)[0]
        total = sizes.double().sum()
        smoothed = (self.cluster_size.double() + self.eps) / (total + self.num_embeddings * self.eps) * total
        codes = self.embed_avg / smoothed.float()[:, None]
        self.codebook.copy_(torch.where(smoothed[:, None] > 0, codes, self.codebook))


def _initial_codes(part: Shards, dim: int, seed: int) -> Tensor:
    """U(-1/K, 1/K), block by block from seeds of their own: a process draws only the blocks that it needs."""
    block, k = 4096, part.num_codes
    drawn = []
    for start in range(part.begin // block * block, part.end, block):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + start // block)
        codes = torch.empty(min(block, k - start), dim).uniform_(-1 / k, 1 / k, generator=generator)
        drawn.append(codes[max(part.begin - start, 0) : part.end - start])
    return torch.cat(drawn)


class _Quantize(torch.autograd.Function):
    """Search, gather, losses; backward needs no communication, because every process kept the rows of all."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, codebook: Tensor, module: ShardedVectorQuantizer) -> tuple[Tensor, Tensor, Tensor]:
        part, group = module.part, module.group
        learning = module.training and module.decay is not None
        rows, sizes = _gather_rows(z, part, group)
        indices, score = _search(rows, codebook, part, module.metric, group)
        values = _own(codebook, indices, part)
        if part.size > 1:
            dist.all_reduce(values, group=group)
        begin = sum(sizes[: part.rank])
        here = slice(begin, begin + len(z))
        quantized = values[here].to(z.dtype, copy=True)
        # Weighted so that the mean over the processes is the mean over the joined batch, also of uneven batches.
        weight = part.size / max(rows.numel(), 1)
        loss = ((z - quantized).double().square().sum() * weight).to(z.dtype)
        # Codes matter to the backward pass only if they learn from it; EMA codes change in place right below.
        ctx.save_for_backward(z, quantized, *((rows, codebook, indices) if ctx.needs_input_grad[1] else ()))
        ctx.part, ctx.weight = part, weight
        if learning:
            module._learn(rows, torch.where(score.isfinite(), indices, -1))
        own = indices[here]
        ctx.mark_non_differentiable(own)
        return quantized, own, torch.stack([loss, loss])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any, losses: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        z, quantized, *rest = ctx.saved_tensors
        dz = de = None
        if ctx.needs_input_grad[0]:
            dz = grad + 2 * ctx.weight * losses[1] * (z - quantized)
        if ctx.needs_input_grad[1]:
            rows, codes, indices = rest
            sums, counts = functional.codebook_sum(rows, _local(indices, ctx.part), len(codes))
            de = (2 * ctx.weight / ctx.part.size * losses[0] * (counts[:, None] * codes - sums)).to(codes.dtype)
        return dz, de, None
