"""How a codebook learns besides its gradient: moving averages, dead codes, k-means, statistics, and their state.

Called by :class:`vqkernels.VectorQuantizer`, which adds the forward pass; everything here runs without gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels import ops
from vqkernels.functional import lookup_rows
from vqkernels.nn import statistics
from vqkernels.nn._distributed import all_reduce, is_sharded, rank_and_size
from vqkernels.nn._loading import load
from vqkernels.nn.codebook_init import kmeans

__all__ = ["LearnedCodebook", "in_backward"]


class LearnedCodebook(nn.Module):
    """The state of a codebook and its updates; a subclass sets the options and calls :meth:`_make_state`."""

    codebook: Tensor
    code_counts: Tensor
    steps: Tensor
    initialized: Tensor
    cluster_size: Tensor | None
    embed_avg: Tensor | None

    num_embeddings: int
    embedding_dim: int
    heads: int
    decay: float | None
    eps: float
    usage_decay: float
    metric: str
    normalize: bool
    dead_code_ratio: float
    kmeans_iters: int
    seed: int
    sync: bool

    def _make_state(self, device: torch.device | str | None) -> None:
        """Parameters and buffers, not yet filled."""
        self.frozen = False
        self._pool: list[Tensor] | None = None
        self._pooling = False
        self._pool_masked = False
        self._additive = 1 if self.decay is None else 2
        self._last_codes: Tensor | None = None
        lead = (self.heads,) if self.heads > 1 else ()
        codes = torch.empty((*lead, self.num_embeddings, self.embedding_dim), dtype=torch.float32, device=device)
        if self.decay is None:
            self.codebook = nn.Parameter(codes)
        else:
            self.register_buffer("codebook", codes)
        counts = torch.zeros((*lead, self.num_embeddings), dtype=torch.int64, device=device)
        self.register_buffer("code_counts", counts)
        tracked = self.decay is not None or self.dead_code_ratio > 0
        buffers = {
            "cluster_size": torch.ones_like(counts, dtype=torch.float32) if tracked else None,
            "embed_avg": torch.empty_like(codes) if self.decay is not None else None,
            "steps": torch.zeros((), dtype=torch.int64, device=device),
            "initialized": torch.zeros((), dtype=torch.bool, device=device),
        }
        # Those that are None come last: torch.export (2.13, not strict) counts them where it numbers the others.
        for name, buffer in sorted(buffers.items(), key=lambda item: item[1] is None):
            self.register_buffer(name, buffer)
        self._waiting = False

    def _as_codes(self, x: Tensor) -> Tensor:
        return x if self.heads > 1 else x.unsqueeze(0)

    def _codes(self, learning: bool) -> tuple[Tensor, Tensor | None]:
        """The codes (H, K, D) to quantize with; a copy and its original if this step changes the codebook in place."""
        codes = self._as_codes(self.codebook)
        if not torch.compiler.is_compiling() and self._last_codes is not None and self.training and in_backward():
            # Activation checkpointing runs forward again after the update: give it the codes of the first time.
            return self._last_codes + (codes - codes.detach()), None
        if learning and (self.decay is not None or self.dead_code_ratio > 0):
            if self.decay is None and is_sharded(self):
                raise RuntimeError(
                    f"dead_code_ratio is {self.dead_code_ratio} for a trained codebook that FSDP shards: the shards "
                    "would not see the codes that moved. Expected 0, or a decay, which makes the codebook a buffer"
                )
            if torch.compiler.is_compiling():
                # A copy that Inductor (torch 2.13) keeps: it drops `clone`, then saves the codes of after the update.
                every = torch.arange(self.num_embeddings, device=codes.device)
                return lookup_rows(codes, every.expand(self.heads, 1, self.num_embeddings), False).squeeze(1), None
            copy = codes.clone()
            self._last_codes = copy.detach()
            return copy, codes
        return codes, None

    def _start(self, rows: Tensor, valid: Tensor | None) -> bool:
        """k-means; without any row in any process the module goes on waiting."""
        if self.decay is None and is_sharded(self):
            raise RuntimeError(
                "k-means would write a trained codebook that FSDP shards: the shards would not see it. Call "
                "initialize() before FSDP wraps the module, or give a decay, which makes the codebook a buffer"
            )
        with torch.no_grad():
            rows = rows.detach()
            rows = F.normalize(rows.float(), dim=-1) if self.normalize else rows
            found = kmeans(
                rows,
                self.num_embeddings,
                valid=valid,
                metric=self.metric,
                normalize=self.normalize,
                iterations=self.kmeans_iters,
                seed=self.seed,
                sync=self.sync,
            )
            if found is None:
                return False
            self.codebook.copy_(found[0].view_as(self.codebook))
            self._set_statistics(found[1].clamp(min=1.0))
            self.initialized.fill_(True)
            self._waiting = False
        return True

    def _set_statistics(self, counts: Tensor | None) -> None:
        """Averages that agree with the codebook; every code used once if ``counts`` are not known."""
        if self.cluster_size is not None:
            self.cluster_size.copy_(
                torch.ones_like(self.cluster_size) if counts is None else counts.view_as(self.cluster_size)
            )
            if self.embed_avg is not None:
                self.embed_avg.copy_(self.codebook * self.cluster_size.unsqueeze(-1))

    def _learn(
        self,
        rows: Tensor,
        indices: Tensor,
        weights: Tensor | None = None,
        code_weights: Tensor | None = None,
        masked: bool = False,
    ) -> None:
        """Statistics of one batch, applied now or pooled.

        ``indices`` is -1 where a row must not count; ``weights`` (H, B, S) and ``code_weights`` (H, K) scale what a row
        and what a code contribute; ``masked``: perhaps no process has a row, and then nothing must change.
        """
        statistics.refuse_samples(indices)
        rank, size = rank_and_size(self.sync)
        # The others may have a mask, weights or rows where this process has none: all must do the same.
        several = size > 1
        masked = masked or several or rows.numel() == 0
        if self.decay is None:
            counts = statistics.count_codes(indices, self.num_embeddings)
            # One dtype for one collective; alone, the counts stay what `code_counts` is.
            found = [counts if self.cluster_size is None else counts.float()]
        else:
            sums, counts = ops.codebook_sum(rows, indices, self.num_embeddings)
            found = [counts, sums.float()]
            if weights is None and (self._pooling or several):
                # Weights of 1: micro-batches and processes pool alike, with weights and without.
                found.append(counts)
            elif weights is not None:
                weight = weights.unsqueeze(-1).float()
                sums, _ = ops.codebook_sum(torch.cat([rows * weight, weight], -1), indices, self.num_embeddings)
                found = [counts, sums[..., :-1].float(), sums[..., -1].float()]
        self._additive = len(found)
        if self.dead_code_ratio > 0:
            found += statistics.candidate_rows(rows, indices, self.steps, self.num_embeddings, rank, size)
        if not self._pooling:
            self._apply_statistics(all_reduce(found, self.sync), code_weights, masked)
            return
        if masked:  # not |=, which Dynamo of torch 2.11 writes as an assignment to a constant
            self._pool_masked = True
        if self._pool is None:
            self._pool = found
        else:
            for i, (old, new) in enumerate(zip(self._pool, found, strict=True)):
                self._pool[i] = old + new if i < self._additive else new

    def _apply_statistics(self, found: list[Tensor], code_weights: Tensor | None = None, masked: bool = False) -> None:
        counts = found[0]
        seen = counts.sum() > 0 if masked else None
        self.code_counts.add_(counts.view_as(self.code_counts).long())
        if self.cluster_size is not None:
            size, codes = self._as_codes(self.cluster_size), self._as_codes(self.codebook)
            average = None if self.embed_avg is None else self._as_codes(self.embed_avg)
            state = [size] if average is None else [size, codes, average]
            old = None if seen is None else [t.clone() for t in state]
            self._average(size, codes, average, found, code_weights)
            if old is not None and seen is not None:
                for now, before in zip(state, old, strict=True):
                    now.copy_(torch.where(seen, now, before))
            if self.dead_code_ratio > 0:
                self._replace_dead_codes(size, codes, average, *found[-2:])
        self.steps.add_(1 if seen is None else seen)

    def _average(
        self, size: Tensor, codes: Tensor, average: Tensor | None, found: list[Tensor], code_weights: Tensor | None
    ) -> None:
        """One step of the moving averages."""
        if self.decay is None or average is None:
            size.lerp_(found[0].to(size.dtype), 1 - self.usage_decay)
            return
        counts, sums = found[2 if self._additive == 3 else 0], found[1]
        if code_weights is not None:
            # A step of w (1 - decay) towards the new value is a whole step towards w new + (1 - w) old.
            counts = size.lerp(counts, code_weights)
            sums = average.lerp(sums, code_weights.unsqueeze(-1))
        ops.ema_update(size, average, codes, counts, sums.contiguous(), self.decay, self.eps, self.normalize)

    def _replace_dead_codes(
        self, size: Tensor, codes: Tensor, average: Tensor | None, rows: Tensor, found: Tensor
    ) -> None:
        """Move rarely used codes onto rows of the batch and let them start with the mean usage."""
        mean = size.mean(-1, keepdim=True)
        dead = (size < self.dead_code_ratio * mean) & (found > 0)
        moved = dead.unsqueeze(-1)
        torch.where(moved, rows, codes, out=codes)
        if average is not None:
            torch.where(moved, rows * mean.unsqueeze(-1), average, out=average)
        torch.where(dead, mean, size, out=size)

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """Pool the statistics of several forward passes into one update, made on leaving the block.

        For gradient accumulation: the codebook moves once per optimiser step, as on the joined batch.

        Example:
            >>> import torch, vqkernels
            >>> vq = vqkernels.VectorQuantizer(4, 2, decay=0.9)
            >>> with vq.accumulating():
            ...     for part in torch.randn(8, 2).split(4):
            ...         out = vq(part)
            >>> vq.steps.item()
            1
        """
        if self._pooling:
            raise RuntimeError("accumulating() blocks of one VectorQuantizer cannot be nested")
        self._pooling = True
        try:
            yield
            self._pooling = False
            self._flush()
        finally:
            self._pooling, self._pool, self._pool_masked = False, None, False

    def _flush(self) -> None:
        if not self.training or self.frozen:
            return
        with torch.no_grad():
            found = self._pool
            if found is None:  # nothing seen here, but the other processes wait for this one
                nothing = torch.empty((self.heads, 0, 1, self.embedding_dim), device=self.codebook.device)
                self._pooling = True
                self._learn(nothing, nothing[..., 0].long(), masked=True)
                self._pooling = False
                found = self._pool
            assert found is not None
            self._apply_statistics(all_reduce(found, self.sync), masked=self._pool_masked)

    def freeze(self) -> None:
        """Stop all learning: no gradient for the codebook, no statistics, also in training mode."""
        self.frozen = True
        if isinstance(self.codebook, nn.Parameter):
            self.codebook.requires_grad_(False)

    def unfreeze(self) -> None:
        """Undo :meth:`freeze`."""
        self.frozen = False
        if isinstance(self.codebook, nn.Parameter):
            self.codebook.requires_grad_(True)

    # -- usage ---------------------------------------------------------------------------------------------------------

    def usage(self) -> float:
        """Fraction of codes used in training since :meth:`reset_usage` (mean over heads)."""
        return float(statistics.usage(self.code_counts).mean())

    def perplexity(self) -> float:
        """exp(entropy) of the codes used in training since :meth:`reset_usage` (mean over heads), in [1, K]."""
        return float(statistics.perplexity(self.code_counts).mean())

    def reset_usage(self) -> None:
        """Start counting anew."""
        self.code_counts.zero_()

    # -- torch.nn.Module -----------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedCodebook:
        """``.to``, ``.half`` and the like, except that the codebook and its averages never lose digits."""
        ema = self.decay is not None

        def keep(t: Tensor) -> Tensor:
            out = fn(t)
            loses = out.dtype in (torch.float16, torch.bfloat16) or (ema and out.dtype != torch.float32)
            return t.to(out.device, torch.float32) if t.dtype in (torch.float32, torch.float64) and loses else out

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        load(self, super()._load_from_state_dict, state_dict, prefix, args)
        if not self.initialized.is_meta:
            self._waiting = not bool(self.initialized)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last_codes": None, "_pool": None, "_pooling": False, "_pool_masked": False}


def in_backward() -> bool:
    """Whether a backward pass is running in this thread: then forward is a re-computation and must not learn."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
