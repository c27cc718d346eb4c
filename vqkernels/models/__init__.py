"""Reference models around the quantizers: encoder, quantizer, decoder, by configuration; losses and discriminators.

Used by :mod:`vqkernels.training` and as an example to copy from; needs torch only (saving and loading: safetensors).
"""

from vqkernels.models.averaging import average_of, averaged
from vqkernels.models.compression import Int8Codebook
from vqkernels.models.discriminator import (
    DiscriminatorConfig,
    MultiScaleDiscriminator,
    PatchGANDiscriminator,
    build_discriminator,
)
from vqkernels.models.loading import load_model
from vqkernels.models.loss import LossTerms, VQGANLoss, VQGANLossConfig
from vqkernels.models.packing import bits_per_token, pack_tokens, packed_size, unpack_tokens
from vqkernels.models.perceptual import LPIPS, LaplacianPyramidLoss, find_lpips
from vqkernels.models.presets import PRESETS, build_model, config_of
from vqkernels.models.tokens import ModelOutput, StreamsOutput, TokenModel, TokenStream
from vqkernels.models.vqgan import VQGAN
from vqkernels.models.vqgan_config import VQGANConfig
from vqkernels.models.vqvae import VQVAE, Decoder, Encoder, ResidualBlock, VQVAEConfig, VQVAEOutput
from vqkernels.models.vqvae2 import VQVAE2, VQVAE2Config

__all__ = [
    "LPIPS",
    "PRESETS",
    "VQGAN",
    "VQVAE",
    "VQVAE2",
    "Decoder",
    "DiscriminatorConfig",
    "Encoder",
    "Int8Codebook",
    "LaplacianPyramidLoss",
    "LossTerms",
    "ModelOutput",
    "MultiScaleDiscriminator",
    "PatchGANDiscriminator",
    "ResidualBlock",
    "StreamsOutput",
    "TokenModel",
    "TokenStream",
    "VQGANConfig",
    "VQGANLoss",
    "VQGANLossConfig",
    "VQVAE2Config",
    "VQVAEConfig",
    "VQVAEOutput",
    "average_of",
    "averaged",
    "bits_per_token",
    "build_discriminator",
    "build_model",
    "config_of",
    "find_lpips",
    "load_model",
    "pack_tokens",
    "packed_size",
    "unpack_tokens",
]
