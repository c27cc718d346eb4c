"""Gradients of the public functions: two ``autograd.Function`` classes outside the ops, and plain torch in their place.

Called by :mod:`vqkernels.functional` and :mod:`vqkernels.nn`. The classes are what a training step runs. Transforms of
``torch.func`` and forward mode would want a ``setup_context``, a ``jvp`` and rules for ``vmap`` of them,
and Dynamo (torch 2.13) would not look at these: there everything but the search is operators that torch knows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vqkernels import _arguments as arguments
from vqkernels import _devices, ops

__all__ = ["lookup", "once", "pass_through", "quantize", "rotate_back", "transformed", "wanted"]

# Norms below this are taken to be this, as in the op ``quantize_grad``.
SMALLEST_NORM = 1e-6


def transformed(*tensors: Tensor) -> bool:
    """Whether a transform of ``torch.func`` is active, or one of ``tensors`` has a tangent."""
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)  # type: ignore[no-untyped-call]


def wanted(*tensors: Tensor) -> bool:
    """Whether a gradient is asked for; a call of an ``autograd.Function`` is not free where it is not."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply``, which torch leaves untyped."""
    return function.apply(*args)  # type: ignore[no-untyped-call]


def quantize(
    z: Tensor, codebook: Tensor, indices: Tensor, distance: Tensor | None, masked: bool, gradient: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``quantize_output`` with gradients: values (H, B, S, D), laid out in memory like ``z``, and two losses."""
    if transformed(z, codebook):
        return _plain_quantize(z, codebook, indices, gradient)
    channel_first = arguments.is_channel_first(z)
    if wanted(z, codebook):
        given = (z, codebook, indices, distance, masked, channel_first, gradient)
        quantized, codebook_loss, commitment_loss = _apply(_Quantize, *given)
    else:
        quantized, codebook_loss, commitment_loss, _ = ops.quantize_output(
            z, codebook, indices, distance, masked, channel_first
        )
    # Outside of the Function: torch lets nobody write into a view that one of several results of a Function is.
    return quantized.transpose(-1, -2) if channel_first else quantized, codebook_loss, commitment_loss


def lookup(codebook: Tensor, indices: Tensor, channel_first: bool) -> Tensor:
    """The op ``lookup`` with a gradient: (H, B, S, D), laid out as asked."""
    if transformed(codebook):
        return _plain_lookup(codebook, indices)
    values: Tensor
    if wanted(codebook):
        values = _apply(_Lookup, codebook, indices, channel_first)
    else:
        values = ops.lookup(codebook, indices, channel_first, codebook.dtype)
    return values.transpose(-1, -2) if channel_first else values


class _Quantize(torch.autograd.Function):
    """Gather and losses; backward is ``quantize_grad`` for z and ``codebook_sum`` for the codebook."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        codebook: Tensor,
        indices: Tensor,
        distance: Tensor | None,
        masked: bool,
        channel_first: bool,
        gradient: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        quantized, codebook_loss, commitment_loss, weight = ops.quantize_output(
            z, codebook, indices, distance, masked, channel_first
        )
        # Five dims where Inductor sees it: ops/_register.py says why.
        ctx.save_for_backward(z.unsqueeze(0) if torch.compiler.is_compiling() else z, codebook, indices, weight)
        ctx.gradient, ctx.channel_first = gradient, channel_first
        if not torch.compiler.is_compiling():  # Dynamo (torch 2.13) does not know it
            ctx.set_materialize_grads(False)
        if gradient == "none":
            ctx.mark_non_differentiable(quantized)
        return quantized, codebook_loss, commitment_loss

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_codebook: Tensor | None, grad_commitment: Tensor | None
    ) -> tuple[Any, ...]:
        z, codebook, indices, weight = ctx.saved_tensors
        dz = de = None
        if grad is not None and ctx.channel_first:
            grad = grad.transpose(-1, -2)
        with torch.no_grad():
            if ctx.needs_input_grad[0]:
                # No gradient from the output is one that does not reach z; any tensor stands in for what is not read.
                way = "none" if grad is None else ctx.gradient
                scale = 2.0 * weight * (0.0 if grad_commitment is None else grad_commitment)
                dz = ops.quantize_grad(z if grad is None else grad, z, codebook, indices, scale, way, ctx.channel_first)
                dz = dz.transpose(-1, -2) if ctx.channel_first else dz
            if ctx.needs_input_grad[1] and grad_codebook is None:
                de = torch.zeros_like(codebook)
            elif ctx.needs_input_grad[1]:
                # dE = scale * (count e - sum), in the buffer of the sums: fresh memory of K x D is what costs here.
                sums, counts = ops.codebook_sum(z, indices, codebook.shape[1])
                scale = -2.0 * weight * grad_codebook
                sums.addcmul_(counts.unsqueeze(-1).to(sums.dtype), codebook.to(sums.dtype), value=-1.0)
                # vmap writes nothing into what has fewer samples (a batch of gradients, as of a Jacobian).
                de = (sums * scale if arguments.is_batched(scale) else sums.mul_(scale)).to(codebook.dtype)
        dz, de = once((dz, de), z, codebook, grad, grad_codebook, grad_commitment)
        return dz, de, None, None, None, None, None


