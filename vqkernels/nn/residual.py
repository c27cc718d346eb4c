"""``ResidualVectorQuantizer``: Q quantizers in a row, each on what the ones before it left over.

Called by users and by the grouped and split quantizers; every level is a :class:`vqkernels.VectorQuantizer`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels import _arguments as arguments
from vqkernels.nn import checkpoints
from vqkernels.nn._layout import Layout
from vqkernels.nn.estimators import estimate
from vqkernels.nn.learning import in_backward
from vqkernels.nn.level_dropout import DROPOUTS, check_levels, levels_to_keep
from vqkernels.nn.projections import project_pair
from vqkernels.nn.residual_search import LevelsOutput, search_levels
from vqkernels.nn.vector_quantizer import VectorQuantizer

__all__ = ["ESTIMATORS", "ResidualVQOutput", "ResidualVectorQuantizer"]

ESTIMATORS = ("sum", "per_level", "chained")


class ResidualVQOutput(NamedTuple):
    """What a residual quantizer returns.

    Attributes:
        quantized: sum of the chosen codes of all levels, shape and dtype of the input; carries the gradient.
        indices: int64 (B, ..., Q); -1 where a level was dropped or the position was masked.
        loss: sum (or mean, ``reduction``) over the levels of what :class:`vqkernels.VectorQuantizer` calls ``loss``.
        codebook_loss: (Q,), of each level; 0 for a level that nothing reached.
        commitment_loss: (Q,), of each level.
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


