"""``RandomProjectionQuantizer``: labels for self-supervised speech models, from a projection and codes never trained.

Called by users. Chiu et al. 2022, "Self-supervised Learning with Random-projection Quantizer for Speech Recognition".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels import _arguments as arguments
from vqkernels.nn.vector_quantizer import VectorQuantizer

__all__ = ["RandomProjectionQuantizer"]


class RandomProjectionQuantizer(nn.Module):
    """Layer norm, a random projection, and the code with the largest cosine.

    Projection and codes follow from ``seed`` alone: drawn on the CPU by a generator of their own, the same on every
    process and device. Nothing learns.

    Args:
        dim: channels of the input.
        num_embeddings: number of codes K.
        embedding_dim: dims of the projection and of the codes.
        heads: independent projections and codebooks.
        norm: subtract the mean of each vector and divide by its standard deviation first.
        seed: of the projection and the codes.
        channel_dim: 1 for (B, C, ...), -1 for (..., C).
        device: of the buffers.

    State: ``rand_projs`` (H, dim, embedding_dim) and ``vq.*``; vector-quantize-pytorch's checkpoints with
    one codebook load too (with several, it adds a layer between projection and codes).

    Shape:
        (B, C, ...) or (..., C) to indices (B, ...), with a last dim of H if there are several heads.

    Example:
        >>> import torch, vqkernels
        >>> label = vqkernels.nn.RandomProjectionQuantizer(80, 8192, 16, channel_dim=-1)
        >>> label(torch.randn(2, 100, 80)).shape
        torch.Size([2, 100])
    """

    rand_projs: Tensor

    def __init__(
        self,
        dim: int,
        num_embeddings: int,
        embedding_dim: int,
        *,
        heads: int = 1,
        norm: bool = True,
        seed: int = 0,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        arguments.check_count("dim", dim)
        arguments.check_integer("seed", seed)
        self.dim, self.norm, self.seed, self.channel_dim = dim, norm, seed, channel_dim
        # A decay makes the codebook a buffer; frozen, it never moves.
        self.vq = VectorQuantizer(
            num_embeddings, embedding_dim, heads=heads, metric="cosine", decay=0.99, channel_dim=channel_dim
        )
        self.vq.freeze()
        self.register_buffer("rand_projs", torch.zeros(heads, dim, embedding_dim))
        self.reset_parameters()
        self.to(device)

    def reset_parameters(self) -> None:
        """Draw projection and codes from ``seed``."""
        generator = torch.Generator().manual_seed(self.seed)
        heads, dim, inner = self.rand_projs.shape
        # Xavier: the variance that nn.init.xavier_normal_ gives a (H, dim, inner) tensor, taken per head.
        projection = torch.randn((heads, dim, inner), generator=generator) * (2.0 / (dim + inner)) ** 0.5
        codes = F.normalize(torch.randn(self.vq.codebook.shape, generator=generator), dim=-1)
        with torch.no_grad():
            self.rand_projs.copy_(projection)
            self.vq.codebook.copy_(codes)
            if self.vq.embed_avg is not None:
                self.vq.embed_avg.copy_(codes)

    @torch.no_grad()
    def forward(self, z: Tensor, mask: Tensor | None = None, *, lens: Tensor | None = None) -> Tensor:
        """Labels of ``z``; -1 where masked.

        Raises:
            ValueError, TypeError: shapes, dtype or device do not fit.
        """
        arguments.check_float_tensor("z", z)
        first = self.channel_dim == 1 and z.dim() > 2
        x = z.movedim(1, -1) if first else z
        if x.dim() < 1 or x.shape[-1] != self.dim:
            wanted = f"(B, {self.dim}, ...)" if self.channel_dim == 1 else f"(..., {self.dim})"
            raise ValueError(f"z has shape {arguments.shape_of(z)}; expected {wanted}")
        if z.device != self.rand_projs.device:
            raise ValueError(f"z is on {z.device}, the projection on {self.rand_projs.device}; expected one device")
        with arguments.without_autocast(z):
            x = x.float()
            x = F.layer_norm(x, (self.dim,)) if self.norm else x
            x = x @ self.rand_projs.float().transpose(0, 1).flatten(1)
        indices: Tensor = self.vq(x.movedim(-1, 1) if first else x, mask, lens=lens).indices
        return indices
