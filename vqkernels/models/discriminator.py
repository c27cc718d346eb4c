"""Discriminators that judge patches: one logit per receptive field, at one scale or several.

Used by :class:`vqkernels.models.VQGANLoss`. Sources: Isola et al. 2017, "Image-to-Image Translation with Conditional
Adversarial Networks" (PatchGAN); Wang et al. 2018, "High-Resolution Image Synthesis with Conditional GANs" (scales).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from vqkernels.models.blocks import AttentionBlock, group_norm
from vqkernels.models.config import Config, check_choice, check_int
from vqkernels.models.pretrained import Pretrained

__all__ = ["DiscriminatorConfig", "MultiScaleDiscriminator", "PatchGANDiscriminator", "build_discriminator"]

NORMS = ("group", "batch", "spectral", "none")


@dataclass(frozen=True)
class DiscriminatorConfig(Config):
    """Sizes of a discriminator.

    Args:
        image_channels: 3 for RGB, 1 for grey.
        channels: width after the first convolution; every further one doubles it, up to eight times.
        layers: strided convolutions; 3 gives a receptive field of 70 pixels.
        norm: "group", "batch" (as in taming; its statistics couple the images of a batch, so several processes need
            ``torch.nn.SyncBatchNorm``), "spectral" (Miyato et al. 2018) or "none".
        attention: attention over the places before the last convolution (Zhang et al. 2019).
        scales: discriminators, each on an image of half the side of the one before.

    Raises:
        ValueError: a size is out of range.
    """

    image_channels: int = 3
    channels: int = 64
    layers: int = 3
    norm: str = "group"
    attention: bool = False
    scales: int = 1

    def __post_init__(self) -> None:
        for name in ("image_channels", "channels", "layers", "scales"):
            check_int(name, getattr(self, name), 1)
        check_choice("norm", self.norm, NORMS)


class PatchGANDiscriminator(Pretrained):
    """Images (B, C, H, W) in [0, 1] to logits (B, 1, h, w); positive means real.

    Args:
        config: sizes; ``scales`` must be 1.

    Raises:
        ValueError: several scales are asked for.

    Example:
        >>> import torch
        >>> PatchGANDiscriminator(DiscriminatorConfig(channels=8))(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 1, 6, 6])
    """

    config: DiscriminatorConfig
    config_class = DiscriminatorConfig

    def __init__(self, config: DiscriminatorConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or DiscriminatorConfig()
        if c.scales != 1:
            raise ValueError(f"scales is {c.scales}; a PatchGANDiscriminator has one, see MultiScaleDiscriminator")
        widths = [c.channels * min(2**i, 8) for i in range(c.layers + 1)]
        layers: list[nn.Module] = [_conv(c, c.image_channels, widths[0], 2), nn.LeakyReLU(0.2)]
        for i in range(1, c.layers + 1):
            layers += [
                _conv(c, widths[i - 1], widths[i], 2 if i < c.layers else 1),
                *_norm(c, widths[i]),
                nn.LeakyReLU(0.2),
            ]
        if c.attention:
            layers.append(AttentionBlock(widths[-1], 32, twice_differentiable=True))
        layers.append(_conv(c, widths[-1], 1, 1))
        self.main = nn.Sequential(*layers)

    @property
    def least_size(self) -> int:
        """The smallest height and width that leave one place."""
        size = 3  # two convolutions of kernel 4, stride 1 and padding 1 take one place each
        return int(size * 2**self.config.layers)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of ``images``.

        Raises:
            ValueError: an image is too small to leave one place.
        """
        if min(images.shape[-2:]) < self.least_size:
            raise ValueError(f"images has shape {tuple(images.shape)}; expected sides of at least {self.least_size}")
        logits: Tensor = self.main(images * 2 - 1)
        return logits


class MultiScaleDiscriminator(Pretrained):
    """One :class:`PatchGANDiscriminator` per scale: images (B, C, H, W) in [0, 1] to a tuple of logits, finest first.

    Args:
        config: sizes.

    Example:
        >>> import torch
        >>> d = MultiScaleDiscriminator(DiscriminatorConfig(channels=8, layers=2, scales=2))
        >>> [tuple(logits.shape) for logits in d(torch.rand(2, 3, 64, 64))]
        [(2, 1, 14, 14), (2, 1, 6, 6)]
    """

    config: DiscriminatorConfig
    config_class = DiscriminatorConfig

    def __init__(self, config: DiscriminatorConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or DiscriminatorConfig(scales=3)
        self.scales = nn.ModuleList(PatchGANDiscriminator(c.replace(scales=1)) for _ in range(c.scales))

    @property
    def least_size(self) -> int:
        """The smallest height and width that leave one place at every scale."""
        return int(3 * 2 ** (self.config.layers + self.config.scales - 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of ``images`` at every scale.

        Raises:
            ValueError: an image is too small to leave one place at the coarsest scale.
        """
        if min(images.shape[-2:]) < self.least_size:
            raise ValueError(f"images has shape {tuple(images.shape)}; expected sides of at least {self.least_size}")
        found = []
        for i, discriminator in enumerate(self.scales):
            found.append(discriminator(images if i == 0 else F.avg_pool2d(images, 2**i)))
        return tuple(found)


def build_discriminator(config: DiscriminatorConfig | None = None, **changes: Any) -> Pretrained:
    """The discriminator of a config: one scale or several.

    Raises:
        ValueError: a size is out of range.
    """
    config = (config or DiscriminatorConfig()).replace(**changes)
    return PatchGANDiscriminator(config) if config.scales == 1 else MultiScaleDiscriminator(config)


def _conv(config: DiscriminatorConfig, channels_in: int, channels_out: int, stride: int) -> nn.Module:
    conv = nn.Conv2d(channels_in, channels_out, 4, stride=stride, padding=1)
    nn.init.normal_(conv.weight, 0.0, 0.02)
    return spectral_norm(conv) if config.norm == "spectral" else conv


def _norm(config: DiscriminatorConfig, channels: int) -> list[nn.Module]:
    if config.norm == "group":
        return [group_norm(channels, 32)]
    return [nn.BatchNorm2d(channels)] if config.norm == "batch" else []
