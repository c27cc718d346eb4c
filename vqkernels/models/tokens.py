"""What every model here can do: images to tokens and back, whatever number of token grids it has.

The base class of :class:`VQVAE`, :class:`VQGAN` and :class:`VQVAE2`; tools that tokenise or evaluate need only this.
"""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqkernels.functional import VQOutput
from vqkernels.models.pretrained import Pretrained

__all__ = ["LatentModel", "ModelOutput", "StreamsOutput", "TokenModel", "TokenStream", "check_images", "evaluating"]


@dataclass(frozen=True)
class TokenStream:
    """One grid of tokens.

    Args:
        codes: K, number of values of a token.
        downsample: one place of the grid stands for ``downsample`` x ``downsample`` pixels.
        per_place: tokens per place (heads, residual levels); with more than one they are the last dim of the indices.

    Example:
        >>> TokenStream(1024, 16).bits_per_pixel
        0.0390625
    """

    codes: int
    downsample: int
    per_place: int = 1

    @property
    def bits(self) -> int:
        """Bits of one token, ceil(log2 K)."""
        return (self.codes - 1).bit_length()

    @property
    def bits_per_pixel(self) -> float:
        """Rate without entropy coding: ``per_place * log2(K) / downsample**2``."""
        return self.per_place * math.log2(self.codes) / self.downsample**2


class StreamsOutput(NamedTuple):
    """A :class:`vqkernels.VQOutput` with one tensor of indices per token stream."""

    quantized: Tensor
    indices: tuple[Tensor, ...]
    loss: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


class ModelOutput(NamedTuple):
    """What the forward pass of a model returns.

    ``reconstruction`` (B, C, H, W) in about [0, 1] (not clamped, so that gradients flow); ``quantizer`` holds the loss
    terms, and ``indices``: a tensor, or a tuple of tensors if there are several token streams.
    """

    reconstruction: Tensor
    quantizer: VQOutput | StreamsOutput


class TokenModel(Pretrained):
    """A model with token streams: ``encode`` and ``decode`` speak its own form, the other two methods a common one."""

    @property
    @abstractmethod
    def streams(self) -> tuple[TokenStream, ...]:
        """The token grids, coarsest first."""

    @property
    @abstractmethod
    def multiple(self) -> int:
        """Height and width of an image are multiples of this."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Tokens of images: a tensor, or a tuple with one per stream."""

    @abstractmethod
    def decode(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """Images of what :meth:`encode` returned, clamped to [0, 1]."""

    @property
    def bits_per_pixel(self) -> float:
        """Rate of all streams together, without entropy coding."""
        return sum(s.bits_per_pixel for s in self.streams)

    def encode_to_indices(self, images: Tensor) -> tuple[Tensor, ...]:
        """Tokens of images, always one tensor per stream.

        Args:
            images: (B, C, H, W) in [0, 1].

        Returns:
            int64 (B, H / downsample, W / downsample) per stream, with a last dim if ``per_place`` is more than 1.

        Raises:
            ValueError, TypeError: the images do not fit the model.
        """
        found = self.encode(images)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    def decode_indices(self, indices: Sequence[Tensor]) -> Tensor:
        """Images of what :meth:`encode_to_indices` returned, clamped to [0, 1].

        Raises:
            ValueError, TypeError: number or shapes of the streams do not fit the model.
        """
        if isinstance(indices, Tensor) or len(indices) != len(self.streams):
            got = "a tensor" if isinstance(indices, Tensor) else f"{len(indices)} tensors"
            raise ValueError(f"indices is {got}; expected a sequence of {len(self.streams)}, one per token stream")
        return self.decode(indices[0] if len(indices) == 1 else tuple(indices))


class LatentModel(TokenModel):
    """A model with one grid of latents between encoder, ``quantizer`` and decoder."""

    quantizer: nn.Module

    @abstractmethod
    def latents(self, images: Tensor) -> Tensor:
        """Encoder output before quantization.

        Args:
            images: (B, C, H, W) in [0, 1]; H and W are multiples of ``multiple``.

        Raises:
            ValueError: the shape does not fit the config.
            TypeError: the images are not floating point.
        """

    @abstractmethod
    def decode_latents(self, quantized: Tensor) -> Tensor:
        """Images of quantized latents, in about [0, 1] and not clamped; differentiable."""

    def encode(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Tokens of images, without changing any statistic of the codebook.

        Args:
            images: as in :meth:`latents`.

        Returns:
            int64 (B, h, w), with a last dim if a place has several tokens; a tuple if there are several streams.

        Raises:
            ValueError, TypeError: as in :meth:`latents`.
        """
        with evaluating(self):
            out: VQOutput | StreamsOutput = self.quantizer(self.latents(images))
        return out.indices

    def decode(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """Images of tokens.

        Args:
            indices: as :meth:`encode` returns them.

        Returns:
            (B, C, h * downsample, w * downsample), clamped to [0, 1].

        Raises:
            ValueError, TypeError: the quantizer refuses the indices.
        """
        quantizer: Any = self.quantizer
        return self.decode_latents(quantizer.codes_to_output(indices)).clamp(0, 1)

    def initialize(self, images: Tensor) -> None:
        """k-means of the codebooks on the latents of a batch, whatever ``init`` is; needed before ``torch.compile``.

        Raises:
            ValueError, TypeError: as in :meth:`latents`, or no latent is finite.
        """
        quantizer: Any = self.quantizer
        with torch.no_grad():
            quantizer.initialize(self.latents(images))


def check_images(images: Tensor, channels: int, multiple: int) -> None:
    """``images`` is (B, channels, H, W), floating point, with sides that are multiples of ``multiple``."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images is a {type(images).__name__}; expected a torch.Tensor (B, {channels}, H, W)")
    if images.dim() != 4 or images.shape[1] != channels or images.shape[2] % multiple or images.shape[3] % multiple:
        raise ValueError(
            f"images has shape {tuple(images.shape)}; "
            f"expected (B, {channels}, H, W) with H and W multiples of {multiple}"
        )
    if not images.is_floating_point():
        raise TypeError(f"images has dtype {images.dtype}; expected floating point in [0, 1]")


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """``module`` in evaluation mode, and back: tokenising must not move an EMA codebook, nor drop anything out."""
    before = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in before.items():
            m.training = training
