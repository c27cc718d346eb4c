"""``IndexRemap``: indices of a large codebook as positions in a list of the codes in use, and back.

Called by users between a quantizer and a prior. The ``remap`` option of taming-transformers, diffusers and SimVQ.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqkernels import _arguments as arguments

__all__ = ["IndexRemap"]


class IndexRemap(nn.Module):
    """Code ``used[i]`` becomes i.

    Args:
        used: integers (M,), the codes in use, each once; what taming's ``.npy`` file holds.
        num_embeddings: K, of the codebook; default the largest code in use plus one.
        unknown: what another code becomes: ``"random"`` one of the M, from torch's generator; ``"extra"`` M, a word of
            its own, which :meth:`inverse` turns into ``used[0]`` as taming does; or a number in [0, M).

    State: ``used`` (M,), as in taming-transformers.

    Example:
        >>> import torch, vqkernels
        >>> remap = vqkernels.nn.IndexRemap(torch.tensor([7, 3, 5]), 10, unknown="extra")
        >>> remap(torch.tensor([3, 7, 9, -1])).tolist(), remap.inverse(torch.tensor([1, 0, 3, -1])).tolist()
        ([1, 0, 3, -1], [3, 7, 7, -1])
    """

    used: Tensor

    def __init__(self, used: Tensor, num_embeddings: int | None = None, *, unknown: str | int = "random") -> None:
        super().__init__()
        arguments.check_indices(used, "used")
        if used.dim() != 1 or used.numel() == 0 or used.min() < 0 or torch.unique(used).numel() != used.numel():
            raise ValueError(f"used has shape {arguments.shape_of(used)}; expected (M,) different codes, none negative")
        size = int(used.max()) + 1
        if num_embeddings is not None and num_embeddings < size:
            raise ValueError(f"num_embeddings is {num_embeddings}; expected more than the largest code, {size - 1}")
        if isinstance(unknown, str):
            arguments.check_choice("unknown", unknown, ("random", "extra"))
        elif not 0 <= unknown < used.numel():
            raise ValueError(f"unknown is {unknown}; expected 'random', 'extra' or a number in [0, {used.numel()})")
        self.unknown, self.num_embeddings = unknown, num_embeddings or size
        self.register_buffer("used", used.long().clone())

    @property
    def size(self) -> int:
        """Number of different results: M, or M + 1 with ``unknown="extra"``."""
        return self.used.numel() + (self.unknown == "extra")

    def forward(self, indices: Tensor) -> Tensor:
        """Codes in [-1, K) as positions in ``used``; -1 stays -1."""
        arguments.check_indices(indices)
        arguments.check_range("indices", indices, -1, self.num_embeddings - 1)
        table = self.used.new_full((self.num_embeddings + 1,), -2)  # one more, for -1
        table[self.used] = torch.arange(self.used.numel(), device=self.used.device)
        table[-1] = -1
        found = table[indices.long()]
        if self.unknown == "random":
            other = torch.randint(self.used.numel(), found.shape, device=found.device)
        else:
            other = torch.full_like(found, self.used.numel() if self.unknown == "extra" else int(self.unknown))
        return torch.where(found == -2, other, found)

    def inverse(self, positions: Tensor) -> Tensor:
        """Positions as codes; -1 stays -1."""
        arguments.check_indices(positions)
        arguments.check_range("positions", positions, -1, self.size - 1)
        known = torch.where(positions >= self.used.numel(), 0, positions.long())
        return torch.where(known < 0, -1, self.used[known.clamp(min=0)])
