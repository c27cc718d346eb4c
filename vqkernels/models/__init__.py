"""Reference models around the quantizers: encoder, quantizer, decoder, by configuration.

Used by :mod:`vqkernels.training` and as an example to copy from; needs torch only (saving and loading: safetensors).
"""

from vqkernels.models.vqvae import VQVAE, Decoder, Encoder, ResidualBlock, VQVAEConfig, VQVAEOutput

__all__ = ["VQVAE", "Decoder", "Encoder", "ResidualBlock", "VQVAEConfig", "VQVAEOutput"]
