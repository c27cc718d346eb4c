"""Codes drawn at random instead of the nearest ones: the Gumbel-max trick in blocks of rows, never N x K.

Called by :class:`vqkernels.VectorQuantizer` with ``sample_temperature``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vqkernels import _arguments as arguments

__all__ = ["sample_codes"]

# Elements of the block of scores that is alive at a time.
BLOCK_ELEMENTS = 2**20


@torch.no_grad()
def sample_codes(rows: Tensor, codes: Tensor, metric: str, temperature: float) -> Tensor:
    """One code per row with probability softmax(score / temperature), from torch's generator.

    Args:
        rows: (H, B, S, D).
        codes: (H, K, D).
        metric: the score is minus the squared distance (``"l2"``), or the similarity.
        temperature: positive.

    Returns:
        int64 (H, B, S).

    Raises:
        RuntimeError: under ``torch.compile``; the number of blocks depends on N.

    Example:
        >>> import torch
        >>> sample_codes(torch.zeros(1, 1, 3, 1), torch.tensor([[[0.0], [9.0]]]), "l2", 0.1).tolist()
        [[[0, 0, 0]]]
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("sample_temperature > 0 does not run under torch.compile; compile the model around it")
    h, b, s, d = rows.shape
    flat = rows.reshape(h, b * s, d).float()
    values = F.normalize(codes.float(), dim=-1) if metric == "cosine" else codes.float()
    half = values.square().sum(-1) / 2 if metric == "l2" else torch.zeros_like(values[..., 0])
    factor = 2.0 if metric == "l2" else 1.0
    found = torch.empty((h, b * s), dtype=torch.int64, device=rows.device)
    step = max(1, BLOCK_ELEMENTS // codes.shape[1])
    for head in range(h):
        for begin in range(0, b * s, step):
            with arguments.without_autocast(rows):
                score = torch.addmm(-half[head], flat[head, begin : begin + step], values[head].T)
            score.mul_(factor / temperature).sub_(torch.empty_like(score).exponential_().log_())
            found[head, begin : begin + step] = score.argmax(-1)
    return found.view(h, b, s)