class ResidualVectorQuantizer(nn.Module):
    """Quantize, subtract, quantize the rest, and so on (Zeghidour et al. 2021, "SoundStream", algorithm 1).

    Args:
        num_embeddings: codes per level, one number or one per level.
        embedding_dim: dims D of the codes.
        num_levels: Q; may be left out if ``num_embeddings`` is a sequence.
        shared_codebook: one codebook for all levels, updated once per step from the rows of all of them.
        estimator: how gradients reach the input. ``"sum"`` (default): residuals are detached and one estimator acts on
            the sum, so that every level's commitment loss reaches the input. ``"per_level"``: residuals are detached
            and each level has its own estimator, whose gradients add up (vector-quantize-pytorch). ``"chained"``: the
            residual carries the gradient of the levels before it (descript-audio-codec); it is what trains the
            projections of ``level_dim``, and without them it leaves levels beyond the first no commitment gradient.
        gradient: of that estimator, as in :class:`vqkernels.VectorQuantizer`.
        dropout: ``None``, ``"batch"`` (one number of levels for a training step) or ``"sample"`` (one per first-dim
            entry). Dropped levels get index -1, no loss and no statistics. The numbers follow from ``dropout_seed``
            and a step counter: the same on every process, without communication or a wait for the device.
        dropout_least: fewest levels kept.
        dropout_multiple: keep multiples of this many levels only.
        dropout_share: of steps (or samples) that drop at all.
        input_dim: channels of the input, if one projection leads in and one out (EnCodec, Mimi).
        level_dim: dims of the codes of each level, behind projections of its own (descript-audio-codec's
            ``codebook_dim``, one number or one per level); ``embedding_dim`` is then the input's channels.
        projection_bias: whether projections have a bias.
        reduction: ``"sum"`` (DAC) or ``"mean"`` (EnCodec, Moshi) of the levels' losses in ``loss``.
        channel_dim: 1 for (B, C, ...), -1 for (..., C).
        device: of the parameters and buffers.
        **options: of every level: ``decay``, ``metric``, ``init`` (k-means starts level by level on the first training
            batch), ``dead_code_ratio``, ``commitment_cost``, ...

    State (``state_dict``): ``layers.{i}.*`` of each level (only ``layers.0`` with a shared codebook), ``project_in.*``
    and ``project_out.*`` with ``input_dim``, ``dropout_step`` with ``dropout``. Checkpoints of vector-quantize-pytorch,
    EnCodec, Mimi, Moshi and DAC load too (:mod:`vqkernels.nn.checkpoints`).

    Shape:
        input as :class:`vqkernels.VectorQuantizer`; ``indices`` (B, ..., Q). Residuals and sums are float32.

    Example:
        >>> import torch, vqkernels
        >>> rvq = vqkernels.ResidualVectorQuantizer(1024, 128, 8, decay=0.99, dropout="batch")
        >>> out = rvq(torch.randn(2, 128, 50))
        >>> out.indices.shape, rvq.bitrate(75.0)
        (torch.Size([2, 50, 8]), 6000.0)
    """

    dropout_step: Tensor | None

    def __init__(
        self,
        num_embeddings: int | Sequence[int],
        embedding_dim: int,
        num_levels: int | None = None,
        *,
        shared_codebook: bool = False,
        estimator: str | None = None,
        gradient: str = "straight_through",
        dropout: str | None = None,
        dropout_least: int = 1,
        dropout_multiple: int = 1,
        dropout_share: float = 1.0,
        dropout_seed: int = 0,
        input_dim: int | None = None,
        level_dim: int | Sequence[int] | None = None,
        projection_bias: bool = True,
        reduction: str = "sum",
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        sizes = _per_level("num_embeddings", num_embeddings, num_levels)
        q = len(sizes)
        dims = [None] * q if level_dim is None else _per_level("level_dim", level_dim, q)
        estimator = estimator or ("sum" if level_dim is None else "chained")
        arguments.check_choice("estimator", estimator, ESTIMATORS)
        arguments.check_choice("gradient", gradient)
        arguments.check_choice("reduction", reduction, ("sum", "mean"))
        if dropout is not None:
            arguments.check_choice("dropout", dropout, DROPOUTS)
        for name, value in (("dropout_least", dropout_least), ("dropout_multiple", dropout_multiple)):
            arguments.check_count(name, value)
            if value > q:
                raise ValueError(f"{name} is {value}; expected at most the {q} levels")
        arguments.check_number("dropout_share", dropout_share, high=1.0)
        arguments.check_integer("dropout_seed", dropout_seed)
        if options.get("heads", 1) != 1:
            raise ValueError(f"heads is {options['heads']}; expected 1, see GroupedResidualVectorQuantizer")
        if shared_codebook and (len(set(sizes)) > 1 or level_dim is not None):
            raise ValueError("shared_codebook is True; expected levels of one size and no level_dim")
        if level_dim is not None and estimator == "sum":
            raise ValueError(
                'estimator is "sum" with a level_dim; expected "chained" or "per_level", or the projections '
                "of the levels get no gradient"
            )
        self.num_levels, self.sizes, self.embedding_dim, self.channel_dim = q, tuple(sizes), embedding_dim, channel_dim
        self.shared_codebook, self.estimator, self.gradient, self.reduction = (
            shared_codebook,
            estimator,
            gradient,
            reduction,
        )
        self.dropout, self.dropout_least, self.dropout_multiple = dropout, dropout_least, dropout_multiple
        self.dropout_share, self.dropout_seed = dropout_share, dropout_seed
        options |= {"channel_dim": channel_dim, "device": device}
        options["gradient"] = "none" if estimator == "sum" else gradient
        self.layers = nn.ModuleList()
        for size, dim in zip(sizes[:1] if shared_codebook else sizes, dims, strict=False):
            inside: dict[str, Any] = {}
            if dim is not None:
                inside = {"input_dim": embedding_dim, "projection_bias": projection_bias}
            self.layers.append(VectorQuantizer(size, dim or embedding_dim, **inside, **options))
        self.project_in, self.project_out = project_pair(
            input_dim, embedding_dim, bias=projection_bias, channel_dim=channel_dim, device=device
        )
        self._layout = Layout(1, embedding_dim, channel_dim)
        step = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("dropout_step", step if dropout else None)

    def reset_parameters(self) -> None:
        """Start the dropout's counter anew, as after ``to_empty``; levels and projections have methods of their own."""
        if self.dropout_step is not None:
            self.dropout_step.zero_()

    def extra_repr(self) -> str:
        """The options of the levels together."""
        words = [f"num_levels={self.num_levels}", f"estimator={self.estimator!r}"]
        words += ["shared_codebook=True"] if self.shared_codebook else []
        words += [f"dropout={self.dropout!r}"] if self.dropout else []
        return ", ".join(words)

    def level(self, index: int) -> VectorQuantizer:
        """The quantizer of one level."""
        module = self.layers[0 if self.shared_codebook else index]
        assert isinstance(module, VectorQuantizer)
        return module

    # -- forward -------------------------------------------------------------------------------------------------------

    def forward(
        self,
        z: Tensor,
        mask: Tensor | None = None,
        *,
        lens: Tensor | None = None,
        num_levels: int | None = None,
        keep: Tensor | None = None,
    ) -> ResidualVQOutput:
        """Quantize ``z``.

        Args:
            z: (B, C, ...) or (..., C).
            mask: bool (B, ...), True for valid positions.
            lens: integers (B,) instead of a mask, for (B, C, T) or (B, T, C).
            num_levels: use the first so many levels only; the others get index -1.
            keep: integers () or (B,) in [1, Q]: levels to keep, instead of what ``dropout`` would draw.

        Raises:
            ValueError, TypeError: shapes, dtype or device do not fit.
        """
        limit = check_levels(num_levels, self.num_levels)
        arguments.check_float_tensor("z", z)
        if lens is not None:
            mask = self._layout.lens_mask(lens, z, mask)
        if mask is not None:  # the levels check it too, but only after the dropout's counter moved
            arguments.check_mask(mask, self._layout.places(z.shape), z, False)
            if self.project_in is not None or self.gradient == "rotation":
                z = self._layout.blank(mask, z)
        inside = z if self.project_in is None else self.project_in(z)
        inside = inside if inside.dtype == torch.float64 else inside.float()
        self._layout.check(inside, self.level(0).codebook)
        keep = self._keep(inside, keep)
        last = limit
        if keep is not None and keep.dim() == 0 and keep.device.type == "cpu" and arguments.has_values(keep):
            last, keep = min(limit, int(keep)), None  # levels that nothing reaches: skipped where looking costs nothing

        layers: list[Any] = list(self.layers)
        levels = layers * last if self.shared_codebook else layers[:last]
        found = search_levels(levels, inside, self._layout, mask) if keep is None else None
        if found is None:
            found = self._level_by_level(levels, inside, mask, keep)
        total, indices, loss, codebook_loss, commitment_loss = found
        if missing := self.num_levels - last:
            indices = F.pad(indices, (0, missing), value=-1)
            codebook_loss, commitment_loss = F.pad(codebook_loss, (0, missing)), F.pad(commitment_loss, (0, missing))
        return ResidualVQOutput(
            self._outside(total, z, mask),
            indices,
            loss / self.num_levels if self.reduction == "mean" else loss,
            codebook_loss,
            commitment_loss,
        )

    def _level_by_level(
        self, levels: list[VectorQuantizer], z: Tensor, mask: Tensor | None, keep: Tensor | None
    ) -> LevelsOutput:
        """Every level on what the ones before it left over."""
        residual, total = z, torch.zeros_like(z)
        outputs = []
        with self._pooled():
            for i, level in enumerate(levels):
                out = level(residual, self._mask(mask, keep, i, z))
                values = out.quantized.detach() if self.estimator == "sum" else out.quantized
                residual = residual - (values if self.estimator == "chained" else values.detach())
                total = total + values
                outputs.append(out)
        if self.estimator == "sum":
            total = estimate(z, total, self.gradient, 1 if self._first(z) else -1)
        return LevelsOutput(
            total,
            torch.stack([out.indices for out in outputs], dim=-1),
            torch.stack([out.loss for out in outputs]).sum(),
            torch.stack([out.codebook_loss for out in outputs]),
            torch.stack([out.commitment_loss for out in outputs]),
        )

    def codes_to_output(self, indices: Tensor) -> Tensor:
        """The sum of the codes, projected out: float32, channels where the input has them.

        Args:
            indices: integers (B, ..., q) for the first q <= Q levels; -1 gives zeros.

        Raises:
            ValueError, TypeError: shape or dtype do not fit.
        """
        arguments.check_indices(indices)
        if indices.dim() < (2 if self.channel_dim == 1 else 1) or not 1 <= indices.shape[-1] <= self.num_levels:
            raise ValueError(
                f"indices has shape {arguments.shape_of(indices)}; expected (B, ..., q), q at most {self.num_levels}"
            )
        total = self.level(0).codes_to_output(indices[..., 0])
        for i in range(1, indices.shape[-1]):
            total = total + self.level(i).codes_to_output(indices[..., i])
        return self._outside(total, total, (indices >= 0).any(-1))

    def _first(self, x: Tensor) -> bool:
        return self.channel_dim == 1 and x.dim() > 2

    def _keep(self, z: Tensor, keep: Tensor | None) -> Tensor | None:
        """How many levels to keep, () or (B,); ``None`` for all."""
        if keep is not None:
            self.check_keep(keep, z)
            return keep
        if self.dropout_step is None or not self.training:
            return None
        if in_backward():
            step = self.dropout_step - 1  # activation checkpointing runs forward again: the same levels
        else:
            step = self.dropout_step.clone()
            self.dropout_step.add_(1)
        together = self.dropout == "batch" or len(self._layout.places(z.shape)) == 0
        found = levels_to_keep(
            step,
            1 if together else z.shape[0],
            levels=self.num_levels,
            least=self.dropout_least,
            multiple=self.dropout_multiple,
            share=self.dropout_share,
            seed=self.dropout_seed,
        )
        return found[0] if together else found

    def check_keep(self, keep: Tensor, z: Tensor) -> None:
        """``keep`` of a call is one number of levels, or one for each entry of the first dim of ``z``."""
        arguments.check_indices(keep, "keep")
        entries = tuple(self._layout.places(z.shape)[:1])
        if tuple(keep.shape) not in ((), entries):
            raise ValueError(f"keep has shape {arguments.shape_of(keep)}; expected () or {entries}")
        arguments.check_range("keep", keep, 1, self.num_levels)

    def _mask(self, mask: Tensor | None, keep: Tensor | None, level: int, z: Tensor) -> Tensor | None:
        """Positions of this level: those of ``mask`` in entries that keep it."""
        if keep is None:
            return mask
        places = self._layout.places(z.shape)
        kept = (keep.to(z.device) > level).view((-1,) + (1,) * (len(places) - 1)).expand(places)
        return kept if mask is None else kept & mask

    def _outside(self, total: Tensor, z: Tensor, mask: Tensor | None) -> Tensor:
        """Project out and cast; masked positions are zeros without a gradient."""
        out = total if self.project_out is None else self.project_out(total)
        if mask is not None:
            out = torch.where(mask.unsqueeze(1 if self._first(z) else -1), out, 0.0)
        return out.to(z.dtype)

    # -- learning ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _pooled(self) -> Iterator[None]:
        """A shared codebook stays as it is until the last level was quantized."""
        shared = self.level(0)
        if self.shared_codebook and not shared._pooling and self.training and not shared.frozen and not in_backward():
            with shared.accumulating():
                yield
        else:
            yield

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """Pool the statistics of several forward passes into one update; see :class:`vqkernels.VectorQuantizer`."""
        with contextlib.ExitStack() as stack:
            for i in range(1 if self.shared_codebook else self.num_levels):
                stack.enter_context(self.level(i).accumulating())
            yield

    @torch.no_grad()
    def initialize(self, z: Tensor, mask: Tensor | None = None) -> None:
        """k-means on ``z``, level by level, whatever ``init`` is; all processes must call."""
        residual = z if self.project_in is None else self.project_in(z)
        residual = residual if residual.dtype == torch.float64 else residual.float()
        training = self.training
        self.eval()
        try:
            for i in range(1 if self.shared_codebook else self.num_levels):
                self.level(i).initialize(residual, mask)
                residual = residual - self.level(i)(residual, mask).quantized
        finally:
            self.train(training)

    def freeze(self) -> None:
        """Stop all learning of the codebooks."""
        for i in range(len(self.layers)):
            self.level(i).freeze()

    def unfreeze(self) -> None:
        """Undo :meth:`freeze`."""
        for i in range(len(self.layers)):
            self.level(i).unfreeze()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        checkpoints.rename_levels(state_dict, prefix, self.shared_codebook)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # -- usage and rates -----------------------------------------------------------------------------------------------

    def usage(self) -> list[float]:
        """:meth:`vqkernels.VectorQuantizer.usage` of each level (one number with a shared codebook)."""
        return [self.level(i).usage() for i in range(len(self.layers))]

    def perplexity(self) -> list[float]:
        """:meth:`vqkernels.VectorQuantizer.perplexity` of each level (one number with a shared codebook)."""
        return [self.level(i).perplexity() for i in range(len(self.layers))]

    def reset_usage(self) -> None:
        """Start counting anew."""
        for i in range(len(self.layers)):
            self.level(i).reset_usage()

    def bitrate(self, frame_rate: float, num_levels: int | None = None) -> float:
        """Bits per second of ``frame_rate`` positions per second, log2 K bits per level."""
        arguments.check_number("frame_rate", frame_rate)
        return frame_rate * sum(math.log2(k) for k in self.sizes[: check_levels(num_levels, self.num_levels)])

    def levels_for(self, bits_per_second: float, frame_rate: float) -> int:
        """The most levels whose :meth:`bitrate` is at most ``bits_per_second``, at least one (EnCodec's ``n_q``)."""
        arguments.check_number("bits_per_second", bits_per_second)
        fitting = [q for q in range(1, self.num_levels + 1) if self.bitrate(frame_rate, q) <= bits_per_second]
        return max(fitting, default=1)


def _per_level(name: str, value: int | Sequence[int], levels: int | None) -> list[int]:
    """One number per level."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if levels is not None and len(value) != levels:
            raise ValueError(f"{name} has {len(value)} entries; expected one for each of {levels} levels")
        if not value:
            raise ValueError(f"{name} is empty; expected one number per level")
        found = list(value)
    else:
        if levels is None:
            raise ValueError(f"num_levels is None; expected a number of levels, as {name} is {value!r}")
        arguments.check_count("num_levels", levels)
        found = [value] * levels
    for number in found:
        arguments.check_count(name, number)
    return found