class _Lookup(torch.autograd.Function):
    """Gather, in memory as asked for; backward is ``codebook_sum``."""

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, indices: Tensor, channel_first: bool) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.num_codes, ctx.dtype, ctx.channel_first = codebook.shape[1], codebook.dtype, channel_first
        values: Tensor = ops.lookup(codebook, indices, channel_first, codebook.dtype)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        grad = grad.transpose(-1, -2) if ctx.channel_first else grad
        with torch.no_grad():
            de = ops.codebook_sum(grad, indices, ctx.num_codes)[0].to(ctx.dtype)
        return *once((de,), grad), None, None


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated again: says so, where a detached result would be silently wrong."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *sources: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("vqkernels: second-order gradients of a quantizer are not implemented")


def once(results: tuple[Tensor | None, ...], *sources: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a backward pass made from ``sources``, so that to differentiate it again (``create_graph=True``) raises."""
    if not torch.is_grad_enabled():
        return results
    given = [s for s in sources if s is not None]
    return tuple(None if r is None else _apply(_Once, r, *given) for r in results)


# -- plain torch -------------------------------------------------------------------------------------------------------


def _plain_quantize(z: Tensor, codebook: Tensor, indices: Tensor, gradient: str) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    widest = _devices.widest(z.device)
    known = indices >= 0
    rows = torch.where(known.unsqueeze(-1), z, 0.0).to(wide)
    codes = _plain_lookup(codebook, indices).to(wide)
    weight = (known.sum(dtype=widest) * z.shape[-1]).clamp(min=1.0).reciprocal()
    codebook_loss, commitment_loss = (
        (error.square().sum(dtype=widest) * weight).to(wide) for error in (codes - rows.detach(), rows - codes.detach())
    )
    return pass_through(rows, codes, gradient).to(z.dtype), codebook_loss, commitment_loss


def _plain_lookup(codebook: Tensor, indices: Tensor) -> Tensor:
    head = torch.arange(codebook.shape[0], device=indices.device).view(-1, 1, 1)
    return torch.where((indices >= 0).unsqueeze(-1), codebook[head, indices.clamp(min=0)], 0.0)


def pass_through(z: Tensor, values: Tensor, gradient: str, dim: int = -1) -> Tensor:
    """``values`` exactly, with the estimator's derivatives in ``z`` of any order, forward and backward."""
    values = values.detach()
    if gradient == "none":
        return values
    moved = _rotate(z, z.detach(), values, dim) if gradient == "rotation" else z
    moved = torch.where(moved.isfinite(), moved, 0.0)  # what is taken from itself here must be 0
    return values + (moved - moved.detach())


def _rotate(x: Tensor, z: Tensor, e: Tensor, dim: int) -> Tensor:
    """The map that takes ``z`` onto ``e`` by one rotation and one scaling, applied to ``x``.

    Fifty et al. 2024, "Restructuring Vector Quantization with the Rotation Trick", sec. 4.2.
    """
    z_unit, e_unit, w, ratio = _plane(z, e, dim)
    return ratio * (x - 2 * (x * w).sum(dim, keepdim=True) * w + 2 * (x * z_unit).sum(dim, keepdim=True) * e_unit)


def rotate_back(g: Tensor, z: Tensor, e: Tensor, dim: int = -1) -> Tensor:
    """Transpose of the map that takes ``z`` onto ``e`` by one rotation and one scaling, applied to ``g``."""
    z_unit, e_unit, w, ratio = _plane(z, e, dim)
    return ratio * (g - 2 * (g * w).sum(dim, keepdim=True) * w + 2 * (g * e_unit).sum(dim, keepdim=True) * z_unit)


def _plane(z: Tensor, e: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit vectors along ``z``, ``e`` and their sum, and |e| / |z|."""

    def length(x: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
        return norm.clamp(min=SMALLEST_NORM)

    z_norm, e_norm = length(z), length(e)
    z_unit, e_unit = z / z_norm, e / e_norm
    w = z_unit + e_unit
    return z_unit, e_unit, w / length(w), e_norm / z_norm
