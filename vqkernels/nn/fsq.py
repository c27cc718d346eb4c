"""``FSQ``: every dim is bounded and rounded to a few levels; the grid of all combinations is the codebook.

Called by users. Mentzer et al. 2024, "Finite Scalar Quantization: VQ-VAE Made Simple", algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vqkernels import _arguments as arguments
from vqkernels.functional import VQOutput
from vqkernels.nn.elementwise import ElementwiseQuantizer
from vqkernels.nn.estimators import estimate

__all__ = ["FSQ"]


class FSQ(ElementwiseQuantizer):
    """Round D dims to ``levels[d]`` values each; no codebook, no loss, no collapse.

    Arithmetic is float32 (float64 for float64 input) whatever autocast says, and indices are composed of integers, so
    that a bfloat16 model reaches every code and 2^24 codes and more are told apart.

    Args:
        levels: number of values of each dim, at least 2.
        symmetric: values 2 floor((L - 1) (tanh z + 1) / 2 + 1/2) / (L - 1) - 1, which include -1 and 1 for every L
            (Parker et al. 2024, sec. 3.2). Default: the formula of the paper, with z shifted for even L.
        noise: in training, share of values that get uniform noise of one unit (same source); ``symmetric`` only.
        heads: independent grids; the input has ``heads * D`` channels.
        input_dim, projection_bias, channel_dim, device: as in :class:`vqkernels.VectorQuantizer`.

    State: ``project_in.*`` and ``project_out.*`` with an ``input_dim``; else nothing.

    Shape:
        as :class:`vqkernels.VectorQuantizer`; the losses of the output are 0. Index = sum over d of digit_d *
        prod(levels[:d]), as in the paper and in vector-quantize-pytorch.

    Example:
        >>> import torch, vqkernels
        >>> fsq = vqkernels.nn.FSQ([8, 5, 5, 5])
        >>> out = fsq(torch.randn(2, 4, 16, 16))
        >>> fsq.num_embeddings, out.indices.shape, torch.equal(fsq.codes_to_output(out.indices), out.quantized)
        (1000, torch.Size([2, 16, 16]), True)
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: Sequence[int], *, symmetric: bool = False, noise: float = 0.0, **options: Any) -> None:
        if not isinstance(levels, Sequence) or not levels:
            raise ValueError(f"levels is {levels!r}; expected a sequence of numbers, one per dim")
        for level in levels:
            arguments.check_count("levels", level)
            if level < 2 + (not symmetric):
                least = "2" if symmetric else "3 (2 with symmetric=True)"
                raise ValueError(f"levels is {list(levels)}; expected at least {least} everywhere")
        arguments.check_number("noise", noise, high=1.0)
        if noise > 0 and not symmetric:
            raise ValueError(f"noise is {noise!r}; expected 0 unless symmetric=True")
        if math.prod(levels) >= 2**63:
            raise ValueError(f"levels is {list(levels)}; expected a product below 2^63")
        super().__init__(len(levels), **options)
        self.symmetric, self.noise = symmetric, noise
        self.num_embeddings = math.prod(levels)
        self._sizes = tuple(levels)
        for name in ("levels", "basis"):
            constants = torch.empty(len(levels), dtype=torch.int64, device=self._anchor.device)
            self.register_buffer(name, constants, persistent=False)
        self._fill()

    def _fill(self) -> None:
        self.levels.copy_(torch.tensor(self._sizes, device="cpu"))
        self.basis.copy_(torch.tensor((1, *self._sizes[:-1]), device="cpu").cumprod(0))

    def extra_repr(self) -> str:
        """The levels."""
        return f"{list(self._sizes)}, symmetric={self.symmetric}"

    def forward(self, z: Tensor, mask: Tensor | None = None, *, lens: Tensor | None = None) -> VQOutput:
        """Quantize ``z``; see :meth:`vqkernels.VectorQuantizer.forward`.

        Raises:
            ValueError, TypeError: shapes, dtype or device do not fit.
        """
        inside, rows, mask = self._open(z, mask, lens)
        digits, place = self._digits(rows)
        indices = (digits.to(torch.int64) * self.basis).sum(-1)
        values = self._values(estimate(place, digits))
        if self.training and self.noise > 0:
            noisy = torch.rand_like(values) < self.noise
            values = torch.where(noisy, values + torch.rand_like(values) - 0.5, values).clamp(-1.0, 1.0)
        quantized, found = self._close(z, inside, values, indices, mask)
        zero = torch.zeros((), dtype=inside.dtype, device=z.device)
        return VQOutput(quantized, found, zero, zero.clone(), zero.clone())

    def _digits(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Digits 0 to L - 1 as floats, and the unrounded place that carries the gradient."""
        levels = self.levels.to(rows.dtype)
        if self.symmetric:
            place = (levels - 1) * (rows.tanh() + 1) / 2
            rounded = (place.detach() + 0.5).floor()
        else:
            half = (levels - 1) * (1 + 1e-3) / 2
            offset = torch.where(self.levels % 2 == 0, 0.5, 0.0).to(rows.dtype)
            centre = (self.levels // 2).to(rows.dtype)
            bounded = (rows + (offset / half).atanh()).tanh() * half - offset
            place, rounded = bounded + centre, bounded.detach().round() + centre
        # NaN has no digit: it gets the first, as vqkernels.nearest gives such a row code 0.
        return torch.minimum(rounded.nan_to_num(0.0), levels - 1).clamp(min=0.0), place

    def _values(self, digits: Tensor) -> Tensor:
        levels = self.levels.to(digits.dtype)
        if self.symmetric:
            return digits * (2 / (levels - 1)) - 1
        centre = (self.levels // 2).to(digits.dtype)
        return (digits - centre) / centre

    def _codes_of(self, indices: Tensor) -> Tensor:
        return self._values((indices.unsqueeze(-1) // self.basis % self.levels).float())
