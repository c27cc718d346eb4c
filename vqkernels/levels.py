"""``residual_nearest``: the search through all levels of a residual quantizer, as a public function.

Called by users and by :mod:`vqkernels.recognisers`; calls the op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vqkernels import _arguments as arguments
from vqkernels import dispatch, ops

__all__ = ["ResidualNearest", "residual_nearest"]


class ResidualNearest(NamedTuple):
    """What :func:`residual_nearest` returns; the level is the last dim.

    Attributes:
        indices: int64 (..., Q).
        quantized: (..., D), the sums of the chosen codes.
        score: float32 (..., Q), the squared distance of each level's residual to its code.
    """

    indices: Tensor
    quantized: Tensor
    score: Tensor


def residual_nearest(x: Tensor, codebooks: Tensor | Sequence[Tensor], *, backend: str = "auto") -> ResidualNearest:
    """The nearest code of every row, then that of what is left over, and so on through all codebooks, in one call.

    Equivalent to::

        residual = x.float()                    # float64 stays
        for q, codebook in enumerate(codebooks):
            indices[..., q], score[..., q] = nearest(residual, codebook)
            residual = residual - codebook[indices[..., q]]
            quantized = quantized + codebook[indices[..., q]]

    to the last bit, so each level is exact for the residual that it was given. Not differentiable: all results are
    detached; :class:`vqkernels.ResidualVectorQuantizer` trains.

    Args:
        x: rows (..., D); float32, bfloat16, float16 or float64, any strides.
        codebooks: (Q, K, D), or a sequence of Q >= 1 codebooks (K_q, D), whose sizes may differ.
        backend: as in :func:`vqkernels.nearest`.

    Returns:
        :class:`ResidualNearest`; ``quantized`` is float64 for float64 ``x``, else float32, in memory like ``x``.
        ``indices`` and ``score`` are views with the levels apart: ``indices.movedim(-1, 0)`` is contiguous.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or backend are not as above.
        Unsupported: the backend that was asked for cannot run here.

    Example:
        >>> import torch, vqkernels
        >>> coarse, fine = torch.tensor([[0.0], [10.0]]), torch.tensor([[-1.0], [0.0], [1.0]])
        >>> out = vqkernels.residual_nearest(torch.tensor([[11.2], [0.3]]), [coarse, fine])
        >>> out.indices.tolist(), out.quantized.tolist()
        ([[1, 2], [0, 1]], [[11.0], [0.0]])
    """
    if backend != "auto" and not torch.compiler.is_compiling():
        dispatch.requested(backend)
    codes = check_codebooks(codebooks)
    for codebook in codes:
        arguments.check_rows("x", x, codebook)
    rows = arguments.to_rows(x.detach(), False)
    channel_first = arguments.is_channel_first(rows)
    indices, values, score = ops.residual_nearest(
        rows, [codebook.detach().unsqueeze(0) for codebook in codes], channel_first, backend
    )
    values = values.transpose(-1, -2) if channel_first else values
    places = (len(codes), *x.shape[:-1])
    return ResidualNearest(
        indices.view(places).movedim(0, -1), values.reshape(x.shape), score.view(places).movedim(0, -1)
    )


def check_codebooks(codebooks: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """One codebook (K, D) per level."""
    if isinstance(codebooks, Tensor) and codebooks.dim() != 3:
        raise ValueError(f"codebooks has shape {arguments.shape_of(codebooks)}; expected (Q, K, D)")
    if not hasattr(codebooks, "__len__"):
        raise TypeError(f"codebooks is a {type(codebooks).__name__}; expected a torch.Tensor or a sequence of them")
    if len(codebooks) == 0:
        raise ValueError("codebooks is empty; expected one (K, D) per level")
    found = codebooks.unbind(0) if isinstance(codebooks, Tensor) else codebooks
    for level, codebook in enumerate(found):
        arguments.check_codebook(codebook, f"codebooks[{level}]")
        if codebook.dim() != 2:
            raise ValueError(f"codebooks[{level}] has shape {arguments.shape_of(codebook)}; expected (K, D)")
    return found
