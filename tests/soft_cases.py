"""The soft assignment in float64, N x K, and the cases on which ``soft_assign`` and its gradient are compared with it.

Called by tests/ops/test_soft_assign*.py.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """H heads, N rows, K codes, D dims."""

    h: int
    n: int
    k: int
    d: int

    def __str__(self) -> str:
        return f"{self.h}x{self.n}x{self.k}x{self.d}"


# Around the widths of panels (8, 16, 64 codes) and tiles (4 or 6 rows or dims), of sums (128) and of blocks of rows.
CASES = tuple(
    Case(*sizes)
    for sizes in (
        (1, 0, 3, 2),
        (1, 1, 1, 1),
        (1, 5, 2, 1),
        (2, 100, 63, 1),
        (1, 5, 1, 3),
        (1, 100, 257, 3),
        (1, 1, 63, 8),
        (1, 100, 4096, 8),
        (3, 5, 63, 12),
        (1, 100, 257, 12),
        (1, 7, 130, 64),
        (1, 100, 63, 65),
        (1, 5, 2, 256),
        (1, 100, 257, 256),
        (2, 1600, 9, 5),
        (1, 261, 4096, 20),
    )
)
TEMPERATURES = (1.0, 0.1, 0.01, 0.005)


def inputs(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, codes and weights; every seventh weight is 0, and every third row is near a code."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    x = torch.randn(case.h, case.n, case.d, generator=generator)
    codes = torch.randn(case.h, case.k, case.d, generator=generator)
    near = torch.randint(case.k, (case.n,), generator=generator)
    x[:, ::3] = codes[:, near[::3]] + 0.05 * x[:, ::3]
    weight = torch.rand(case.h, case.n, generator=generator) / max(case.n, 1)
    weight[:, 6::7] = 0.0
    return x.to(dtype), codes.to(dtype), weight


def log_softmax(x: Tensor, codes: Tensor, squared: bool, temperature: float) -> Tensor:
    """log p (H, N, K)."""
    score = 2 * x @ codes.mT - codes.square().sum(-1).unsqueeze(1) if squared else x @ codes.mT
    return (score / temperature).log_softmax(-1)


def oracle(x: Tensor, codes: Tensor, weight: Tensor, squared: bool, temperature: float) -> tuple[Tensor, Tensor]:
    """Entropy (H,) and usage (H, K) in float64."""
    log_p = log_softmax(x.double(), codes.double(), squared, temperature)
    p, w = log_p.exp(), weight.double()
    return -(w * torch.where(p > 0, p * log_p, 0.0).sum(-1)).sum(-1), (w.unsqueeze(-1) * p).sum(1)


def oracle_grad(
    x: Tensor,
    codes: Tensor,
    weight: Tensor,
    grad_entropy: Tensor | None,
    grad_usage: Tensor | None,
    grad_soft: Tensor | None,
    values: Tensor | None,
    squared: bool,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """dx and dcodes in float64, by autograd."""
    x, codes, w = x.double().requires_grad_(), codes.double().requires_grad_(), weight.double()
    entropy, usage = oracle(x, codes, w, squared, temperature)
    loss = 0.0 * (entropy.sum() + x.sum() + codes.sum())
    if grad_entropy is not None:
        loss = loss + (grad_entropy.double() * entropy).sum()
    if grad_usage is not None:
        loss = loss + (grad_usage.double() * usage).sum()
    if grad_soft is not None and values is not None:
        soft = log_softmax(x, codes, squared, temperature).exp() @ values.double()
        loss = loss + (w.unsqueeze(-1) * grad_soft.double() * soft).sum()
    dx, dcodes = torch.autograd.grad(loss, (x, codes))
    return dx, dcodes


def error(found: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert found.shape == exact.shape
    assert found.isfinite().all()
    if exact.numel() == 0:
        return 0.0
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def reach(x: Tensor, codes: Tensor, temperature: float) -> float:
    """How far rounding may move a score / temperature: float32 sums of products of that size."""
    longest = [float(t.double().norm(dim=-1).max()) if t.numel() else 0.0 for t in (x, codes)]
    return 2.0**-24 * 4 * (2 * longest[0] * longest[1] + longest[1] ** 2) / temperature
