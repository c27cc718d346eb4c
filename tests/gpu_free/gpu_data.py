"""Data that the tests of GPU kernels share: awkward layouts, rows on codes and halfway between two, planted crowds.

Used by hosted_*.py (csrc/cuda on the host), interpreted_*.py (Triton's interpreter) and tests/gpu (the real thing).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.ops.nearest import nearest
from vqkernels.testing import assert_nearest

__all__ = [
    "KINDS",
    "LAYOUTS",
    "Search",
    "case",
    "data",
    "every_length",
    "extremes",
    "laid_out",
    "opposite",
    "planted",
    "strided",
]

LAYOUTS = ("rows", "channel_first", "sliced")
# Values are converted where they are loaded and strides are followed there: one layout each is enough for most dtypes.
KINDS = (
    *((torch.float32, layout) for layout in LAYOUTS),
    *zip((torch.float64, torch.float16, torch.bfloat16), LAYOUTS, strict=True),
)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "channel_first":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        return torch.stack([x, x + 1], -1)[..., 0]
    return x


def case(sizes: tuple[int, ...], dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, codes and indices of which some are -1; ``sizes`` are H, B, S, D and K."""
    h, b, s, d, k = sizes
    indices = torch.randint(-1, k, (h, b, s))
    x, codes = torch.randn(h, b, s, d).to(dtype), torch.randn(h, k, d).to(dtype)
    return laid_out(x, layout), laid_out(codes, layout), indices


def data(n: int, k: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows and codes; every fourth row lies on a code or halfway between two."""
    x, codes = torch.randn(n, d), torch.randn(k, d)
    first, second = torch.randint(k, (2, n))
    x[1::4] = codes[first[1::4]]
    x[3::8] = (codes[first[3::8]] + codes[second[3::8]]) / 2
    return x.to(dtype), codes.to(dtype)


def strided(codes: int) -> list[tuple[Tensor, Tensor]]:
    """Rows and codes with heads, batches and strides of every kind, the last pair a channel-first feature map."""
    x = torch.randn(3, 5, 7, 2, 12).permute(3, 0, 2, 4, 1)[..., 1:, :].transpose(3, 4)  # (2, 3, 7, 5, 11)
    x = x.flatten(2, 3)[:, :, ::2]
    plane = torch.randn(2, 12, 3, 3).flatten(2).transpose(1, 2)[None]
    assert plane.stride(-1) == 9
    return [(x, torch.randn(11, 2, codes).permute(1, 2, 0)), (plane, torch.randn(1, 20, 12))]


def extremes() -> tuple[Tensor, Tensor]:
    """Rows and codes with NaN, infinities and zeros."""
    x, codes = data(24, 40, 6)
    x[2, 3], x[5, 0], x[6, 1], x[7] = float("nan"), float("inf"), float("-inf"), 0.0
    codes[4, 2], codes[9, 1], codes[11], codes[39, 5] = float("nan"), float("inf"), 0.0, float("-inf")
    return x, codes


def planted() -> tuple[Tensor, Tensor]:
    """Rows beside a crowd of codes that no screen can tell apart; lists of candidates overflow. Code 5 is in it."""
    codes = torch.randn(60, 12)
    codes[10:50] = codes[5] + torch.randn(40, 12) * 1e-6
    return torch.cat([codes[5:15], torch.randn(6, 12)]), codes


def opposite(dim: int, spread: float) -> tuple[Tensor, Tensor]:
    """Rows near the middle of codes in opposite pairs: which is nearest is a matter of |e|^2 / 2."""
    half = torch.nn.functional.normalize(torch.randn(70, dim)) * (1 + spread * torch.rand(70, 1))
    codes = torch.stack([half, -half], 1).flatten(0, 1)
    return torch.randn(24, dim) * torch.tensor([0.0, 1e-9, 1e-4, spread]).repeat(6)[:, None], codes


def every_length(dim: int, outlier: float) -> tuple[Tensor, Tensor]:
    """Rows of 2^-50 to 2^58 times the length of the codes, of which one is ``outlier`` times as long as the rest.

    The factor of the bias leaves float16 in the middle of them.
    """
    x, codes = torch.randn(109, dim), torch.randn(60, dim)
    codes[7] *= outlier
    return x * 2.0 ** torch.arange(-50, 59)[:, None], codes


class Search:
    """``nearest`` of one backend on rows and codes without batch and head."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __call__(self, x: Tensor, codes: Tensor, metric: str = "l2", precision: str = "exact") -> tuple[Tensor, Tensor]:
        indices, score = nearest(x[None, None], codes[None], metric, precision, self.backend)
        return indices[0, 0], score[0, 0]

    def check(self, x: Tensor, codes: Tensor, metric: str = "l2") -> None:
        """Every index and score is the float64 oracle's."""
        indices, score = self(x, codes, metric)
        assert_nearest(indices.cpu(), x.cpu(), codes.cpu(), metric, score.cpu())
