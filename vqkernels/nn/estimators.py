"""What a quantized value passes back to the value that it replaces: nothing, the gradient itself, or a rotated one.

Called by the quantizers that do not go through :func:`vqkernels.vector_quantize`: sums of residual levels, grids, bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["estimate", "rotate_back"]

# Norms below this are taken to be this, as in the op ``quantize_grad``.
SMALLEST_NORM = 1e-6


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


def rotate_back(g: Tensor, z: Tensor, e: Tensor, dim: int = -1) -> Tensor:
    """Transpose of the map that takes ``z`` onto ``e`` by one rotation and one scaling, applied to ``g``."""

    def length(x: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
        return norm.clamp(min=SMALLEST_NORM)

    z_norm, e_norm = length(z), length(e)
    z_unit, e_unit = z / z_norm, e / e_norm
    w = z_unit + e_unit
    w = w / length(w)
    turned = g - 2 * (g * w).sum(dim, keepdim=True) * w + 2 * (g * e_unit).sum(dim, keepdim=True) * z_unit
    scaled: Tensor = turned * (e_norm / z_norm)
    return scaled
