"""``propagate``: codes with the gradient of the softmax over all of them, in blocks of rows: never N x K.

Called by :class:`vqkernels.VectorQuantizer` (``gradient="softmax"``) and by the recogniser of IBQ. Shi et al. 2024,
"Scalable Image Tokenization with Index Backpropagation Quantization", eq. 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vqkernels import _arguments as arguments
from vqkernels import ops
from vqkernels.functional import lookup_rows
from vqkernels.nn.assignment import blocks, softmax_of_scores

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

    Raises:
        RuntimeError: under ``torch.compile``; the number of blocks depends on N.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError('gradient "softmax" does not run under torch.compile; compile the model around')
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    scored = codes.to(wide)
    scored = F.normalize(scored, dim=-1) if metric == "cosine" else scored
    flat = rows.reshape(rows.shape[0], -1, rows.shape[-1]).to(wide)
    places = indices.reshape(indices.shape[0], -1)
    usable = flat.isfinite().all(-1) & (places >= 0)
    flat = torch.where(usable.unsqueeze(-1), flat, 0.0)
    out: Tensor = _Propagate.apply(  # type: ignore[no-untyped-call]
        flat, scored, codes, places, usable, metric == "l2", temperature
    )
    return out.reshape(rows.shape)


class _Propagate(torch.autograd.Function):
    """Gather; backward is the softmax's, made block by block, and a sum per code."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scored: Tensor,
        codes: Tensor,
        indices: Tensor,
        usable: Tensor,
        squared: bool,
        temperature: float,
    ) -> Tensor:
        ctx.save_for_backward(x, scored, codes, indices, usable)
        ctx.squared, ctx.temperature = squared, temperature
        return lookup_rows(codes, indices.unsqueeze(1), False)  # (H, 1, N, D): a view could not be written into

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, scored, codes, indices, usable = ctx.saved_tensors
        grad = grad.squeeze(1)
        dx, ds = torch.zeros_like(x), torch.zeros_like(scored)
        factor = (2.0 if ctx.squared else 1.0) / ctx.temperature
        g = torch.where(usable.unsqueeze(-1), grad.to(x.dtype), 0.0)
        values = codes.to(x.dtype)
        with torch.autocast(arguments.autocast_kind(x), enabled=False):  # backward may be called inside of it
            for head, block in blocks(x, scored):
                _, p, _ = softmax_of_scores(x[head, block], scored[head], ctx.squared, ctx.temperature)
                # Of a row's logits: p (u - p.u), where u is what its gradient says of every code.
                u = g[head, block] @ values[head].T
                t = p.mul_(u.sub_((p * u).sum(1, keepdim=True)))
                dx[head, block] = factor * (t @ scored[head])
                ds[head] += factor * (t.T @ x[head, block])
                if ctx.squared:
                    ds[head] -= factor * t.sum(0).unsqueeze(1) * scored[head]
        de = None
        if ctx.needs_input_grad[2]:
            de = ops.codebook_sum(grad.unsqueeze(1), indices.unsqueeze(1), codes.shape[1])[0].to(codes.dtype)
        return dx, ds, de, None, None, None, None
