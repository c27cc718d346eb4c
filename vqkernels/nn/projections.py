"""Linear maps over the channels, in front of a quantizer and behind it.

Called by :class:`vqkernels.VectorQuantizer` and the residual quantizers. Weights of 1x1 convolutions load as they are,
weight-normalised ones (``weight_g``, ``weight_v``) too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vqkernels import _arguments as arguments

__all__ = ["Projection", "project_pair"]


class Projection(nn.Linear):
    """W x + b over dim ``channel_dim`` (1 or -1) of (B, C, ...) or (..., C); (N, C) either way.

    State: ``weight`` (out, in) and, with ``bias=True``, ``bias`` (out,).

    Example:
        >>> import torch
        >>> Projection(3, 2, channel_dim=1)(torch.zeros(4, 3, 5, 6)).shape
        torch.Size([4, 2, 5, 6])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device)
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        """Project ``x``.

        Raises:
            ValueError, TypeError: ``x`` is not floating or has another number of channels.
        """
        arguments.check_float_tensor("z", x)
        first = self.channel_dim == 1 and x.dim() > 2
        if x.dim() < 1 or x.shape[1 if first else -1] != self.in_features:
            wanted = f"(B, {self.in_features}, ...)" if self.channel_dim == 1 else f"(..., {self.in_features})"
            raise ValueError(f"z has shape {arguments.shape_of(x)}; expected {wanted}")
        if x.device != self.weight.device:
            raise ValueError(f"z is on {x.device}, the projection on {self.weight.device}; expected one device")
        # Autocast brings both to one dtype, but leaves float64 as it is.
        dtypes = (x.dtype, self.weight.dtype)
        cast = arguments.autocast_dtype(x) is not None and torch.float64 not in dtypes
        if x.dtype != self.weight.dtype and not cast:
            x = x.to(self.weight.dtype)
        return super().forward(x.movedim(1, -1)).movedim(-1, 1) if first else super().forward(x)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        found = dict(state_dict)
        g, v = (found.pop(prefix + name, None) for name in ("weight_g", "weight_v"))
        if g is not None and v is not None:
            found[prefix + "weight"] = torch._weight_norm(v, g, 0)
        weight = found.get(prefix + "weight")
        if weight is not None and weight.dim() > 2 and all(s == 1 for s in weight.shape[2:]):
            found[prefix + "weight"] = weight.flatten(1)
        super()._load_from_state_dict(found, prefix, *args)


def project_pair(
    outside: int | None, inside: int, *, bias: bool, channel_dim: int, device: torch.device | str | None
) -> tuple[Projection | None, Projection | None]:
    """Projections from ``outside`` channels to ``inside`` and back; ``None`` twice if ``outside`` is ``None``."""
    if outside is None:
        return None, None
    arguments.check_count("input_dim", outside)
    return (
        Projection(outside, inside, bias=bias, channel_dim=channel_dim, device=device),
        Projection(inside, outside, bias=bias, channel_dim=channel_dim, device=device),
    )
