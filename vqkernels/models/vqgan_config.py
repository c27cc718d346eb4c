"""The sizes and switches of a VQGAN generator, checked.

Used by :mod:`vqkernels.models.vqgan` and its parts; docs/models.md says which switch is which technique.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vqkernels.models.config import Config, WithCodebook, check_int, check_ints, check_number

__all__ = ["VQGANConfig"]


@dataclass(frozen=True)
class VQGANConfig(WithCodebook, Config):
    """Sizes and switches of a :class:`vqkernels.models.VQGAN`.

    Args:
        image_channels: 3 for RGB, 1 for grey.
        channels: width at full resolution.
        multipliers: width of every level as a multiple of ``channels``, finest first; between two levels the side is
            halved, so ``downsample`` is ``2 ** (len(multipliers) - 1)``.
        blocks: residual blocks per level of the encoder.
        decoder_blocks: residual blocks per level of the decoder; default ``blocks + 1``. More is a deeper generator.
        attention_factors: attention after every block of the levels with these spatial reductions: ``(16,)`` is
            what ``attn_resolutions: [16]`` means for 256 x 256 images, at any image size. ``None`` for the coarsest
            level, as in all published models; ``()`` for none.
        middle_attention: attention between the two residual blocks of the coarsest resolution.
        z_channels: width of the encoder's output, before the 1x1 convolution to the latents.
        codes: number of codes K.
        dim: length D of a code; with several heads the latents have ``heads * dim`` channels.
        quantizer: further options of :class:`vqkernels.VectorQuantizer` (``decay``, ``init``, ``heads``, ...), for
            every codebook of the model.
        residual_levels: codebooks that correct each other's error: level q quantizes what the levels before left.
        coarse_factor: hybrid coding: a further codebook quantizes the mean of ``coarse_factor`` x ``coarse_factor``
            places first, as a token stream of its own, and the others what it left; ``None`` for none.
        coarse_codes: its number of codes; default ``codes``.
        resample_with_conv: a convolution at every halving and doubling; ``False`` for means and repetition.
        norm_groups: of every GroupNorm; fewer where it does not divide the width.
        dropout: in the residual blocks.
        checkpoint_activations: recompute the blocks in backward instead of keeping their activations.

    Raises:
        ValueError: a size is out of range, or ``quantizer`` sets what has its own field.

    Example:
        >>> config = VQGANConfig(multipliers=(1, 2, 4), coarse_factor=2)
        >>> config.downsample, config.multiple
        (4, 8)
    """

    image_channels: int = 3
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    decoder_blocks: int | None = None
    attention_factors: tuple[int, ...] | None = None
    middle_attention: bool = True
    z_channels: int = 256
    codes: int = 16384
    dim: int = 256
    quantizer: dict[str, Any] = field(default_factory=dict)
    residual_levels: int = 1
    coarse_factor: int | None = None
    coarse_codes: int | None = None
    resample_with_conv: bool = True
    norm_groups: int = 32
    dropout: float = 0.0
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        for name in (
            "image_channels",
            "channels",
            "blocks",
            "z_channels",
            "codes",
            "dim",
            "residual_levels",
            "norm_groups",
        ):
            check_int(name, getattr(self, name), 1)
        for name in ("decoder_blocks", "coarse_codes"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        if self.coarse_factor is not None:
            check_int("coarse_factor", self.coarse_factor, 2)
        elif self.coarse_codes is not None:
            raise ValueError(f"coarse_codes is {self.coarse_codes} without coarse_factor; expected both or neither")
        check_ints("multipliers", self.multipliers, 1)
        check_ints("attention_factors", self.attention, 1, empty=True)
        for factor in self.attention:
            if factor not in self.factors:
                raise ValueError(f"attention_factors has {factor}; the levels have {', '.join(map(str, self.factors))}")
        check_number("dropout", self.dropout, 0.0, 1.0)
        self.check_quantizer()

    @property
    def factors(self) -> tuple[int, ...]:
        """Spatial reduction of every level, finest first."""
        return tuple(1 << i for i in range(len(self.multipliers)))

    @property
    def attention(self) -> tuple[int, ...]:
        """``attention_factors`` with its default filled in."""
        return self.factors[-1:] if self.attention_factors is None else self.attention_factors

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level, finest first."""
        return tuple(self.channels * m for m in self.multipliers)

    @property
    def downsample(self) -> int:
        """One place of the finest token grid stands for this many pixels on a side."""
        return self.factors[-1]

    @property
    def multiple(self) -> int:
        """Height and width of an image are multiples of this."""
        return self.downsample * (self.coarse_factor or 1)
