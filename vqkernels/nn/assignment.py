"""Entropies of the soft assignment softmax(score / temperature) of rows to codes, streamed: never N x K.

Called by :class:`vqkernels.VectorQuantizer`, and by users with a loss of their own. The ops ``soft_assign`` and
``soft_assign_grad`` do the work; backward makes the softmax again. O(N + K D) memory either way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vqkernels import _arguments as arguments
from vqkernels import ops
from vqkernels._gradients import once

__all__ = ["assignment_entropies", "mean_assignment", "scored", "soft_usage"]


def assignment_entropies(
    x: Tensor, codebook: Tensor, *, metric: str = "l2", temperature: float = 0.01, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How sure rows are of their code, and how evenly the batch uses the codes, both differentiable.

    Args:
        x: rows (..., D), or (H, ..., D) with heads.
        codebook: (K, D) or (H, K, D).
        metric: the score is minus the squared distance (``"l2"``), x.e / |e| (``"cosine"``) or x.e (``"dot"``).
        temperature: positive.
        mask: bool (...), rows to count.

    Returns:
        ``sample_entropy``, the mean over rows of the entropy of p(code | row), and ``batch_entropy``, the entropy of
        the mean of p(code | row); 0-d, in nats, means over heads. Rows with NaN or Inf are left out.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Example:
        >>> import torch, vqkernels
        >>> codes = torch.tensor([[0.0], [1.0]])
        >>> sample, batch = vqkernels.nn.assignment_entropies(torch.tensor([[0.0], [1.0]]), codes)
        >>> round(sample.item(), 3), round(batch.item(), 3)
        (0.0, 0.693)
    """
    arguments.check_choice("metric", metric)
    arguments.check_number("temperature", temperature)
    if temperature == 0:
        raise ValueError(f"temperature is {temperature!r}; expected a positive number")
    arguments.check_codebook(codebook)
    arguments.check_rows("x", x, codebook)
    heads = codebook.dim() == 3
    valid = None
    if mask is not None:
        arguments.check_mask(mask, x.shape[:-1], x, heads)
        valid = arguments.to_positions(mask.expand(x.shape[:-1]), heads)
    return soft_usage(arguments.to_rows(x, heads), arguments.to_codes(codebook), metric, temperature, valid)


def soft_usage(
    rows: Tensor, codes: Tensor, metric: str, temperature: float, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`assignment_entropies` on (H, B, S, D), (H, K, D) and (H, B, S), unchecked."""
    entropy, usage = mean_assignment(rows, codes, metric, temperature, valid)
    # Not torch.special.entr: its gradient at a probability that underflowed to 0 is infinite.
    batch = -(usage * usage.clamp(min=1e-30).log()).sum(-1).mean()
    return entropy.mean(), batch


def mean_assignment(
    rows: Tensor, codes: Tensor, metric: str, temperature: float, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Per head, the mean over rows of the entropy of p(code | row) (H,), and the mean of p(code | row) (H, K)."""
    flat, codes = scored(rows, codes, metric)
    usable = flat.isfinite().all(-1)
    usable = usable if valid is None else usable & valid.reshape(usable.shape)
    weight = usable.to(codes.dtype)
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1.0)
    found: tuple[Tensor, Tensor]
    found = _SoftAssign.apply(flat, codes, weight, metric == "l2", temperature)  # type: ignore[no-untyped-call]
    return found


def scored(rows: Tensor, codes: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Rows (H, B, S, D) as (H, N, D), and the codes that they are compared with, in the dtype of the scores."""
    codes = codes.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
    codes = F.normalize(codes, dim=-1) if metric == "cosine" else codes
    return rows.reshape(rows.shape[0], -1, rows.shape[-1]), codes


class _SoftAssign(torch.autograd.Function):
    """Weighted mean entropy (H,) and weighted mean probability (H, K) of softmax over codes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, weight: Tensor, squared: bool, temperature: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, codes, weight)
        ctx.squared, ctx.temperature = squared, temperature
        entropy, usage = ops.soft_assign(x, codes, weight, squared, temperature)
        return entropy, usage

    @staticmethod
    def backward(ctx: Any, grad_entropy: Tensor, grad_usage: Tensor) -> tuple[Any, ...]:
        x, codes, weight = ctx.saved_tensors
        with torch.no_grad():
            dx, dcodes = ops.soft_assign_grad(
                x, codes, weight, grad_entropy, grad_usage, None, None, ctx.squared, ctx.temperature
            )
        dx, dcodes = once((dx, dcodes), x, codes, grad_entropy, grad_usage)
        return dx, dcodes, None, None, None
