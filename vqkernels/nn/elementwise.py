"""What quantizers without a codebook share: projections, heads, masks and indices around an elementwise rounding.

Called by :class:`vqkernels.nn.FSQ` and :class:`vqkernels.nn.LFQ`. No search: the nearest code is found dim by dim.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vqkernels import _arguments as arguments
from vqkernels.nn._layout import Layout, check_channel_dim
from vqkernels.nn.projections import project_pair

__all__ = ["ElementwiseQuantizer"]


class ElementwiseQuantizer(nn.Module):
    """The frame; a subclass says how (H, B, S, D) rows become codes, and how indices become codes."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 1,
        input_dim: int | None = None,
        projection_bias: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        arguments.check_count("heads", heads)
        check_channel_dim(channel_dim)
        self.embedding_dim, self.heads, self.channel_dim = dim, heads, channel_dim
        self._layout = Layout(heads, dim, channel_dim)
        self.project_in, self.project_out = project_pair(
            input_dim, heads * dim, bias=projection_bias, channel_dim=channel_dim, device=device
        )
        # Where the module is: a quantizer without projections has no parameter that would tell.
        self.register_buffer("_anchor", torch.zeros((), device=device), persistent=False)

    _anchor: Tensor
    num_embeddings: int

    @abstractmethod
    def _fill(self) -> None:
        """Write the constants, which are in no checkpoint, into their buffers."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ElementwiseQuantizer:
        """``.to`` and the like; ``to_empty`` leaves anything in the buffers, and no checkpoint would overwrite it."""
        before = self._anchor
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._anchor is not before:  # else a backward may still need what is there
            self._anchor.zero_()
            self._fill()
        return self

    def _place(self, device: torch.device) -> None:
        """The constants anew on ``device``."""
        for name in self._non_persistent_buffers_set:
            self._buffers[name] = torch.empty_like(getattr(self, name), device=device)
        self._anchor.zero_()
        self._fill()

    def _leave_meta(self, x: Tensor) -> None:
        """Constants that no checkpoint brought, where the values of the model came some other way."""
        if self._anchor.is_meta and not x.is_meta:
            self._place(x.device)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)
        if self._anchor.is_meta and metadata.get("assign_to_params_buffers"):
            own = [value.device for key, value in state_dict.items() if key.startswith(prefix)]
            self._place(own[0] if own else torch.get_default_device())

    @abstractmethod
    def _codes_of(self, indices: Tensor) -> Tensor:
        """Codes (H, B, S, D) float32 of non-negative indices (H, B, S)."""

    def _open(self, z: Tensor, mask: Tensor | None, lens: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The projected input, its rows (H, B, S, D) in at least float32, and the mask."""
        arguments.check_float_tensor("z", z)
        if lens is not None:
            mask = self._layout.lens_mask(lens, z, mask)
        if mask is not None:
            z = self._layout.blank(mask, z)
        inside = z if self.project_in is None else self.project_in(z)
        self._leave_meta(inside)
        inside = inside if inside.dtype == torch.float64 else inside.float()
        self._layout.check(inside, self._anchor)
        return inside, self._layout.rows(inside), mask

    def _close(
        self, z: Tensor, inside: Tensor, values: Tensor, indices: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Codes and indices in the shapes that users see."""
        found = self._layout.indices(indices, inside.shape)
        if mask is not None:
            found = torch.where(mask if self.heads == 1 else mask.unsqueeze(-1), found, -1)
        return self._outside(self._layout.output(values, inside.shape), z, mask).to(z.dtype), found

    def _outside(self, values: Tensor, z: Tensor, mask: Tensor | None) -> Tensor:
        out = values if self.project_out is None else self.project_out(values)
        first = self.channel_dim == 1 and z.dim() > 2
        return out if mask is None else torch.where(mask.unsqueeze(1 if first else -1), out, 0.0)

    def codes_to_output(self, indices: Tensor) -> Tensor:
        """What :meth:`forward` outputs for these indices: float32, channels where the input has them; -1 gives zeros.

        Args:
            indices: integers (B, ...) in [-1, K), with a last dim of H if there are several heads.

        Raises:
            ValueError, TypeError: shape or dtype do not fit, or an index is out of range (checked on CPU).
        """
        positions, shape = self._layout.positions(indices)
        arguments.check_range("indices", indices, -1, self.num_embeddings - 1)
        self._leave_meta(positions)
        known = (positions >= 0) & (positions < self.num_embeddings)  # where nobody looked, a wrong index is no code
        codes = torch.where(known.unsqueeze(-1), self._codes_of(torch.where(known, positions, 0)), 0.0)
        values = self._layout.output(codes, shape)
        known = (indices >= 0) & (indices < self.num_embeddings)
        return self._outside(values, values, known if self.heads == 1 else known.any(-1))
