"""Several codebooks for one grid of latents: residual levels, and a coarse codebook before them (hybrid coding).

Used by :class:`vqkernels.models.VQGAN`. Sources: residual levels as in Lee et al. 2022, "Autoregressive Image
Generation using Residual Quantization"; a codebook at a coarser scale whose upsampled codes are subtracted as in Tian
et al. 2024, "Visual Autoregressive Modeling".
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels.functional import VQOutput
from vqkernels.models.config import check_int
from vqkernels.models.tokens import StreamsOutput, TokenStream
from vqkernels.models.vqgan_config import VQGANConfig
from vqkernels.nn import VectorQuantizer

__all__ = ["LevelsQuantizer", "build_quantizer"]


def build_quantizer(config: VQGANConfig) -> VectorQuantizer | LevelsQuantizer:
    """The quantizer that a config asks for.

    Raises:
        ValueError: the quantizer refuses one of its options.
    """
    try:
        if config.residual_levels == 1 and config.coarse_factor is None:
            return VectorQuantizer(config.codes, config.dim, channel_dim=1, **config.quantizer)
        return LevelsQuantizer(
            config.dim,
            config.codes,
            config.residual_levels,
            coarse_codes=config.coarse_codes,
            coarse_factor=config.coarse_factor,
            **config.quantizer,
        )
    except TypeError as e:
        raise ValueError(f"quantizer is {config.quantizer!r}: {e}") from e


class LevelsQuantizer(nn.Module):
    """Codebooks one after the other, each quantizing what those before it left over.

    The output is the sum of the codes; its gradient goes straight through to the input, once. Losses are summed over
    the levels, every level's against its own remainder.

    Without a coarse codebook and heads it computes what :class:`vqkernels.ResidualVectorQuantizer` does (a test holds
    the two together). It is a class of its own because that one refuses heads, gives all levels one seed, and has
    losses per level, where a model wants scalars; saved models know the levels as ``levels.{i}``.

    Args:
        dim: dims D of a code.
        codes: number of codes of every level.
        levels: how many.
        coarse_codes: of the coarse codebook, if there is one.
        coarse_factor: the coarse codebook comes first and quantizes means over this many places squared; its codes
            count for all of these places. ``None``: no coarse codebook.
        options: of every :class:`vqkernels.VectorQuantizer`.

    Raises:
        ValueError: ``levels`` is less than 1, or a quantizer refuses an option.

    Shape:
        (B, heads * dim, h, w), h and w multiples of ``coarse_factor``. ``indices`` (B, h, w, levels * heads); with a
        coarse codebook the tuple of its (B, h / coarse_factor, w / coarse_factor) and those.

    Example:
        >>> import torch
        >>> vq = LevelsQuantizer(4, 16, levels=2, coarse_codes=8, coarse_factor=2).eval()
        >>> out = vq(torch.randn(1, 4, 6, 6))
        >>> [tuple(i.shape) for i in out.indices]
        [(1, 3, 3), (1, 6, 6, 2)]
    """

    def __init__(
        self,
        dim: int,
        codes: int,
        levels: int = 1,
        *,
        coarse_codes: int | None = None,
        coarse_factor: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_int("levels", levels, 1)
        if options.get("gradient", "straight_through") != "straight_through":
            raise ValueError(
                f"gradient is {options['gradient']!r}; several codebooks work with 'straight_through' only"
            )
        if options.get("normalize") or options.get("metric", "l2") != "l2":
            raise ValueError("remainders are compared by 'l2'; expected no other metric and no normalize")
        self.coarse_factor = coarse_factor
        self.coarse = None
        if coarse_factor is not None:
            self.coarse = VectorQuantizer(coarse_codes or codes, dim, channel_dim=1, **options)
        # One seed per level, or k-means would start every level from the same rows.
        seed = int(options.pop("seed", 0))
        self.levels = nn.ModuleList(
            VectorQuantizer(codes, dim, channel_dim=1, seed=seed + i, **options) for i in range(levels)
        )
        self.codes, self.heads = codes, int(options.get("heads", 1))

    def _all(self) -> list[VectorQuantizer]:
        found = [self.coarse] if self.coarse is not None else []
        return found + [level for level in self.levels if isinstance(level, VectorQuantizer)]

    def streams(self, downsample: int) -> tuple[TokenStream, ...]:
        """The token streams, for latents at this spatial reduction."""
        fine = TokenStream(self.codes, downsample, len(self.levels) * self.heads)
        if self.coarse is None or self.coarse_factor is None:
            return (fine,)
        return TokenStream(self.coarse.num_embeddings, downsample * self.coarse_factor, self.heads), fine

    def forward(self, z: Tensor) -> VQOutput | StreamsOutput:
        """Quantize (B, heads * dim, h, w).

        Raises:
            ValueError, TypeError: shape, dtype or device do not fit.
        """
        # Remainders of remainders in 16 bits would be noise.
        wide = z if z.dtype == torch.float64 else z.float()
        outputs, fine, total = [], [], torch.zeros_like(wide)
        coarse_indices = None
        if self.coarse is not None:
            outputs.append(self.coarse(self._pool(wide)))
            coarse_indices = outputs[0].indices
            total = self._spread(outputs[0].quantized.detach())
        for level in self.levels:
            out: VQOutput = level(wide - total)
            outputs.append(out)
            fine.append(out.indices)
            total = total + out.quantized.detach()
        # z - z.detach() is zero, so the value is exactly the sum of the codes.
        quantized = total.to(z.dtype) + (z - z.detach())
        losses = [sum(terms[1:], terms[0]) for terms in zip(*(out[2:] for out in outputs), strict=True)]
        indices = torch.cat(fine, -1) if self.heads > 1 else torch.stack(fine, -1) if len(fine) > 1 else fine[0]
        if coarse_indices is None:
            return VQOutput(quantized, indices, *losses)
        return StreamsOutput(quantized, (coarse_indices, indices), *losses)

    def codes_to_output(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """The sum of the codes with these indices, in the form that :meth:`forward` returns them.

        Raises:
            ValueError, TypeError: the shapes do not fit.
        """
        per_place = len(self.levels) * self.heads
        given = (indices,) if isinstance(indices, Tensor) else tuple(indices)
        if len(given) != 1 + (self.coarse is not None):
            raise ValueError(f"indices has {len(given)} streams; expected {1 + (self.coarse is not None)}")
        fine = given[-1]
        if per_place > 1 and (fine.dim() < 1 or fine.shape[-1] != per_place):
            raise ValueError(
                f"indices has shape {tuple(fine.shape)}; expected (..., {per_place}), one per level and head"
            )
        parts: tuple[Tensor, ...] = (fine,)
        if per_place > 1:
            parts = torch.split(fine, self.heads, -1) if self.heads > 1 else fine.unbind(-1)
        total = None
        if self.coarse is not None:
            total = self._spread(self.coarse.codes_to_output(given[0]))
        for level, part in zip(self._all()[-len(self.levels) :], parts, strict=True):
            output = level.codes_to_output(part)
            total = output if total is None else total + output
        assert total is not None
        return total

    def _pool(self, z: Tensor) -> Tensor:
        f = self.coarse_factor or 1
        if z.dim() != 4 or z.shape[2] % f or z.shape[3] % f:
            raise ValueError(f"z has shape {tuple(z.shape)}; expected (B, C, h, w) with h and w multiples of {f}")
        return F.avg_pool2d(z, f)

    def _spread(self, codes: Tensor) -> Tensor:
        f = self.coarse_factor or 1
        return codes.repeat_interleave(f, 2).repeat_interleave(f, 3)

    def initialize(self, z: Tensor) -> None:
        """k-means for every codebook, each on what those before it leave; all processes must call.

        Raises:
            ValueError: there is no finite vector to start from.
        """
        with torch.no_grad():
            rest = z.detach()
            for vq in self._all():
                coarse = vq is self.coarse
                part = self._pool(rest) if coarse else rest
                vq.initialize(part)
                training = vq.training
                codes = vq.eval()(part).quantized
                vq.train(training)
                rest = rest - (self._spread(codes) if coarse else codes)

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """See :meth:`vqkernels.VectorQuantizer.accumulating`."""
        with contextlib.ExitStack() as stack:
            for vq in self._all():
                stack.enter_context(vq.accumulating())
            yield

    def freeze(self) -> None:
        """Stop all learning, see :meth:`vqkernels.VectorQuantizer.freeze`."""
        for vq in self._all():
            vq.freeze()

    def unfreeze(self) -> None:
        """Undo :meth:`freeze`."""
        for vq in self._all():
            vq.unfreeze()

    def usage(self) -> float:
        """Mean over the codebooks of the share of codes used in training."""
        return sum(vq.usage() for vq in self._all()) / len(self._all())

    def perplexity(self) -> float:
        """Mean over the codebooks of exp(entropy) of the codes used in training."""
        return sum(vq.perplexity() for vq in self._all()) / len(self._all())

    def reset_usage(self) -> None:
        """Start counting anew."""
        for vq in self._all():
            vq.reset_usage()
