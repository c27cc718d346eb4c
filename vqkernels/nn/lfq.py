"""``LFQ`` and ``BSQ``: one bit per dim, 2^D codes without a codebook, and an entropy loss that keeps them in use.

Called by users. Yu et al. 2024, "Language Model Beats Diffusion" (LFQ); Zhao et al. 2024, "Image and Video Tokenization
with Binary Spherical Quantization" (BSQ).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vqkernels import _arguments as arguments
from vqkernels.nn.elementwise import ElementwiseQuantizer
from vqkernels.nn.estimators import estimate

__all__ = ["BSQ", "LFQ", "LFQOutput"]


class LFQOutput(NamedTuple):
    """What :class:`LFQ` returns.

    Attributes:
        quantized: the codes, shape and dtype of the input, with the straight-through gradient.
        indices: int64 (B, ...), with a last dim of H if there are several heads; -1 where masked. The first dim is the
            highest bit.
        loss: ``entropy_weight * (sample_entropy - diversity * batch_entropy) + commitment_cost * commitment_loss``.
        sample_entropy: mean over positions of the entropy of p(code | position), in nats; 0 in eval.
        batch_entropy: entropy of the mean of p(code | position), in nats; 0 in eval.
        commitment_loss: mean |z - sg(e)|^2 per element.
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    sample_entropy: Tensor
    batch_entropy: Tensor
    commitment_loss: Tensor


