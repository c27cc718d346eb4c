"""Terms that spread the codes of a codebook out.

Called by :class:`vqkernels.VectorQuantizer`, and by users with a loss of their own.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vqkernels import _arguments as arguments

__all__ = ["orthogonality"]


def orthogonality(codes: Tensor) -> Tensor:
    """Mean squared cosine between different codes: 0 for orthogonal codes (Shin et al. 2021, eq. 2).

    sum over i, j of (c_i.c_j)^2 is the squared norm of the D x D matrix C^T C, so the K x K matrix of cosines is never
    made: time K D^2, memory D^2.

    Args:
        codes: (K, D) or (H, K, D).

    Returns:
        0-d: sum of (c_i.c_j)^2 / (H K^2) - 1/K, as vector-quantize-pytorch's ``orthogonal_reg_weight`` has it.

    Example:
        >>> import torch
        >>> round(orthogonality(torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])).item(), 6)
        0.222222
    """
    unit = F.normalize(codes if codes.dim() == 3 else codes.unsqueeze(0), dim=-1)
    heads, k, _ = unit.shape
    with arguments.without_autocast(codes):
        gram = unit.transpose(1, 2) @ unit
        return gram.square().sum() / (heads * k * k) - 1 / k
