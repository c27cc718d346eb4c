"""How many residual levels a training step keeps: arithmetic on a step counter, no generator, no wait for the device.

Called by the residual quantizers. Every process computes the same numbers from the same counter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels import _arguments as arguments
from vqkernels.nn.statistics import scramble

__all__ = ["DROPOUTS", "check_levels", "levels_to_keep"]

DROPOUTS = ("batch", "sample")


def check_levels(num_levels: int | None, most: int, least: int = 1) -> int:
    """``num_levels`` of a call, in [least, most]; ``None`` is all of them."""
    if num_levels is None:
        return most
    arguments.check_count("num_levels", num_levels)
    if not least <= num_levels <= most:
        raise ValueError(f"num_levels is {num_levels}; expected {least} to {most}")
    return num_levels


def levels_to_keep(
    step: Tensor, count: int, *, levels: int, least: int = 1, multiple: int = 1, share: float = 1.0, seed: int = 0
) -> Tensor:
    """Uniform numbers of levels to keep.

    Args:
        step: 0-d int64.
        count: how many numbers; they differ from each other.
        levels: Q, the most.
        least: the fewest, before rounding.
        multiple: round up to a multiple of this, at most Q (EnCodec's structured dropout).
        share: of the numbers that are drawn at all; the others are Q.
        seed: of the hash.

    Returns:
        int64 (count,), on the device of ``step``.

    Example:
        >>> import torch
        >>> levels_to_keep(torch.tensor(3), 4, levels=8, multiple=4).tolist()
        [8, 8, 4, 4]
    """
    # Two rounds: one alone leaves neighbouring steps related.
    each = scramble(scramble(step + 1_000_003 * seed) + torch.arange(count, device=step.device))
    kept = least + each % (levels - least + 1)
    kept = ((kept + multiple - 1) // multiple * multiple).clamp(max=levels)
    drawn = scramble(each + 1) % 2**20 < int(share * 2**20)
    return torch.where(drawn, kept, levels)
