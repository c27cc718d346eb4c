"""The VQ-VAE: a strided convolutional encoder, the quantizer, and a decoder that mirrors the encoder.

Used by ``vqkernels train`` and by anyone who wants a small tokeniser of images; sizes come from :class:`VQVAEConfig`.
Source: van den Oord et al. 2017, "Neural Discrete Representation Learning" (section 4.1).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vqkernels.functional import VQOutput
from vqkernels.models.config import Config, WithCodebook, check_int
from vqkernels.models.tokens import LatentModel, TokenStream, check_images
from vqkernels.nn import VectorQuantizer

__all__ = ["VQVAE", "Decoder", "Encoder", "ResidualBlock", "VQVAEConfig", "VQVAEOutput"]


@dataclass(frozen=True)
class VQVAEConfig(WithCodebook, Config):
    """Sizes of a :class:`VQVAE`.

    Args:
        image_channels: 3 for RGB, 1 for grey.
        base_channels: width after the first halving; every further halving doubles it, up to ``max_channels``.
        max_channels: the widest a layer gets.
        residual_blocks: residual blocks at the coarsest resolution, in the encoder and again in the decoder.
        residual_channels: width inside a residual block.
        downsample: spatial reduction, 2, 4, 8 or 16: one index stands for ``downsample`` x ``downsample`` pixels.
        codes: number of codes K.
        dim: length D of a code; with several heads the latents have ``heads * dim`` channels.
        quantizer: further options of :class:`vqkernels.VectorQuantizer` (``decay``, ``metric``, ``heads``, ...).
        checkpoint_activations: recompute the residual blocks in backward instead of keeping their activations.

    Raises:
        ValueError: a size is out of range, or ``quantizer`` sets what has its own field.

    Example:
        >>> VQVAEConfig(downsample=8).channels
        (64, 128, 256)
    """

    image_channels: int = 3
    base_channels: int = 64
    max_channels: int = 256
    residual_blocks: int = 2
    residual_channels: int = 64
    downsample: int = 4
    codes: int = 512
    dim: int = 64
    quantizer: dict[str, Any] = field(default_factory=dict)
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        for name in ("image_channels", "base_channels", "max_channels", "residual_channels", "codes", "dim"):
            check_int(name, getattr(self, name), 1)
        check_int("residual_blocks", self.residual_blocks, 0)
        if self.downsample not in (2, 4, 8, 16):
            raise ValueError(f"downsample is {self.downsample!r}; expected 2, 4, 8 or 16")
        self.check_quantizer()

    @property
    def channels(self) -> tuple[int, ...]:
        """Width after each halving, finest first."""
        halvings = self.downsample.bit_length() - 1
        return tuple(min(self.base_channels << i, self.max_channels) for i in range(halvings))


class ResidualBlock(nn.Module):
    """``x + conv1x1(relu(conv3x3(relu(x))))``: same shape in and out, (B, C, H, W)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, hidden, 3, padding=1)
        self.project = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.project(F.relu(self.conv(F.relu(x))))
        return x + added


class _ResidualStack(nn.ModuleList):
    """Residual blocks one after the other, recomputed in backward if asked for."""

    def __init__(self, config: VQVAEConfig, channels: int) -> None:
        super().__init__(ResidualBlock(channels, config.residual_channels) for _ in range(config.residual_blocks))
        self.recompute = config.checkpoint_activations

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            if self.recompute and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return F.relu(x)


