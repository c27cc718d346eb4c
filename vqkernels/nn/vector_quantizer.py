"""``VectorQuantizer``: a codebook with its options, learned by gradient or by moving averages.

Called by users and by :mod:`vqkernels.models`; the arithmetic is in :mod:`vqkernels.functional` and in the ops.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels import _arguments as arguments
from vqkernels import ops
from vqkernels.functional import VQOutput, lookup_rows, quantize_rows
from vqkernels.nn import statistics
from vqkernels.nn._distributed import all_reduce, rank_and_size
from vqkernels.nn._layout import Layout
from vqkernels.nn._loading import load
from vqkernels.nn.codebook_init import INITS, kmeans, random_codes_

__all__ = ["VectorQuantizer"]


class VectorQuantizer(nn.Module):
    """Replace every vector of a feature map by its nearest code, and learn the codes.

    With ``decay=None`` the codebook is a parameter, trained by the codebook loss (van den Oord et al. 2017, eq. 3).
    With a ``decay`` it is a buffer that follows the moving average of the vectors that chose it (appendix A.1), and
    ``loss`` holds the commitment term only. Search and losses run in float32 whatever autocast says.

    Args:
        num_embeddings: number of codes K.
        embedding_dim: dims D of a code.
        commitment_cost: weight beta of the commitment loss.
        decay: of the moving averages, in (0, 1); ``None`` for a codebook trained by gradient.
        metric: ``"l2"``, ``"cosine"`` or ``"dot"``.
        heads: independent codebooks; the input has ``heads * embedding_dim`` channels, head by head.
        gradient: ``"straight_through"``, ``"rotation"`` or ``"none"``, see :func:`vqkernels.vector_quantize`.
        init: ``"uniform"`` U(-1/K, 1/K), ``"normal"`` N(0, 1), or ``"kmeans"``: k-means on the first training batch
            (until then the codes are the uniform ones). Under ``torch.compile`` call :meth:`initialize` before.
        dead_code_ratio: a code whose average usage is below this share of the mean usage is moved to a vector of the
            current batch; 0 for never.
        channel_dim: 1 for (B, C, ...), -1 for (..., C).
        normalize: compare by angle and output unit vectors, losses between unit vectors, as LlamaGen's ``l2_norm``
            and ``use_cosine_sim`` do. Default: ``metric == "cosine"``; ``False`` with ``"cosine"`` compares by angle
            but outputs the raw codes, as DAC does.
        eps: of the Laplace smoothing of the moving averages.
        usage_decay: of the average usage of a gradient codebook, for ``dead_code_ratio``.
        kmeans_iters: iterations of ``init="kmeans"``.
        seed: of ``init="kmeans"``.
        sync: sum statistics over all processes when ``torch.distributed`` runs: exactly one all-reduce per training
            step, on every rank, also with an empty batch.
        device: of the parameters and buffers.

    State (``state_dict``): ``codebook`` (K, D), or (H, K, D) with several heads; ``code_counts`` int64 (K,) or (H, K)
    since :meth:`reset_usage`; ``steps`` and ``initialized``; ``cluster_size`` (K,) with a decay or a dead-code ratio;
    ``embed_avg`` (K, D) with a decay. Checkpoints of other libraries load too (:mod:`vqkernels.nn.checkpoints`).

    Shape:
        input (B, C, ...) or (..., C); (N, C) either way. ``quantized`` has the input's shape, dtype and memory
        layout; ``indices`` (B, ...), with a last dim of H if there are several heads.

    A vector with NaN or Inf is quantized as :func:`vqkernels.nearest` says and never enters a statistic. In eval mode
    and while frozen no buffer changes. ``.half()`` and ``.bfloat16()`` leave the codebook in float32.

    Example:
        >>> import torch, vqkernels
        >>> vq = vqkernels.VectorQuantizer(512, 64, decay=0.99)
        >>> out = vq(torch.randn(2, 64, 8, 8))
        >>> out.quantized.shape, out.indices.shape
        (torch.Size([2, 64, 8, 8]), torch.Size([2, 8, 8]))
    """

    codebook: Tensor
    code_counts: Tensor
    steps: Tensor
    initialized: Tensor
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
        heads: int = 1,
        gradient: str = "straight_through",
        init: str = "uniform",
        dead_code_ratio: float = 0.0,
        channel_dim: int = 1,
        normalize: bool | None = None,
        eps: float = 1e-5,
        usage_decay: float = 0.99,
        kmeans_iters: int = 10,
        seed: int = 0,
        sync: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        arguments.check_count("num_embeddings", num_embeddings)
        arguments.check_count("embedding_dim", embedding_dim)
        arguments.check_count("heads", heads)
        arguments.check_number("commitment_cost", commitment_cost)
        arguments.check_number("dead_code_ratio", dead_code_ratio, high=1.0)
        arguments.check_number("eps", eps)
        for name, value in (("decay", 0.5 if decay is None else decay), ("usage_decay", usage_decay)):
            arguments.check_number(name, value)
            if not 0 < value < 1:
                raise ValueError(f"{name} is {value!r}; expected a number in (0, 1)")
        arguments.check_choice("metric", metric)
        arguments.check_choice("gradient", gradient)
        arguments.check_choice("init", init, INITS)
        if channel_dim not in (1, -1):
            raise ValueError(f"channel_dim is {channel_dim!r}; expected 1 for (B, C, ...) or -1 for (..., C)")
        self.num_embeddings, self.embedding_dim, self.heads = num_embeddings, embedding_dim, heads
        self.commitment_cost, self.decay, self.eps, self.usage_decay = commitment_cost, decay, eps, usage_decay
        self.metric, self.gradient, self.channel_dim = metric, gradient, channel_dim
        self._layout = Layout(heads, embedding_dim, channel_dim)
        self.normalize = metric == "cosine" if normalize is None else normalize
        self.init, self.kmeans_iters, self.seed, self.sync = init, kmeans_iters, seed, sync
        self.dead_code_ratio = dead_code_ratio
        self.frozen = False
        self._pool: list[Tensor] | None = None
        self._pooling = False
        self._last_codes: Tensor | None = None

        lead = (heads,) if heads > 1 else ()
        codes = torch.empty((*lead, num_embeddings, embedding_dim), dtype=torch.float32, device=device)
        if decay is None:
            self.codebook = nn.Parameter(codes)
        else:
            self.register_buffer("codebook", codes)
        counts = torch.zeros((*lead, num_embeddings), dtype=torch.int64, device=device)
        self.register_buffer("code_counts", counts)
        tracked = decay is not None or dead_code_ratio > 0
        self.register_buffer("cluster_size", torch.ones_like(counts, dtype=torch.float32) if tracked else None)
        self.register_buffer("embed_avg", torch.empty_like(codes) if decay is not None else None)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the codebook anew from torch's generator and forget all statistics."""
        random_codes_(self.codebook, self.init)
        with torch.no_grad():
            if self.decay is not None and self.normalize:
                self.codebook.copy_(F.normalize(self.codebook, dim=-1))
            self._set_statistics(None)
            self.code_counts.zero_()
            self.steps.zero_()
            self.initialized.fill_(self.init != "kmeans")
        self._waiting = self.init == "kmeans"

    def extra_repr(self) -> str:
        """The options that differ from the defaults."""
        words = [str(self.num_embeddings), str(self.embedding_dim)]
        defaults: dict[str, object] = {
            "decay": None,
            "metric": "l2",
            "heads": 1,
            "gradient": "straight_through",
            "init": "uniform",
        }
        defaults |= {"dead_code_ratio": 0.0, "channel_dim": 1, "normalize": self.metric == "cosine"}
        words.append(f"commitment_cost={self.commitment_cost}")
        words += [f"{k}={getattr(self, k)!r}" for k, v in defaults.items() if getattr(self, k) != v]
        return ", ".join(words)

    # -- forward -------------------------------------------------------------------------------------------------------

    def forward(self, z: Tensor, mask: Tensor | None = None) -> VQOutput:
        """Quantize ``z``.

        Args:
            z: (B, C, ...) or (..., C), C = heads * embedding_dim.
            mask: bool (B, ...), True for valid positions; the others get index -1 and zeros and count nowhere.

        Returns:
            :class:`vqkernels.VQOutput`.

        Raises:
            ValueError, TypeError: shapes, dtype or device do not fit.
        """
        rows, valid = self._rows(z, mask)
        learning = self.training and not self.frozen and not _in_backward()
        if learning and self._waiting:
            self._start(rows, valid)
        given = self._codes(learning)
        codes, search = self._unit(given), None
        if self.normalize:
            # Cosine compares what was given: an angle does not depend on lengths, and rounded unit vectors would.
            search = (rows, given) if self.metric == "cosine" else None
            rows = F.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=-1)
        out = quantize_rows(rows, codes, metric=self.metric, gradient=self.gradient, mask=valid, search=search)
        if learning:
            with torch.no_grad():
                self._learn(rows.detach(), torch.where(out.score.isfinite(), out.indices, -1))
        loss = self.commitment_cost * out.commitment_loss
        indices = self._layout.indices(out.indices, z.shape)
        return VQOutput(
            self._layout.settle(self._layout.output(out.quantized.to(z.dtype), z.shape), indices),
            indices,
            loss if self.decay is not None else loss + out.codebook_loss,
            out.codebook_loss,
            out.commitment_loss,
        )

    def codes_to_output(self, indices: Tensor) -> Tensor:
        """What :meth:`forward` outputs for these indices: float32, channels where the input has them.

        Args:
            indices: integers (B, ...), with a last dim of H if there are several heads; -1 gives zeros.

        Raises:
            ValueError, TypeError: shape or dtype do not fit.
        """
        positions, shape = self._layout.positions(indices)
        first = self.channel_dim == 1 and len(shape) > 2
        return self._layout.output(lookup_rows(self._unit(self._as_codes(self.codebook)), positions, first), shape)

    def _rows(self, z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``z`` as (H, B, S, D) and the mask as (H, B, S), checked."""
        self._layout.check(z, self.codebook)
        rows = self._layout.rows(z)
        return rows, None if mask is None else self._layout.mask(mask, z, rows)

    def _as_codes(self, x: Tensor) -> Tensor:
        return x if self.heads > 1 else x.unsqueeze(0)

    def _codes(self, learning: bool) -> Tensor:
        """The codes (H, K, D) to quantize with; a copy if this step is going to change the codebook in place."""
        codes = self._as_codes(self.codebook)
        if not torch.compiler.is_compiling() and self._last_codes is not None and self.training and _in_backward():
            # Activation checkpointing runs forward again after the update: give it the codes of the first time.
            codes = self._last_codes + (codes - codes.detach())
        elif learning and (self.decay is not None or self.dead_code_ratio > 0):
            if torch.compiler.is_compiling():
                # A copy that Inductor (torch 2.13) keeps: it drops `clone`, then saves the codes of after the update.
                every = torch.arange(self.num_embeddings, device=codes.device)
                return lookup_rows(codes, every.expand(self.heads, 1, self.num_embeddings), False).squeeze(1)
            codes = codes.clone()
            self._last_codes = codes.detach()
        return codes

    def _unit(self, codes: Tensor) -> Tensor:
        """The codes that are output; an EMA codebook holds unit vectors already."""
        return F.normalize(codes, dim=-1) if self.normalize and self.decay is None else codes

    # -- learning ------------------------------------------------------------------------------------------------------

    def initialize(self, z: Tensor, mask: Tensor | None = None) -> None:
        """k-means on ``z`` (as in :meth:`forward`), whatever ``init`` is; all processes must call.

        Raises:
            ValueError: there is no finite vector to start from.
        """
        rows, valid = self._rows(z, mask)
        if not self._start(rows, valid):
            raise ValueError(f"z has shape {arguments.shape_of(z)} and no finite, valid vector; expected at least one")

    def _start(self, rows: Tensor, valid: Tensor | None) -> bool:
        """k-means; without any row in any process the module goes on waiting."""
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

    def _learn(self, rows: Tensor, indices: Tensor) -> None:
        """Statistics of one batch, applied now or pooled. ``indices`` is -1 where a row must not count."""
        if self.decay is not None:
            sums, counts = ops.codebook_sum(rows, indices, self.num_embeddings)
            found = [counts, sums.float()]
        else:
            found = [statistics.count_codes(indices, self.num_embeddings).float()]
        if self.dead_code_ratio > 0:
            rank, size = rank_and_size(self.sync)
            found += statistics.candidate_rows(rows, indices, self.steps, self.num_embeddings, rank, size)
        if not self._pooling:
            self._apply_statistics(all_reduce(found, self.sync))
        elif self._pool is None:
            self._pool = found
        else:
            additive = 2 if self.decay is not None else 1
            for i, (old, new) in enumerate(zip(self._pool, found, strict=True)):
                self._pool[i] = old + new if i < additive else new

    def _apply_statistics(self, found: list[Tensor]) -> None:
        counts = found[0]
        self.code_counts.add_(counts.view_as(self.code_counts).long())
        if self.cluster_size is not None:
            size, codes = self._as_codes(self.cluster_size), self._as_codes(self.codebook)
            if self.decay is not None:
                assert self.embed_avg is not None
                average = self._as_codes(self.embed_avg)
                ops.ema_update(size, average, codes, counts, found[1], self.decay, self.eps, self.normalize)
            else:
                size.lerp_(counts, 1 - self.usage_decay)
            if self.dead_code_ratio > 0:
                self._replace_dead_codes(*found[-2:])
        self.steps.add_(1)

    def _replace_dead_codes(self, rows: Tensor, found: Tensor) -> None:
        """Move rarely used codes onto rows of the batch and let them start with the mean usage."""
        assert self.cluster_size is not None
        size, codes = self._as_codes(self.cluster_size), self._as_codes(self.codebook)
        mean = size.mean(-1, keepdim=True)
        dead = (size < self.dead_code_ratio * mean) & (found > 0)
        codes.copy_(torch.where(dead[..., None], rows, codes))
        if self.embed_avg is not None:
            average = self._as_codes(self.embed_avg)
            average.copy_(torch.where(dead[..., None], rows * mean[..., None], average))
        size.copy_(torch.where(dead, mean, size))

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
            self._pooling, self._pool = False, None

    def _flush(self) -> None:
        if not self.training or self.frozen:
            return
        with torch.no_grad():
            found = self._pool
            if found is None:  # nothing seen here, but the other processes wait for this one
                nothing = torch.empty((self.heads, 0, 1, self.embedding_dim), device=self.codebook.device)
                self._pooling = True
                self._learn(nothing, nothing[..., 0].long())
                self._pooling = False
                found = self._pool
            assert found is not None
            self._apply_statistics(all_reduce(found, self.sync))

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VectorQuantizer:
        """``.to``, ``.half`` and the like, except that the codebook and its averages never lose digits."""
        ema = self.decay is not None

        def keep(t: Tensor) -> Tensor:
            out = fn(t)
            loses = out.dtype in (torch.float16, torch.bfloat16) or (ema and out.dtype != torch.float32)
            return t.to(out.device) if t.dtype == torch.float32 and loses else out

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        load(self, super()._load_from_state_dict, state_dict, prefix, args)
        if not self.initialized.is_meta:
            self._waiting = not bool(self.initialized)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last_codes": None, "_pool": None, "_pooling": False}


def _in_backward() -> bool:
    """Whether a backward pass is running in this thread: then forward is a re-computation and must not learn."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