class LFQ(ElementwiseQuantizer):
    """Sign of every dim: codes {-scale, scale}^D.

    p(code | z) = softmax(2 z.code / temperature) is a product over the dims, so that its entropy is a sum of D binary
    entropies, exactly, and the 2^D codes are never listed. The mean of products over a batch is no product any more:
    ``groups`` says how finely it is taken apart.

    Args:
        dim: D, bits of an index; at most 62.
        scale: of the codes.
        spherical: normalise z and the codes to length ``scale`` (BSQ).
        temperature: of p; 0.01 is vector-quantize-pytorch's ``inv_temperature=100``.
        entropy_weight, diversity: see :class:`LFQOutput`.
        commitment_cost: weight of the commitment loss.
        groups: the batch entropy is the sum over groups of D / groups dims of the entropy of the group's 2^(D / groups)
            mean probabilities: 1 is exact (2^D numbers), D treats dims as independent (BSQ eq. 11), 2 is what
            Open-MAGVIT2 does with 18 bits. Default: the fewest groups of at most 12 bits.
        heads: independent sets of D bits; the input has ``heads * D`` channels.
        input_dim, projection_bias, channel_dim, device: as in :class:`vqkernels.VectorQuantizer`.

    State: ``project_in.*`` and ``project_out.*`` with an ``input_dim``; else nothing.

    Example:
        >>> import torch, vqkernels
        >>> lfq = vqkernels.nn.LFQ(18, channel_dim=-1)
        >>> out = lfq(torch.randn(2, 7, 18))
        >>> lfq.num_embeddings, out.indices.shape, torch.equal(lfq.codes_to_output(out.indices), out.quantized)
        (262144, torch.Size([2, 7]), True)
    """

    powers: Tensor

    def __init__(
        self,
        dim: int,
        *,
        scale: float = 1.0,
        spherical: bool = False,
        temperature: float = 0.01,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        commitment_cost: float = 0.0,
        groups: int | None = None,
        **options: Any,
    ) -> None:
        arguments.check_count("dim", dim)
        if dim > 62:
            raise ValueError(f"dim is {dim}; expected at most 62 bits, an index is an int64")
        for name, value in (("scale", scale), ("temperature", temperature)):
            arguments.check_number(name, value)
            if value == 0:
                raise ValueError(f"{name} is {value!r}; expected a positive number")
        weights = {"entropy_weight": entropy_weight, "diversity": diversity, "commitment_cost": commitment_cost}
        for name, value in weights.items():
            arguments.check_number(name, value)
        groups = next(g for g in range(1, dim + 1) if dim % g == 0 and dim // g <= 12) if groups is None else groups
        arguments.check_count("groups", groups)
        if dim % groups or dim // groups > 20:
            raise ValueError(f"groups is {groups}; expected a divisor of the {dim} dims, at most 20 dims in a group")
        super().__init__(dim, **options)
        self.scale, self.spherical, self.temperature, self.groups = scale, spherical, temperature, groups
        self.entropy_weight, self.diversity, self.commitment_cost = entropy_weight, diversity, commitment_cost
        self.num_embeddings = 2**dim
        powers = torch.empty(dim, dtype=torch.int64, device=self._anchor.device)
        self.register_buffer("powers", powers, persistent=False)
        self._fill()

    def _fill(self) -> None:
        self.powers.copy_(2 ** torch.arange(self.embedding_dim - 1, -1, -1, device="cpu"))

    def extra_repr(self) -> str:
        """Bits and options."""
        return f"{self.embedding_dim}, spherical={self.spherical}, groups={self.groups}"

    @property
    def unit(self) -> float:
        """The size of one component of a code."""
        return self.scale / self.embedding_dim**0.5 if self.spherical else self.scale

    def forward(self, z: Tensor, mask: Tensor | None = None, *, lens: Tensor | None = None) -> LFQOutput:
        """Quantize ``z``; see :meth:`vqkernels.VectorQuantizer.forward`.

        Raises:
            ValueError, TypeError: shapes, dtype or device do not fit.
        """
        inside, rows, mask = self._open(z, mask, lens)
        if self.spherical:
            rows = F.normalize(rows, dim=-1) * self.scale
        bits = rows.detach() > 0
        codes = torch.where(bits, self.unit, -self.unit).to(rows.dtype)
        valid = torch.ones_like(rows[..., 0]) if mask is None else self._layout.mask(mask, inside, rows).to(rows.dtype)
        count = valid.sum().clamp(min=1.0)
        squares = torch.where(valid.unsqueeze(-1) > 0, (rows - codes).square(), 0.0)
        commitment = squares.sum() / (count * self.embedding_dim)
        sample = batch = torch.zeros_like(commitment)
        if self.training:
            sample, batch = self._entropies(rows, valid)
        loss = self.entropy_weight * (sample - self.diversity * batch) + self.commitment_cost * commitment
        indices = (bits * self.powers).sum(-1)
        quantized, found = self._close(z, inside, estimate(rows, codes), indices, mask)
        return LFQOutput(quantized, found, loss, sample, batch, commitment)

    def _entropies(self, rows: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Sample entropy and batch entropy of (H, B, S, D) rows, means over heads."""
        logit = torch.where(valid.unsqueeze(-1) > 0, rows, 0.0) * (4 * self.unit / self.temperature)
        size = logit.abs()
        each = (F.softplus(-size) + size * torch.sigmoid(-size)).sum(-1)
        sample = (each * valid).sum() / valid.sum().clamp(min=1.0)
        up = torch.unflatten(torch.sigmoid(logit).flatten(1, 2), -1, (self.groups, -1))
        weight = (valid / valid.sum((1, 2), keepdim=True).clamp(min=1.0)).flatten(1, 2)
        mean = mean_of_products(up, weight)
        # Not torch.special.entr: its gradient at a probability that underflowed to 0 is infinite.
        return sample, -(mean * mean.clamp(min=1e-30).log()).sum((-1, -2)).mean()

    def _codes_of(self, indices: Tensor) -> Tensor:
        bits = indices.unsqueeze(-1) // self.powers % 2
        return (bits.to(self._anchor.dtype).float() * 2 - 1) * self.unit


class BSQ(LFQ):
    """:class:`LFQ` on the unit sphere: z and the codes have length 1, and the batch entropy treats bits as independent.

    Args:
        dim: D, bits of an index.
        **options: of :class:`LFQ`.

    Example:
        >>> import torch, vqkernels
        >>> out = vqkernels.nn.BSQ(36, channel_dim=-1)(torch.randn(4, 36))
        >>> torch.allclose(out.quantized.norm(dim=-1), torch.ones(4))
        True
    """

    def __init__(self, dim: int, **options: Any) -> None:
        options = {"groups": dim, "spherical": True} | options
        super().__init__(dim, **options)


def mean_of_products(up: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over rows of the product distribution of g bits: (H, N, G, g) to (H, G, 2^g), first bit highest.

    The distribution of g bits is the outer product of those of its two halves, so that the mean is one matrix product
    of (2^(g/2), N) with (N, 2^(g/2)): no N x 2^g.

    Args:
        up: probability of a set bit.
        weight: (H, N).

    Example:
        >>> import torch
        >>> mean_of_products(torch.tensor([[[[1.0, 0.5]], [[0.0, 1.0]]]]), torch.tensor([[0.5, 0.5]])).tolist()
        [[[0.0, 0.5, 0.25, 0.25]]]
    """

    def outer(part: Tensor) -> Tensor:
        found = part.new_ones((*part.shape[:-1], 1))
        for bit in part.unbind(-1):
            pair = torch.stack([1 - bit, bit], dim=-1)
            found = (found.unsqueeze(-1) * pair.unsqueeze(-2)).flatten(-2)
        return found

    half = up.shape[-1] // 2
    first, second = outer(up[..., :half]), outer(up[..., half:])
    with arguments.without_autocast(up):
        weighted = (first * weight[..., None, None]).permute(0, 2, 3, 1)
        return (weighted @ second.transpose(1, 2)).flatten(-2)
