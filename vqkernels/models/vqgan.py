"""The VQGAN generator: the taming/LDM autoencoder around a vector quantizer.

Used by training, tokenising and evaluation, and loads published checkpoints (:mod:`vqkernels.models.published`).
Sources: Esser et al. 2021 (VQGAN), Rombach et al. 2022 (LDM), Sun et al. 2024 (LlamaGen).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from vqkernels.functional import VQOutput
from vqkernels.models import published
from vqkernels.models.autoencoder import VQGANDecoder, VQGANEncoder
from vqkernels.models.pretrained import load_weights
from vqkernels.models.quantizers import LevelsQuantizer, build_quantizer
from vqkernels.models.tokens import LatentModel, ModelOutput, StreamsOutput, TokenStream, check_images
from vqkernels.models.vqgan_config import VQGANConfig

__all__ = ["VQGAN"]


class VQGAN(LatentModel):
    """Encoder, quantizer and decoder of a VQGAN. Images are floating point in [0, 1].

    Args:
        config: sizes and switches; default :class:`VQGANConfig`, the published f = 16 model.

    Raises:
        ValueError: the quantizer refuses one of its options.

    Example:
        >>> import torch
        >>> sizes = {"channels": 8, "multipliers": (1, 2), "attention_factors": (), "z_channels": 8, "dim": 4}
        >>> model = VQGAN(VQGANConfig(codes=16, **sizes))
        >>> indices = model.eval().encode(torch.rand(2, 3, 32, 32))
        >>> indices.shape, model.decode(indices).shape
        (torch.Size([2, 16, 16]), torch.Size([2, 3, 32, 32]))
    """

    config: VQGANConfig
    config_class = VQGANConfig

    def __init__(self, config: VQGANConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VQGANConfig()
        self.encoder = VQGANEncoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.latent_channels, 1)
        self.quantizer = build_quantizer(config)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.z_channels, 1)
        self.decoder = VQGANDecoder(config)

    @property
    def last_layer(self) -> Tensor:
        """The weights of the last convolution, for the adaptive weight of the adversarial loss."""
        return self.decoder.conv_out.weight

    @property
    def streams(self) -> tuple[TokenStream, ...]:
        """One token grid; with ``coarse_factor`` the coarse one before it."""
        c = self.config
        if isinstance(self.quantizer, LevelsQuantizer):
            return self.quantizer.streams(c.downsample)
        return (TokenStream(c.codes, c.downsample, c.heads),)

    @property
    def multiple(self) -> int:
        """Height and width of an image are multiples of this."""
        return self.config.multiple

    def latents(self, images: Tensor) -> Tensor:
        """(B, heads * dim, H / downsample, W / downsample), see :meth:`LatentModel.latents`."""
        check_images(images, self.config.image_channels, self.multiple)
        latents: Tensor = self.quant_conv(self.encoder(images * 2 - 1))
        return latents

    def decode_latents(self, quantized: Tensor) -> Tensor:
        """Images of quantized latents, see :meth:`LatentModel.decode_latents`."""
        decoded: Tensor = self.decoder(self.post_quant_conv(quantized.to(self.post_quant_conv.weight.dtype)))
        return decoded * 0.5 + 0.5

    def forward(self, images: Tensor) -> ModelOutput:
        """Reconstruct ``images`` through the codebook; in training mode the quantizer learns as configured.

        Args:
            images: as in :meth:`latents`.

        Returns:
            The reconstruction and the quantizer's output.

        Raises:
            ValueError, TypeError: as in :meth:`latents`.
        """
        out: VQOutput | StreamsOutput = self.quantizer(self.latents(images))
        return ModelOutput(self.decode_latents(out.quantized), out)

    def load_published(self, state: Mapping[str, Tensor]) -> str:
        """Load a state_dict of taming-transformers, LDM, LlamaGen or diffusers.

        Args:
            state: name to tensor, as stored (also below ``state_dict`` or ``model``).

        Returns:
            The name of the layout.

        Raises:
            ValueError: no known layout, or the tensors do not fit this config; the model is left as it was.
        """
        found = published.translate(state)
        tensors = published.complete(found.tensors, self.state_dict())
        load_weights(self, tensors, f"the {found.layout} state_dict")
        return found.layout

    @classmethod
    def from_published(cls, state: Mapping[str, Tensor], norm_groups: int = 32) -> VQGAN:
        """A model of the sizes found in a published state_dict, with its weights.

        Args:
            state: as in :meth:`load_published`.
            norm_groups: of the GroupNorms, which no tensor tells.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: as in :meth:`load_published`.
        """
        model = cls(published.infer_config(published.translate(state), norm_groups))
        model.load_published(state)
        return model.eval()
