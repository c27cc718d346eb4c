"""VQ-VAE-2: two grids of codes, the bottom one conditioned on the top one.

Used like the other models; sizes come from :class:`VQVAE2Config`. Source: Razavi et al. 2019, "Generating Diverse
High-Fidelity Images with VQ-VAE-2", algorithm 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels.models.config import Config, WithCodebook, check_choice, check_int
from vqkernels.models.tokens import ModelOutput, StreamsOutput, TokenModel, TokenStream, check_images, evaluating
from vqkernels.models.vqvae import ResidualBlock
from vqkernels.nn import VectorQuantizer

__all__ = ["VQVAE2", "VQVAE2Config"]


@dataclass(frozen=True)
class VQVAE2Config(WithCodebook, Config):
    """Sizes of a :class:`VQVAE2`.

    Args:
        image_channels: 3 for RGB, 1 for grey.
        channels: hidden width.
        residual_blocks: per encoder and per decoder.
        residual_channels: width inside a residual block.
        bottom_factor: spatial reduction of the bottom grid, 2, 4 or 8; the top grid has half its side.
        codes: number of codes of each of the two codebooks.
        dim: length of a code; with several heads the latents have ``heads * dim`` channels.
        quantizer: further options of both :class:`vqkernels.VectorQuantizer`.

    Raises:
        ValueError: a size is out of range, or ``quantizer`` sets what has its own field.
    """

    image_channels: int = 3
    channels: int = 128
    residual_blocks: int = 2
    residual_channels: int = 64
    bottom_factor: int = 4
    codes: int = 512
    dim: int = 64
    quantizer: dict[str, Any] = field(default_factory=lambda: {"decay": 0.99})

    def __post_init__(self) -> None:
        for name in ("image_channels", "residual_channels", "codes", "dim"):
            check_int(name, getattr(self, name), 1)
        check_int("channels", self.channels, 2)
        check_int("residual_blocks", self.residual_blocks, 0)
        check_choice("bottom_factor", str(self.bottom_factor), ("2", "4", "8"))
        self.check_quantizer()

    @property
    def downsample(self) -> int:
        """Spatial reduction of the finest grid."""
        return self.bottom_factor


class _Half(nn.Module):
    """Strided convolutions, then residual blocks: (B, C, H, W) to (B, channels, H / factor, W / factor)."""

    def __init__(self, config: VQVAE2Config, channels_in: int, factor: int) -> None:
        super().__init__()
        width, halvings = config.channels, factor.bit_length() - 1
        widths = [channels_in, *[width // 2] * (halvings - 1), width]
        self.down = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in itertools.pairwise(widths))
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.residual = _residual(config)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.down:
            x = F.relu(layer(x))
        return F.relu(self.residual(self.mix(x)))


class _Double(nn.Module):
    """Residual blocks, then transposed convolutions: the mirror of :class:`_Half`."""

    def __init__(self, config: VQVAE2Config, channels_in: int, channels_out: int, factor: int) -> None:
        super().__init__()
        width, doublings = config.channels, factor.bit_length() - 1
        widths = [width, *[width // 2] * (doublings - 1), channels_out]
        self.mix = nn.Conv2d(channels_in, width, 3, padding=1)
        self.residual = _residual(config)
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, stride=2, padding=1) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.residual(self.mix(x)))
        for i, layer in enumerate(self.up):
            x = layer(x if i == 0 else F.relu(x))
        return x


def _residual(config: VQVAE2Config) -> nn.Sequential:
    return nn.Sequential(
        *(ResidualBlock(config.channels, config.residual_channels) for _ in range(config.residual_blocks))
    )


class VQVAE2(TokenModel):
    """Two-level hierarchical VQ-VAE. Images are floating point in [0, 1].

    Args:
        config: sizes; default :class:`VQVAE2Config`, those of the paper's 256 x 256 ImageNet model.

    Raises:
        ValueError: the quantizer refuses one of its options.

    Example:
        >>> import torch
        >>> model = VQVAE2(VQVAE2Config(channels=8, residual_channels=8, codes=16, dim=4)).eval()
        >>> top, bottom = model.encode(torch.rand(1, 3, 32, 32))
        >>> top.shape, bottom.shape
        (torch.Size([1, 4, 4]), torch.Size([1, 8, 8]))
    """

    config: VQVAE2Config
    config_class = VQVAE2Config

    def __init__(self, config: VQVAE2Config | None = None) -> None:
        super().__init__()
        self.config = c = config or VQVAE2Config()
        latent = c.latent_channels
        self.encoder_bottom = _Half(c, c.image_channels, c.bottom_factor)
        self.encoder_top = _Half(c, c.channels, 2)
        self.project_top = nn.Conv2d(c.channels, latent, 1)
        self.decoder_top = _Double(c, latent, latent, 2)
        self.project_bottom = nn.Conv2d(c.channels + latent, latent, 1)
        self.upsample_top = nn.ConvTranspose2d(latent, latent, 4, stride=2, padding=1)
        self.decoder = _Double(c, 2 * latent, c.image_channels, c.bottom_factor)
        try:
            self.quantizer_top = VectorQuantizer(c.codes, c.dim, channel_dim=1, **c.quantizer)
            self.quantizer_bottom = VectorQuantizer(c.codes, c.dim, channel_dim=1, **c.quantizer)
        except TypeError as e:
            raise ValueError(f"quantizer is {c.quantizer!r}: {e}") from e

    @property
    def last_layer(self) -> Tensor:
        """The weights of the last convolution, for the adaptive weight of the adversarial loss."""
        weight = self.decoder.up[-1].weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def streams(self) -> tuple[TokenStream, ...]:
        """The top and the bottom grid."""
        c = self.config
        return (
            TokenStream(c.codes, 2 * c.bottom_factor, c.heads),
            TokenStream(c.codes, c.bottom_factor, c.heads),
        )

    @property
    def multiple(self) -> int:
        """Height and width of an image are multiples of this."""
        return 2 * self.config.bottom_factor

    def _quantize(self, images: Tensor) -> tuple[Tensor, Tensor, StreamsOutput]:
        check_images(images, self.config.image_channels, self.multiple)
        bottom = self.encoder_bottom(images * 2 - 1)
        top = self.quantizer_top(self.project_top(self.encoder_top(bottom)))
        context = self.decoder_top(top.quantized)
        fine = self.quantizer_bottom(self.project_bottom(torch.cat([context, bottom], 1)))
        losses = [a + b for a, b in zip(top[2:], fine[2:], strict=True)]
        return top.quantized, fine.quantized, StreamsOutput(fine.quantized, (top.indices, fine.indices), *losses)

    def _decode(self, top: Tensor, bottom: Tensor) -> Tensor:
        decoded: Tensor = self.decoder(torch.cat([self.upsample_top(top), bottom], 1))
        return decoded * 0.5 + 0.5

    def forward(self, images: Tensor) -> ModelOutput:
        """Reconstruct ``images`` through both codebooks; losses are those of the two grids together.

        Args:
            images: (B, C, H, W) in [0, 1]; H and W are multiples of ``multiple``.

        Returns:
            The reconstruction and the quantizers' output; ``quantized`` is the bottom grid's.

        Raises:
            ValueError: the shape does not fit the config.
            TypeError: the images are not floating point.
        """
        top, bottom, out = self._quantize(images)
        return ModelOutput(self._decode(top, bottom), out)

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Tokens of images, without changing any statistic of the codebooks.

        Args:
            images: as in :meth:`forward`.

        Returns:
            int64 (B, h / 2, w / 2) and (B, h, w), with a last dim of H if there are several heads.

        Raises:
            ValueError, TypeError: as in :meth:`forward`.
        """
        with evaluating(self):
            return self._quantize(images)[2].indices

    def decode(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """Images of tokens.

        Args:
            indices: as :meth:`encode` returns them.

        Returns:
            (B, C, H, W), clamped to [0, 1].

        Raises:
            ValueError, TypeError: a quantizer refuses the indices, or there are not two grids that fit together.
        """
        if isinstance(indices, Tensor) or len(indices) != 2:
            raise ValueError("indices is no pair; expected the top and the bottom grid")
        top, bottom = indices
        if any(2 * a != b for a, b in zip(top.shape[1:3], bottom.shape[1:3], strict=True)):
            raise ValueError(f"the grids are {tuple(top.shape)} and {tuple(bottom.shape)}; expected twice the side")
        dtype = self.upsample_top.weight.dtype
        parts = (self.quantizer_top.codes_to_output(top), self.quantizer_bottom.codes_to_output(bottom))
        return self._decode(*(part.to(dtype) for part in parts)).clamp(0, 1)
