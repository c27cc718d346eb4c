"""Encoder and decoder of the VQGAN: levels of residual blocks and attention, one resolution each.

Used by :class:`vqkernels.models.VQGAN`; sizes come from :class:`VQGANConfig`.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vqkernels.models.blocks import AttentionBlock, Downsample, ResnetBlock, Upsample, group_norm
from vqkernels.models.vqgan_config import VQGANConfig

__all__ = ["VQGANDecoder", "VQGANEncoder"]


class _Level(nn.Module):
    """Blocks at one resolution, each followed by attention if the level has it, then the change of resolution."""

    def __init__(
        self, config: VQGANConfig, sizes: tuple[int, int], blocks: int, attention: bool, resample: nn.Module | None
    ) -> None:
        super().__init__()
        widths = (sizes[0], *[sizes[1]] * blocks)
        groups = config.norm_groups
        self.blocks = nn.ModuleList(ResnetBlock(a, b, groups, config.dropout) for a, b in itertools.pairwise(widths))
        self.attention = nn.ModuleList(AttentionBlock(sizes[1], groups) for _ in range(blocks if attention else 0))
        self.resample = resample
        self.recompute = config.checkpoint_activations

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = _run(block, x, self.recompute)
            if self.attention:
                x = _run(self.attention[i], x, self.recompute)
        return x if self.resample is None else self.resample(x)


class _Middle(nn.ModuleList):
    """Residual block, attention, residual block at the coarsest resolution."""

    def __init__(self, config: VQGANConfig) -> None:
        width, groups = config.widths[-1], config.norm_groups
        layers: list[nn.Module] = [ResnetBlock(width, width, groups, config.dropout) for _ in range(2)]
        if config.middle_attention:
            layers.insert(1, AttentionBlock(width, groups))
        super().__init__(layers)
        self.recompute = config.checkpoint_activations

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = _run(layer, x, self.recompute)
        return x


def _run(layer: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    if recompute and layer.training and torch.is_grad_enabled():
        out: Tensor = checkpoint(layer, x, use_reentrant=False)
    else:
        out = layer(x)
    return out


class VQGANEncoder(nn.Module):
    """Images (B, C, H, W) in [-1, 1] to (B, z_channels, H / downsample, W / downsample)."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = (config.channels, *config.widths)
        last = len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.image_channels, config.channels, 3, padding=1)
        self.levels = nn.ModuleList(
            _Level(
                config,
                sizes,
                config.blocks,
                config.factors[i] in config.attention,
                Downsample(sizes[1], config.resample_with_conv) if i < last else None,
            )
            for i, sizes in enumerate(itertools.pairwise(widths))
        )
        self.middle = _Middle(config)
        self.norm_out = group_norm(widths[-1], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.levels:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.middle(x))))
        return out


class VQGANDecoder(nn.Module):
    """(B, z_channels, h, w) to images (B, C, H, W) in about [-1, 1]; its levels are in order of use, coarsest first."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = (config.widths[-1], *reversed(config.widths))
        factors = tuple(reversed(config.factors))
        last = len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.middle = _Middle(config)
        self.levels = nn.ModuleList(
            _Level(
                config,
                sizes,
                config.decoder_blocks or config.blocks + 1,
                factors[i] in config.attention,
                Upsample(sizes[1], config.resample_with_conv) if i < last else None,
            )
            for i, sizes in enumerate(itertools.pairwise(widths))
        )
        self.norm_out = group_norm(widths[-1], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x: Tensor = self.middle(self.conv_in(z))
        for level in self.levels:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out
