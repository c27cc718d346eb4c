"""Sizes of published models, and two small ones, by name.

Used by the command line and by anyone who starts from a known model; docs/models.md has the table. Sources, and the
numbers of weights with the codebook that the originals have too (``tests/test_models_published.py``):

* ``vqgan-f16``: the f = 16, K = 16384 ImageNet model of Esser et al. (2021): ``configs/imagenet_vqgan.yaml`` of
  CompVis/taming-transformers with ``n_embed`` 16384, as in the published checkpoint's own config. 76,073,859.
* ``vqgan-f8``: ``models/first_stage_models/vq-f8/config.yaml`` of CompVis/latent-diffusion (Rombach et al. 2022, table
  8: VQ, f = 8, Z = 16384, d = 4). 67,717,295.
* ``llamagen-vq16``: ``VQ-16`` of ``tokenizer/tokenizer_image/vq_model.py`` in FoundationVision/LlamaGen (Sun et al.
  2024; "72M" in its table of models), 8-dim unit codes. 71,883,403.
* ``vqvae-cifar``: ``vqvae_example.ipynb`` of google-deepmind/sonnet, the authors' demonstration of van den Oord et al.
  (2017), with its EMA option. 695,491.
* ``vqvae2-256``: Razavi et al. (2019), table of appendix A, ImageNet: 64 x 64 and 32 x 32 tokens, 128 hidden and 64
  residual units, two blocks, K = 512, D = 64. Its authors published no code: the 4 x 4 strided convolutions are those
  of ``vqvae-cifar``, and the number of weights has nothing to be compared with.
"""

from __future__ import annotations

from typing import Any

from vqkernels.models.tokens import TokenModel
from vqkernels.models.vqgan import VQGAN
from vqkernels.models.vqgan_config import VQGANConfig
from vqkernels.models.vqvae import VQVAE, VQVAEConfig
from vqkernels.models.vqvae2 import VQVAE2, VQVAE2Config

__all__ = ["PRESETS", "ModelConfig", "build_model", "config_of"]

ModelConfig = VQVAEConfig | VQGANConfig | VQVAE2Config

_EMA = {"decay": 0.99, "init": "kmeans", "dead_code_ratio": 0.05}

PRESETS: dict[str, ModelConfig] = {
    "vqgan-f16": VQGANConfig(),
    "vqgan-f8": VQGANConfig(multipliers=(1, 2, 2, 4), z_channels=4, codes=16384, dim=4),
    "llamagen-vq16": VQGANConfig(dim=8, quantizer={"metric": "cosine"}),
    "vqvae-cifar": VQVAEConfig(base_channels=64, max_channels=128, residual_channels=32, quantizer={"decay": 0.99}),
    "vqvae2-256": VQVAE2Config(),
    # For laptops and tests: 4x reduction.
    "tiny": VQVAEConfig(base_channels=16, max_channels=32, residual_channels=16, codes=256, dim=16, quantizer=_EMA),
    "tiny-vqgan": VQGANConfig(
        channels=16, multipliers=(1, 2, 2), blocks=1, attention_factors=(), middle_attention=False, z_channels=32,
        codes=1024, dim=16, quantizer=_EMA, norm_groups=2,
    ),
}  # fmt: skip


def config_of(name: str, **changes: Any) -> ModelConfig:
    """The config of a preset, with some fields changed.

    Args:
        name: one of :data:`PRESETS`.
        changes: fields of the config.

    Raises:
        ValueError: there is no such preset or field, or a value is out of range.

    Example:
        >>> config_of("vqgan-f16", codes=1024).codes
        1024
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; expected one of {', '.join(PRESETS)}")
    config = PRESETS[name]
    return type(config).from_dict(config.to_dict() | changes)


def build_model(preset: str | ModelConfig, **changes: Any) -> TokenModel:
    """A model with fresh weights.

    Args:
        preset: a name of :data:`PRESETS`, or a config.
        changes: fields of the config.

    Returns:
        A :class:`VQVAE`, :class:`VQGAN` or :class:`VQVAE2`, in training mode.

    Raises:
        ValueError: as in :func:`config_of`, or the quantizer refuses one of its options.

    Example:
        >>> type(build_model("tiny-vqgan")).__name__
        'VQGAN'
    """
    if isinstance(preset, str):
        config = config_of(preset, **changes)
    else:
        config = type(preset).from_dict(preset.to_dict() | changes)
    if isinstance(config, VQGANConfig):
        return VQGAN(config)
    return VQVAE2(config) if isinstance(config, VQVAE2Config) else VQVAE(config)
