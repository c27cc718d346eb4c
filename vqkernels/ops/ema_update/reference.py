"""``ema_update`` in pure PyTorch: any device, in place. The fallback, and written to be read.

Called by ``dispatch``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels import _devices


def supports(
    cluster_size: Tensor,
    embed_avg: Tensor,
    codebook: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    eps: float,
    normalize: bool,
) -> str | None:
    """Everything."""
    return None


def run(
    cluster_size: Tensor,
    embed_avg: Tensor,
    codebook: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    eps: float,
    normalize: bool,
) -> None:
    """See the contract in the package docstring."""
    cluster_size.mul_(decay).add_(counts, alpha=1 - decay)
    embed_avg.mul_(decay).add_(sums, alpha=1 - decay)
    # Counts add up to N: in float64, where there is one, the total is as good as exact.
    size = cluster_size.to(_devices.widest(cluster_size.device))
    total = size.sum(1, keepdim=True)
    denominator = total + size.shape[1] * eps
    # Nothing seen yet and eps = 0: 0 / 0 would be NaN, but such a codebook just stays.
    smoothed = (size + eps) / torch.where(denominator == 0, 1.0, denominator) * total
    smoothed = smoothed.to(torch.float32)[:, :, None]
    codes = embed_avg / smoothed
    if normalize:
        codes = torch.nn.functional.normalize(codes, dim=2)
    codebook.copy_(torch.where(smoothed == 0, codebook, codes))