class Encoder(nn.Module):
    """Images (B, C, H, W) to latents (B, heads * dim, H / downsample, W / downsample)."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = (config.image_channels, *config.channels)
        # Kernel 4 with stride 2 covers every pixel equally often, so no checkerboard is baked in.
        self.down = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in itertools.pairwise(widths))
        self.mix = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        self.residual = _ResidualStack(config, widths[-1])
        self.project = nn.Conv2d(widths[-1], config.latent_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for layer in self.down:
            x = F.relu(layer(x))
        latents: Tensor = self.project(self.residual(self.mix(x)))
        return latents


class Decoder(nn.Module):
    """Quantized latents (B, heads * dim, h, w) to images (B, C, h * downsample, w * downsample)."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = (*reversed(config.channels), config.image_channels)
        self.mix = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.residual = _ResidualStack(config, widths[0])
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, stride=2, padding=1) for a, b in itertools.pairwise(widths))

    def forward(self, quantized: Tensor) -> Tensor:
        x: Tensor = self.residual(self.mix(quantized))
        for i, layer in enumerate(self.up):
            x = layer(x if i == 0 else F.relu(x))
        return x


class VQVAEOutput(NamedTuple):
    """What :meth:`VQVAE.forward` returns.

    ``reconstruction`` (B, C, H, W) in about [0, 1] (not clamped, so that gradients flow); ``quantizer`` is the
    :class:`vqkernels.VQOutput` with ``indices`` (B, h, w) and the loss terms.
    """

    reconstruction: Tensor
    quantizer: VQOutput


class VQVAE(LatentModel):
    """Encoder, vector quantizer, decoder. Images are floating point in [0, 1].

    Args:
        config: sizes; default :class:`VQVAEConfig`.

    Raises:
        ValueError: the quantizer refuses one of its options.

    Example:
        >>> import torch
        >>> model = VQVAE(VQVAEConfig(base_channels=8, residual_channels=8, codes=16, dim=4)).eval()
        >>> images = torch.rand(2, 3, 32, 32)
        >>> indices = model.encode(images)
        >>> indices.shape, model.decode(indices).shape
        (torch.Size([2, 8, 8]), torch.Size([2, 3, 32, 32]))
    """

    config: VQVAEConfig
    config_class = VQVAEConfig

    def __init__(self, config: VQVAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VQVAEConfig()
        self.encoder = Encoder(config)
        try:
            self.quantizer = VectorQuantizer(config.codes, config.dim, channel_dim=1, **config.quantizer)
        except TypeError as e:
            raise ValueError(f"quantizer is {config.quantizer!r}: {e}") from e
        self.decoder = Decoder(config)

    @property
    def last_layer(self) -> Tensor:
        """The weights of the last convolution, for the adaptive weight of an adversarial loss."""
        weight = self.decoder.up[-1].weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def streams(self) -> tuple[TokenStream, ...]:
        """One token grid."""
        return (TokenStream(self.config.codes, self.config.downsample, self.config.heads),)

    @property
    def multiple(self) -> int:
        """Height and width of an image are multiples of this."""
        return self.config.downsample

    def latents(self, images: Tensor) -> Tensor:
        """(B, heads * dim, H / downsample, W / downsample), see :meth:`LatentModel.latents`."""
        check_images(images, self.config.image_channels, self.multiple)
        latents: Tensor = self.encoder(images * 2 - 1)
        return latents

    def decode_latents(self, quantized: Tensor) -> Tensor:
        """Images of quantized latents, see :meth:`LatentModel.decode_latents`."""
        decoded: Tensor = self.decoder(quantized)
        return decoded * 0.5 + 0.5

    def encode(self, images: Tensor) -> Tensor:
        """Tokens of images, see :meth:`LatentModel.encode`: one tensor, as there is one stream."""
        indices = super().encode(images)
        assert isinstance(indices, Tensor)
        return indices

    def forward(self, images: Tensor) -> VQVAEOutput:
        """Reconstruct ``images`` through the codebook; in training mode the quantizer learns as configured.

        Args:
            images: as in :meth:`latents`.

        Returns:
            The reconstruction and the quantizer's output.

        Raises:
            ValueError, TypeError: as in :meth:`latents`.
        """
        out: VQOutput = self.quantizer(self.latents(images))
        return VQVAEOutput(self.decode_latents(out.quantized), out)
