"""Small models of transformers and diffusers, built in code with random weights and codes as far apart as latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

__all__ = ["AUDIO", "IMAGES", "make"]

IMAGE: dict[str, Any] = {
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "latent_channels": 32,
}


def _encodec(t: Any) -> nn.Module:
    sizes = {"num_filters": 4, "hidden_size": 16, "codebook_size": 64, "codebook_dim": 16, "num_lstm_layers": 1}
    return t.EncodecModel(
        t.EncodecConfig(**sizes, upsampling_ratios=[4, 2], target_bandwidths=[1.8, 7.2], sampling_rate=2400)
    )


def _mimi(t: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "num_filters": 4, "codebook_size": 64, "codebook_dim": 16, "num_quantizers": 5}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    rates = {"upsampling_ratios": [4, 2], "sampling_rate": 2400, "upsample_groups": 32, "frame_rate": None}
    return t.MimiModel(
        t.MimiConfig(**sizes, **layers, **rates, intermediate_size=32, vector_quantization_hidden_dimension=16)
    )


def _dac(t: Any) -> nn.Module:
    sizes = {"encoder_hidden_size": 8, "decoder_hidden_size": 32, "codebook_size": 64, "codebook_dim": 4}
    return t.DacModel(t.DacConfig(**sizes, n_codebooks=4, downsampling_ratios=[2, 4], upsampling_ratios=[4, 2]))


def _chameleon(t: Any) -> nn.Module:
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    return ChameleonVQVAE(t.ChameleonVQVAEConfig(**IMAGE, resolution=16, embed_dim=8, num_embeddings=61))


def _janus(t: Any) -> nn.Module:
    from transformers.models.janus.modeling_janus import JanusVQVAE

    return JanusVQVAE(t.JanusVQVAEConfig(**IMAGE, embed_dim=8, num_embeddings=61, num_patches=8))


def _emu3(t: Any) -> nn.Module:
    options = {**IMAGE, "latent_channels": 4, "attn_resolutions": [], "hidden_size": 32}
    return t.Emu3VQVAE(t.Emu3VQVAEConfig(**options, embed_dim=4, codebook_size=61, temporal_downsample_factor=2))


def _diffusers(t: Any) -> nn.Module:
    vq_model = pytest.importorskip("diffusers").VQModel
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    options = {"block_out_channels": (32, 32), "num_vq_embeddings": 61, "latent_channels": 4, "norm_num_groups": 8}
    model: nn.Module = vq_model(**options, **blocks)
    return model


AUDIO: dict[str, Callable[[Any], nn.Module]] = {"EnCodec": _encodec, "Mimi": _mimi, "DAC": _dac}
IMAGES: dict[str, Callable[[Any], nn.Module]] = {
    "Chameleon": _chameleon,
    "Janus": _janus,
    "Emu3": _emu3,
    "diffusers VQModel": _diffusers,
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    """The model in eval mode, and an input."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = (AUDIO | IMAGES)[name](transformers).eval()
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if path.endswith((".embed", ".embed_sum", "codebook.weight", "quantize.embedding.weight")):
            tensor.data.normal_(std=0.3)
    x = torch.randn(2, 1, 400) if name in AUDIO else torch.rand(2, 3, 16, 16) * 2 - 1
    if name in IMAGES:
        _spread(model, x)
    return model, x


def _spread(model: Any, x: Tensor) -> None:
    """Draw codes where the latents are, so that many are chosen."""

    def draw(module: Any, inputs: tuple[Tensor]) -> None:
        z = inputs[0].movedim(2 if inputs[0].dim() == 5 else 1, -1).flatten(0, -2)
        module.embedding.weight.data.mul_(z.std(0) / 0.3).add_(z.mean(0))

    hook = model.quantize.register_forward_pre_hook(draw)
    with torch.no_grad():
        if type(model).__name__ == "VQModel":
            model(x)
        elif type(model).__name__ == "Emu3VQVAE":
            model.encode(x, torch.tensor([x.shape[2:]] * len(x)))
        else:
            model.encode(x)
    hook.remove()
