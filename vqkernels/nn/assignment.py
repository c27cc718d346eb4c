"""Entropies of the soft assignment softmax(score / temperature) of rows to codes, in blocks of rows: never N x K.

Called by :class:`vqkernels.VectorQuantizer`, and by users with a loss of their own. Forward keeps one mean probability
per code; backward makes each block's softmax again. O(N + K D) memory either way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vqkernels import _arguments as arguments

__all__ = ["assignment_entropies", "blocks", "mean_assignment", "soft_usage", "softmax_of_scores"]

# Elements of the block of scores that is alive at a time (a handful of such arrays at once).
BLOCK_ELEMENTS = 2**20


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
        RuntimeError: under ``torch.compile``; the number of blocks depends on N.

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
    if torch.compiler.is_compiling():
        raise RuntimeError("entropies of the soft assignment do not run under torch.compile; compile the model around")
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    flat, codes = rows.reshape(rows.shape[0], -1, rows.shape[-1]).to(wide), codes.to(wide)
    codes = F.normalize(codes, dim=-1) if metric == "cosine" else codes
    usable = flat.isfinite().all(-1)
    usable = usable if valid is None else usable & valid.reshape(usable.shape)
    weight = usable.to(wide)
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1.0)
    flat = torch.where(usable.unsqueeze(-1), flat, 0.0)
    found: tuple[Tensor, Tensor]
    found = _SoftUsage.apply(flat, codes, weight, metric == "l2", temperature)  # type: ignore[no-untyped-call]
    return found


class _SoftUsage(torch.autograd.Function):
    """Weighted mean entropy (H,) and weighted mean probability (H, K) of softmax over codes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, weight: Tensor, squared: bool, temperature: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, codes, weight)
        ctx.squared, ctx.temperature = squared, temperature
        entropy, usage = x.new_zeros(codes.shape[0]), x.new_zeros(codes.shape[:2])
        for head, block in blocks(x, codes):
            _, p, each = softmax_of_scores(x[head, block], codes[head], squared, temperature)
            w = weight[head, block]
            entropy[head] += w @ each
            usage[head] += w @ p
        return entropy, usage

    @staticmethod
    def backward(ctx: Any, grad_entropy: Tensor, grad_usage: Tensor) -> tuple[Any, ...]:
        x, codes, weight = ctx.saved_tensors
        dx, de = torch.zeros_like(x), torch.zeros_like(codes)
        factor = (2.0 if ctx.squared else 1.0) / ctx.temperature
        # Backward may be called inside of an autocast.
        with torch.no_grad(), torch.autocast(arguments.autocast_kind(x), enabled=False):
            for head, block in blocks(x, codes):
                log_p, p, each = softmax_of_scores(x[head, block], codes[head], ctx.squared, ctx.temperature)
                v = grad_usage[head]
                # Gradient of a block's logits: p (v - p.v) for the usage and -p (log p + H) for the entropy.
                inner = v - (p @ v).unsqueeze(1) - grad_entropy[head] * (log_p + each.unsqueeze(1))
                g = p.mul_(inner).mul_(weight[head, block].unsqueeze(1))
                dx[head, block] = factor * (g @ codes[head])
                de[head] += factor * (g.T @ x[head, block])
                if ctx.squared:
                    de[head] -= factor * g.sum(0).unsqueeze(1) * codes[head]
        return dx, de, None, None, None


def blocks(x: Tensor, codes: Tensor) -> list[tuple[int, slice]]:
    """(head, rows) pairs: so many rows (H, N, D) at a time that their scores for all codes are small."""
    step = max(1, BLOCK_ELEMENTS // codes.shape[1])
    return [(h, slice(i, i + step)) for h in range(x.shape[0]) for i in range(0, x.shape[1], step)]


def softmax_of_scores(x: Tensor, codes: Tensor, squared: bool, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """log p (n, K), p, and the entropy (n,) of each row (n, D). |x|^2 is the same for all codes and left out."""
    with torch.autocast(arguments.autocast_kind(x), enabled=False):
        score = torch.addmm(-codes.square().sum(1), x, codes.T, alpha=2.0) if squared else x @ codes.T
        log_p = score.div_(temperature).log_softmax(1)
        p = log_p.exp()
        return log_p, p, -(p * log_p).sum(1)
