"""How a codebook is used: counts per code, usage, perplexity, and rows of the batch to replace dead codes with.

Called by :class:`vqkernels.nn.VectorQuantizer` and by evaluation code. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels import _arguments as arguments
from vqkernels import _devices

__all__ = ["candidate_rows", "count_codes", "perplexity", "refuse_samples", "scramble", "usage"]


def count_codes(indices: Tensor, num_codes: int) -> Tensor:
    """How often each code occurs in the last dims of ``indices`` (H, ...), int64 (H, K); -1 is not counted.

    Raises:
        RuntimeError: under ``torch.vmap``; there is one state of the quantizer, not one per sample.

    Example:
        >>> import torch
        >>> count_codes(torch.tensor([[0, 2, 2, -1]]), 3).tolist()
        [[1, 0, 2]]
    """
    refuse_samples(indices)
    flat = indices.flatten(1) + 1
    counts = torch.zeros((flat.shape[0], num_codes + 1), dtype=torch.int64, device=flat.device)
    # Integer sums: exact, hence the same in any order.
    return counts.scatter_add_(1, flat, torch.ones_like(flat))[:, 1:]


def refuse_samples(indices: Tensor) -> None:
    """Indices of ``torch.vmap`` enter no statistic: there is one state of a quantizer, not one per sample."""
    if arguments.is_batched(indices):
        raise RuntimeError(
            "vqkernels: a quantizer in training counts its codes, and under torch.vmap each sample would; call eval()"
        )


def usage(counts: Tensor) -> Tensor:
    """Fraction of codes that were used at all: ``counts`` (..., K) to (...).

    Example:
        >>> import torch
        >>> usage(torch.tensor([5, 0, 1, 0])).item()
        0.5
    """
    if _devices.lacks_float64(counts.device):
        return usage(counts.cpu()).to(counts.device, torch.float32)
    return (counts > 0).double().mean(-1)


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the code distribution, in [1, K]; 0 if nothing was counted. (..., K) to (...).

    Example:
        >>> import torch
        >>> round(perplexity(torch.tensor([3, 3, 0, 0])).item(), 6)
        2.0
    """
    if _devices.lacks_float64(counts.device):
        return perplexity(counts.cpu()).to(counts.device, torch.float32)
    total = counts.sum(-1, keepdim=True)
    p = counts.double() / total.clamp(min=1)
    return torch.where(total.squeeze(-1) > 0, torch.special.entr(p).sum(-1).exp(), 0.0)


def candidate_rows(
    rows: Tensor, indices: Tensor, step: Tensor, num_codes: int, rank: int, size: int
) -> tuple[Tensor, Tensor]:
    """One row of the batch for every code, chosen by arithmetic on the step, without a random generator.

    The rows are spread evenly over those that count (index >= 0), distinct if there are at least K of them. With
    several processes each code has one owner; the sum over all processes is the choice that all agree on.

    Args:
        rows: (H, B, S, D).
        indices: (H, B, S), -1 where a row must not be taken.
        step: 0-d int64.

    Returns:
        ``values`` (H, K, D) float32 and ``found`` (H, K) float32; zeros where another process owns the code or where
        there is no row.
    """
    h, _, s, d = rows.shape
    device = rows.device
    if indices.numel() == 0:
        return torch.zeros((h, num_codes, d), device=device), torch.zeros((h, num_codes), device=device)
    order = (indices.flatten(1) >= 0).cumsum(1)
    total = order[:, -1:]
    code = torch.arange(num_codes, device=device)
    head = torch.arange(h, device=device)[:, None]
    # Any whole number would do; multiples of a large odd one spread over the rows as steps go by.
    first = (step + 7919 * head) * 0x1E3779B1
    position = (first + code * total // num_codes) % total.clamp(min=1)
    row = torch.searchsorted(order, position, right=True).clamp(max=order.shape[1] - 1)
    found = (total > 0).expand(h, num_codes)
    if size > 1:
        found = found & ((code + step) % size == rank)
    values = torch.where(found[..., None], rows[head, row // s, row % s].float(), 0.0)
    return values, found.float()


def scramble(x: Tensor) -> Tensor:
    """A 31-bit integer hash (multiply and xor-shift; no product exceeds 63 bits)."""
    x = (x & 0x7FFFFFFF) * 0x1E3779B1 & 0x7FFFFFFF
    x = (x ^ (x >> 15)) * 0x2C1B3C6D & 0x7FFFFFFF
    x = (x ^ (x >> 12)) * 0x297A2D39 & 0x7FFFFFFF
    return x ^ (x >> 15)
