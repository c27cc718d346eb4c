"""``propagate``: codes with the gradient of the softmax over all of them, streamed: never N x K.

Called by :class:`vqkernels.VectorQuantizer` (``gradient="softmax"``) and by the recogniser of IBQ. Shi et al. 2024,
"Scalable Image Tokenization with Index Backpropagation Quantization", eq. 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqkernels import ops
from vqkernels._gradients import once
from vqkernels.nn.assignment import scored

__all__ = ["propagate"]


def propagate(rows: Tensor, codes: Tensor, indices: Tensor, metric: str, temperature: float = 1.0) -> Tensor:
    """The codes at ``indices`` exactly, with the gradient of ``(hard - sg(soft) + soft) @ codes``.

    ``soft`` is softmax(score / temperature) over all codes, so the gradient of a row moves every code towards what the
    row would rather have been, and the chosen code gets the gradient of the value besides.

    Args:
        rows: (H, B, S, D).
        codes: (H, K, D).
        indices: (H, B, S), -1 for zeros without a gradient; a row with NaN or Inf passes nothing back through softmax.
        metric: of the score, as in :func:`vqkernels.nn.assignment_entropies`.
        temperature: positive.
    """
    flat, compared = scored(rows, codes, metric)
    places = indices.reshape(indices.shape[0], -1)
    usable = flat.isfinite().all(-1) & (places >= 0)
    # torch.compile takes no tensor twice.
    values = None if compared is codes else codes
    out: Tensor = _Propagate.apply(  # type: ignore[no-untyped-call]
        flat, compared, values, places, usable.to(compared.dtype), metric == "l2", temperature
    )
    return out.reshape(rows.shape)


class _Propagate(torch.autograd.Function):
    """Gather, from the codes compared if there are no ``values``; backward is the softmax's, and a sum per code."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        compared: Tensor,
        values: Tensor | None,
        indices: Tensor,
        usable: Tensor,
        squared: bool,
        temperature: float,
    ) -> Tensor:
        codes = compared if values is None else values
        ctx.save_for_backward(x, compared, codes, indices, usable)
        ctx.squared, ctx.temperature, ctx.alike = squared, temperature, values is None
        found: Tensor = ops.lookup(codes, indices.unsqueeze(1), False, codes.dtype)
        return found  # (H, 1, N, D): a view could not be written into

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, compared, codes, indices, usable = ctx.saved_tensors
        de = None
        with torch.no_grad():
            dx, dcompared = ops.soft_assign_grad(
                x, compared, usable, None, None, grad.squeeze(1), codes, ctx.squared, ctx.temperature
            )
            if ctx.needs_input_grad[1 if ctx.alike else 2]:
                de = ops.codebook_sum(grad, indices.unsqueeze(1), codes.shape[1])[0].to(codes.dtype)
                if ctx.alike:
                    dcompared, de = dcompared + de, None
        dx, dcompared, de = once((dx, dcompared, de), x, compared, codes, grad)
        return dx, dcompared, de, None, None, None, None
