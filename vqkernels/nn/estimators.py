"""What a quantized value passes back to the value that it replaces: nothing, the gradient itself, or a rotated one.

Called by the quantizers that do not go through :func:`vqkernels.vector_quantize`: sums of residual levels, grids, bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqkernels._gradients import pass_through, rotate_back, transformed, wanted

__all__ = ["estimate", "rotate_back"]


def estimate(z: Tensor, values: Tensor, gradient: str = "straight_through", dim: int = -1) -> Tensor:
    """``values`` exactly, with the gradient estimator's gradient with respect to ``z``.

    Args:
        z: what is quantized.
        values: what it becomes, same shape; its own gradient is cut.
        gradient: ``"straight_through"``, ``"rotation"`` (vectors along ``dim``), or ``"none"``.
        dim: of the channels.

    Example:
        >>> import torch
        >>> z = torch.tensor([0.4], requires_grad=True)
        >>> out = estimate(z, z.round())
        >>> out.item(), torch.autograd.grad(out, z)[0].item()
        (0.0, 1.0)
    """
    if gradient == "none":
        return values.detach()
    if transformed(z):
        return pass_through(z, values, gradient, dim)
    if not wanted(z):  # torch.jit.trace saves no Function
        return values.detach().clone()
    if gradient == "straight_through":
        through: Tensor = _Through.apply(z, values.detach())  # type: ignore[no-untyped-call]
        return through
    rotated: Tensor = _Rotate.apply(z, values.detach(), dim)  # type: ignore[no-untyped-call]
    return rotated


class _Through(torch.autograd.Function):
    """Bengio et al. 2013."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Rotate(torch.autograd.Function):
    """Fifty et al. 2024, "Restructuring Vector Quantization with the Rotation Trick", sec. 4.2."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, values: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(z, values)
        ctx.dim = dim
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        z, values = ctx.saved_tensors
        return rotate_back(grad, z, values, ctx.dim), None, None
