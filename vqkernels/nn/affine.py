"""Affine reparametrisation: the codebook follows mean and spread of the batch as a whole (Huh et al. 2023, sec. 3.2).

Called by :class:`vqkernels.VectorQuantizer` with ``affine=True``. Codes that nothing chose move with the others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqkernels import _devices
from vqkernels.nn._distributed import all_reduce

__all__ = ["AffineCodes"]


class AffineCodes(nn.Module):
    """(e - mean of codes) * (std of rows / std of codes) + mean of rows, with moving averages of the four.

    Args:
        heads, dim: of the codebook.
        batch_decay: of the rows' mean and variance.
        codebook_decay: of the codes' mean and variance.
        sync: the rows of all processes, in one all-reduce per training step.

    State: ``batch_mean``, ``batch_variance``, ``codebook_mean``, ``codebook_variance`` (H, 1, D), ``ready`` ().

    Example:
        >>> import torch
        >>> affine = AffineCodes(1, 1)
        >>> affine.update(torch.tensor([0.0, 8.0]).view(1, 1, 2, 1), None, torch.tensor([[[-1.0], [1.0]]]))
        >>> affine(torch.tensor([[[-1.0], [1.0]]])).flatten().tolist()
        [0.0, 8.0]
    """

    batch_mean: Tensor
    batch_variance: Tensor
    codebook_mean: Tensor
    codebook_variance: Tensor
    ready: Tensor

    def __init__(
        self,
        heads: int,
        dim: int,
        *,
        batch_decay: float = 0.99,
        codebook_decay: float = 0.9,
        sync: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.batch_decay, self.codebook_decay, self.sync = batch_decay, codebook_decay, sync
        for name in ("batch", "codebook"):
            self.register_buffer(f"{name}_mean", torch.zeros((heads, 1, dim), device=device))
            self.register_buffer(f"{name}_variance", torch.ones((heads, 1, dim), device=device))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool, device=device))

    def reset_parameters(self) -> None:
        """Back to the identity."""
        for name in ("batch", "codebook"):
            getattr(self, f"{name}_mean").zero_()
            getattr(self, f"{name}_variance").fill_(1.0)
        self.ready.fill_(False)

    def _scale(self) -> Tensor:
        return (self.batch_variance.clamp(min=1e-5) / self.codebook_variance.clamp(min=1e-5)).sqrt()

    def forward(self, codes: Tensor) -> Tensor:
        """Codes (H, K, D) as they are compared and output."""
        # Copies: the averages move in place before backward runs.
        return (codes - self.codebook_mean.clone()) * self._scale() + self.batch_mean.clone()

    def inverse(self, rows: Tensor) -> Tensor:
        """Rows (H, B, S, D) where the codebook itself lives."""
        mean, scale, centre = (t.unsqueeze(1) for t in (self.batch_mean, self._scale(), self.codebook_mean))
        return (rows - mean) / scale + centre

    @torch.no_grad()
    def update(self, rows: Tensor, valid: Tensor | None, codes: Tensor) -> None:
        """Follow rows (H, B, S, D), those of ``valid`` (H, B, S), and codes (H, K, D); nothing without a row."""
        usable = rows.isfinite().all(-1)
        usable = usable if valid is None else usable & valid
        kept = torch.where(usable.unsqueeze(-1), rows.float(), 0.0)
        # In float64: far from 0, mean and mean square agree in most digits.
        if _devices.lacks_float64(rows.device):
            usable, kept = usable.cpu(), kept.cpu()
        sums = [values.sum((1, 2), dtype=torch.float64) for values in (usable, kept, kept.square())]
        total, first, second = all_reduce(sums, self.sync)
        count = total.clamp(min=1.0).unsqueeze(-1)
        mean = first / count
        variance = (second / count - mean.square()).clamp(min=0.0)
        mean, variance, seen = (t.to(rows.device) for t in (mean.float(), variance.float(), total.sum() > 0))
        found = {
            "batch": (mean.unsqueeze(1), variance.unsqueeze(1)),
            "codebook": (codes.mean(1, keepdim=True), codes.var(1, unbiased=False, keepdim=True)),
        }
        for name, decay in (("batch", self.batch_decay), ("codebook", self.codebook_decay)):
            for kind, value in zip(("mean", "variance"), found[name], strict=True):
                buffer = getattr(self, f"{name}_{kind}")
                new = torch.where(self.ready, buffer * decay + value * (1 - decay), value)
                buffer.copy_(torch.where(seen, new, buffer))
        self.ready.logical_or_(seen)
