"""How the models of the presets are trained: batch, learning rate, losses, as published where they are.

Applied by :meth:`vqkernels.training.TrainConfig.from_preset` below everything that the user says.
"""

from __future__ import annotations

import copy
from typing import Any

__all__ = ["recipe"]

# Esser et al. and Rombach et al. scale 4.5e-6 by the images per step. Where the originals use LPIPS, whose weights this
# package does not ship, the weight-free perceptual loss stands until `loss.perceptual` is "lpips".
_RECIPES: dict[str, dict[str, Any]] = {
    # taming-transformers, configs/imagenet_vqgan.yaml: 3 images on each of several GPUs.
    "vqgan-f16": {
        "image_size": 256, "batch_size": 12, "lr": 5.4e-5, "discriminator_lr": 5.4e-5, "steps": 500_000,
        "loss": {"discriminator_start": 250_001, "discriminator_ramp": 0, "adversarial_weight": 0.8},
    },
    # latent-diffusion, models/first_stage_models/vq-f8/config.yaml.
    "vqgan-f8": {
        "image_size": 256, "batch_size": 10, "lr": 4.5e-5, "discriminator_lr": 4.5e-5, "steps": 500_000,
        "loss": {"discriminator_start": 1, "discriminator_ramp": 0, "adversarial_weight": 0.6},
        "discriminator": {"layers": 2},
    },
    # LlamaGen, tokenizer/tokenizer_image/vq_train.py: 40 epochs of ImageNet.
    "llamagen-vq16": {
        "image_size": 256, "batch_size": 128, "lr": 1e-4, "discriminator_lr": 1e-4, "steps": 400_000, "clip": 1.0,
        "precision": "bf16",
        "loss": {
            "l1": 0.0, "l2": 1.0, "adaptive": False, "adversarial_weight": 0.5, "discriminator_start": 20_000,
            "discriminator_ramp": 0,
        },
    },
    # DeepMind's Sonnet, examples/vqvae_example.ipynb.
    "vqvae-cifar": {"image_size": 32, "batch_size": 32, "lr": 3e-4, "steps": 50_000},
    # Razavi et al. (2019), appendix A.
    "vqvae2-256": {"image_size": 256, "batch_size": 128, "lr": 3e-4, "steps": 2_200_000},
    # A few minutes on two cores and a dozen photographs: the codebook has to follow the encoder in hundreds of steps,
    # squares pull colours into place sooner than absolute values, and permuted colours would take too long to learn.
    "tiny-vqgan": {
        "image_size": 48, "batch_size": 24, "steps": 1500, "shuffle_channels": 0.0, "discriminator_lr": 5e-4,
        "model_options": {"quantizer": {"decay": 0.95}}, "discriminator": {"channels": 32, "layers": 2},
        "loss": {
            "l1": 0.0, "l2": 4.0, "perceptual_weight": 0.3, "adaptive": False, "adversarial_weight": 0.015,
        },
    },
}  # fmt: skip


def recipe(preset: str | None) -> dict[str, Any]:
    """Fields of :class:`TrainConfig` for a preset; none for the demo and for presets without an entry."""
    return copy.deepcopy(_RECIPES.get(preset or "", {}))
