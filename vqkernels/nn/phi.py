"""The phi convolutions of multi-scale quantization: they smooth what a coarse scale contributes after upsampling.

Called by :class:`vqkernels.nn.MultiScaleVectorQuantizer`. Tian et al. 2024, "Visual Autoregressive Modeling", alg. 1.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels import _arguments as arguments

__all__ = ["Phi", "PhiPerScale"]


class Phi(nn.Conv2d):
    """(1 - ratio) * h + ratio * conv3x3(h), in float32 whatever autocast says."""

    def __init__(self, dim: int, ratio: float, device: torch.device | str | None = None) -> None:
        super().__init__(dim, dim, 3, padding=1, device=device)
        self.ratio = ratio

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        with arguments.without_autocast(h):
            return (1 - self.ratio) * h + self.ratio * F.conv2d(h, self.weight, self.bias, padding=1)


class PhiPerScale(nn.Module):
    """``shared`` convolutions dealt out over the scales: 0 for one each, 1 for one in all, else so many.

    State: ``qresi_ls.{i}.weight`` and ``.bias``, as in VAR.

    Example:
        >>> PhiPerScale(4, 10, ratio=0.5, shared=4).owners
        [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    """

    def __init__(
        self, dim: int, scales: int, *, ratio: float, shared: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        count = scales if shared == 0 else shared
        self.qresi_ls = nn.ModuleList(Phi(dim, ratio, device) for _ in range(count if ratio > 0 else 0))
        # VAR's ticks: scale s of S takes the convolution whose tick is nearest to s / (S - 1). Its published models
        # (10 scales, 4 convolutions) have two ties, which only the same rounding, numpy's, decides in the same way.
        edge = 1 / 3 / count if count == 4 else 1 / 2 / count
        ticks = np.linspace(edge, 1 - edge, count)
        self.owners = [int(np.argmin(np.abs(ticks - s / max(scales - 1, 1)))) for s in range(scales)]

    def forward(self, h: Tensor, scale: int) -> Tensor:
        """Smooth (B, C, H, W) of one scale."""
        if not self.qresi_ls:
            return h
        out: Tensor = self.qresi_ls[self.owners[scale]](h)
        return out
