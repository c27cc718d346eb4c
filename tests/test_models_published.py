"""Published checkpoints: outputs of a random diffusers VQModel, and the key and shape lists of taming and LlamaGen.

taming-transformers and LlamaGen are no packages; their lists are restated here from reading the sources
(CompVis/taming-transformers taming/modules/diffusionmodules/model.py, FoundationVision/LlamaGen
tokenizer/tokenizer_image/vq_model.py), independently of the translation's patterns.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from vqkernels.models import VQGAN, VQGANConfig, build_model, config_of
from vqkernels.models.published import translate

Shapes = dict[str, tuple[int, ...]]


def conv(name: str, out: int, into: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (out, into, kernel, kernel), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block(name: str, into: int, out: int) -> Shapes:
    shapes = norm(f"{name}.norm1", into) | conv(f"{name}.conv1", out, into, 3)
    shapes |= norm(f"{name}.norm2", out) | conv(f"{name}.conv2", out, out, 3)
    return shapes | (conv(f"{name}.nin_shortcut", out, into, 1) if into != out else {})


def attention(name: str, width: int) -> Shapes:
    shapes = norm(f"{name}.norm", width)
    for layer in ("q", "k", "v", "proj_out"):
        shapes |= conv(f"{name}.{layer}", width, width, 1)
    return shapes


def both_halves(ch: int, mult: list[int], blocks: int, z: int, attended: set[int], style: str) -> Shapes:
    """taming counts the decoder's levels finest first, LlamaGen in order of use; otherwise only names differ."""
    taming, last = style == "taming", len(mult) - 1
    down, up, res = ("down", "up", "block") if taming else ("conv_blocks", "conv_blocks", "res")
    mid = ("block_1", "attn_1", "block_2") if taming else ("0", "1", "2")
    shapes = conv("encoder.conv_in", ch, 3, 3)
    width = ch
    for i, m in enumerate(mult):
        for j in range(blocks):
            shapes |= block(f"encoder.{down}.{i}.{res}.{j}", width, ch * m)
            width = ch * m
            shapes |= attention(f"encoder.{down}.{i}.attn.{j}", width) if i in attended else {}
        shapes |= conv(f"encoder.{down}.{i}.downsample.conv", width, width, 3) if i < last else {}
    for half in ("encoder", "decoder"):
        shapes |= block(f"{half}.mid.{mid[0]}", width, width) | block(f"{half}.mid.{mid[2]}", width, width)
        shapes |= attention(f"{half}.mid.{mid[1]}", width)
    shapes |= norm("encoder.norm_out", width) | conv("encoder.conv_out", z, width, 3)
    shapes |= conv("decoder.conv_in", width, z, 3)
    for i in reversed(range(len(mult))):
        number = i if taming else last - i
        for j in range(blocks + 1):
            shapes |= block(f"decoder.{up}.{number}.{res}.{j}", width, ch * mult[i])
            width = ch * mult[i]
            shapes |= attention(f"decoder.{up}.{number}.attn.{j}", width) if i in attended else {}
        shapes |= conv(f"decoder.{up}.{number}.upsample.conv", width, width, 3) if i > 0 else {}
    return shapes | norm("decoder.norm_out", width) | conv("decoder.conv_out", 3, width, 3)


def published(style: str, ch: int, mult: list[int], z: int, codes: int, dim: int, blocks: int = 2) -> Shapes:
    shapes = both_halves(ch, mult, blocks, z, {len(mult) - 1}, style)
    shapes |= conv("quant_conv", dim, z, 1) | conv("post_quant_conv", z, dim, 1)
    shapes["quantize.embedding.weight"] = (codes, dim)
    if style == "taming":  # the checkpoint holds the losses' networks too
        shapes |= {"loss.perceptual_loss.lin0.model.1.weight": (1, 64, 1, 1), "loss.discriminator.main.0.bias": (64,)}
    else:
        shapes["quantize.codebook_used"] = (65536,)
    return shapes


def random_state(shapes: Shapes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator) * (1 / max(1, sum(shape[1:]))) ** 0.5 + (len(shape) == 1) * 0.1
        for name, shape in shapes.items()
    }


FULL = {
    "vqgan-f16": ("taming", 128, [1, 1, 2, 2, 4], 256, 16384, 256),
    "vqgan-f8": ("taming", 128, [1, 2, 2, 4], 4, 16384, 4),
    "llamagen-vq16": ("llamagen", 128, [1, 1, 2, 2, 4], 256, 16384, 8),
}


@pytest.mark.parametrize("name", FULL)
def test_presets_have_every_tensor_of_the_published_model(name: str) -> None:
    with torch.device("meta"):
        state = {k: torch.empty(shape) for k, shape in published(*FULL[name]).items()}
        model = VQGAN(config_of(name))
    found = translate(state)
    assert found.layout == FULL[name][0]
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    counters = {f"quantizer.{k}" for k in ("code_counts", "steps", "initialized")}
    assert {k: tuple(v.shape) for k, v in found.tensors.items()} == {k: v for k, v in own.items() if k not in counters}


def sonnet_weights() -> int:
    """Of google-deepmind/sonnet's vqvae_example.ipynb: 128 hidden units, two residual layers of 32."""

    def layer(kernel: int, a: int, b: int) -> int:
        return kernel * kernel * a * b + b

    residual = 2 * (layer(3, 128, 32) + layer(1, 32, 128))
    encoder = layer(4, 3, 64) + layer(4, 64, 128) + layer(3, 128, 128) + residual + layer(1, 128, 64)
    decoder = layer(3, 64, 128) + residual + layer(4, 128, 64) + layer(4, 64, 3)
    return encoder + decoder + 512 * 64


# Counted on the originals' own code (taming-transformers 3ba01b2, LlamaGen ce98ec4), codebook included.
WEIGHTS = {
    "vqgan-f16": 76_073_859,
    "vqgan-f8": 67_717_295,
    "llamagen-vq16": 71_883_403,
    "vqvae-cifar": sonnet_weights(),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_presets_have_the_number_of_weights_of_the_original(name: str) -> None:
    with torch.device("cpu" if name == "vqvae-cifar" else "meta"):  # EMA statistics are computed at once
        model = build_model(name)
    tensors = dict(model.named_parameters())
    tensors.setdefault("quantizer.codebook", model.quantizer.codebook)  # type: ignore[union-attr,arg-type]
    assert sum(t.numel() for t in tensors.values()) == WEIGHTS[name]
    if name in FULL:
        shapes = {k: v for k, v in published(*FULL[name]).items() if not re.match(r"loss\.|quantize\.codebook_used", k)}
        assert sum(math.prod(shape) for shape in shapes.values()) == WEIGHTS[name]


@pytest.mark.parametrize("style", ["taming", "llamagen"])
def test_sizes_are_inferred_and_weights_land_where_they_belong(style: str) -> None:
    state = random_state(published(style, 8, [1, 2, 3], 6, 19, 5, blocks=1))
    wrapped: Any = {"state_dict" if style == "taming" else "model": state}
    model = VQGAN.from_published(wrapped, norm_groups=4)
    c = model.config
    assert (c.channels, c.multipliers, c.blocks, c.attention, c.z_channels, c.codes, c.dim) == (
        8, (1, 2, 3), 1, (4,), 6, 19, 5
    )  # fmt: skip
    assert model.quantizer.metric == ("cosine" if style == "llamagen" else "l2")
    assert torch.equal(model.quantizer.codebook, state["quantize.embedding.weight"])  # type: ignore[arg-type]
    # The coarsest level of the decoder, which the two number from opposite ends.
    first = "decoder.up.2.block.0" if style == "taming" else "decoder.conv_blocks.0.res.0"
    assert torch.equal(model.decoder.levels[0].blocks[0].conv1.weight, state[f"{first}.conv1.weight"])  # type: ignore[union-attr,index]
    assert model.encode(torch.rand(1, 3, 8, 12)).shape == (1, 2, 3)  # type: ignore[union-attr]


def diffusers_model(**changes: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    sizes = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "layers_per_block": 1,
        "latent_channels": 3,
        "num_vq_embeddings": 19,
        "vq_embed_dim": 5,
        "norm_num_groups": 8,
    }
    model = diffusers.VQModel(**(sizes | changes)).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones and zeros would hide a swap
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.1)
    return model


PLAIN = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        PLAIN | {"layers_per_block": 2},
        PLAIN | {"mid_block_add_attention": False},
        {
            "block_out_channels": (16, 16, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
        },
    ],
    ids=["attention", "two blocks", "no attention", "three levels"],
)
def test_same_output_as_a_random_diffusers_model(changes: dict[str, Any]) -> None:
    theirs = diffusers_model(**changes)
    ours = VQGAN.from_published(theirs.state_dict(), norm_groups=8)
    images = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        latents = theirs.encode(images * 2 - 1).latents
        torch.testing.assert_close(ours.latents(images), latents, rtol=0, atol=1e-5)
        want = theirs(images * 2 - 1).sample * 0.5 + 0.5
        torch.testing.assert_close(ours(images).reconstruction, want, rtol=0, atol=1e-5)
        indices = theirs.quantize(latents)[2][2]
        assert torch.equal(ours.encode(images).flatten(), indices.flatten())  # type: ignore[union-attr]


def test_attention_names_of_old_diffusers_files_are_read() -> None:
    theirs = diffusers_model()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in theirs.state_dict().items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        state[name] = value
    assert any(".proj_attn." in name for name in state)
    new_model, old_model = (VQGAN.from_published(s, norm_groups=8) for s in (theirs.state_dict(), state))
    assert all(torch.equal(v, old_model.state_dict()[k]) for k, v in new_model.state_dict().items())


def test_weights_of_diffusers_under_the_names_of_taming_give_the_same_output() -> None:
    """The only difference left between the layouts is naming, so renaming by hand must not change the output."""
    theirs = diffusers_model()
    state = {}
    for name, value in theirs.state_dict().items():
        new = re.sub(r"encoder\.down_blocks\.(\d)\.resnets", r"encoder.down.\1.block", name)
        new = re.sub(r"encoder\.down_blocks\.(\d)\.attentions", r"encoder.down.\1.attn", new)
        new = new.replace("encoder.down_blocks.0.downsamplers.0", "encoder.down.0.downsample")
        for i in (0, 1):
            new = new.replace(f"decoder.up_blocks.{i}.resnets", f"decoder.up.{1 - i}.block")
            new = new.replace(f"decoder.up_blocks.{i}.attentions", f"decoder.up.{1 - i}.attn")
        new = new.replace("decoder.up_blocks.0.upsamplers.0", "decoder.up.1.upsample")
        new = new.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
        new = new.replace("group_norm", "norm").replace("conv_shortcut", "nin_shortcut")
        for there, here in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            new = new.replace(f".{there}.", f".{here}.")
        is_linear = value.dim() == 2 and "embedding" not in new
        state[new] = value[..., None, None] if is_linear else value
    ours = VQGAN.from_published(state, norm_groups=8)
    assert translate(state).layout == "taming"
    images = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        want = theirs(images * 2 - 1).sample * 0.5 + 0.5
    torch.testing.assert_close(ours(images).reconstruction.detach(), want, rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    state = random_state(published("taming", 8, [1, 2], 6, 19, 5, blocks=1))
    model = VQGAN(VQGANConfig(channels=8, multipliers=(1, 2), blocks=1, z_channels=6, codes=23, dim=5, norm_groups=4))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"quantizer.codebook is \(19, 5\) float32, expected \(23, 5\)"):
        model.load_published(state)
    del state["decoder.mid.block_2.conv2.bias"]
    with pytest.raises(ValueError, match=r"missing: decoder.middle.2.conv2.bias"):
        model.load_published(state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="no known VQGAN layout"):
        model.load_published({"weight": torch.zeros(1)})
    del state["quantize.embedding.weight"]
    with pytest.raises(ValueError, match=r"taming state_dict has no quantize\.embedding\.weight"):
        model.load_published(state)
    odd = {k: torch.zeros(v) for k, v in published("taming", 8, [1, 2], 6, 19, 5).items()}
    odd["encoder.down.1.block.0.conv1.weight"] = torch.zeros(12, 8, 3, 3)
    with pytest.raises(ValueError, match="a level is 12 wide; expected a multiple of the 8 channels"):
        VQGAN.from_published(odd)


def test_published_weights_load_into_an_ema_model() -> None:
    state = random_state(published("taming", 8, [1, 2], 6, 19, 5, blocks=1))
    sizes: dict[str, Any] = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "z_channels": 6, "codes": 19, "dim": 5}
    model = VQGAN(VQGANConfig(**sizes, norm_groups=4, quantizer={"decay": 0.9, "init": "kmeans"}))
    model.load_published(state)
    model.train()
    model(torch.rand(2, 3, 8, 8))  # k-means must not overwrite what was loaded
    moved = (model.quantizer.codebook - state["quantize.embedding.weight"]).abs()  # type: ignore[operator]
    unused = model.quantizer.code_counts == 0
    assert 0 < int(unused.sum()) < 19  # type: ignore[operator]
    assert moved[unused].max() < 1e-4
    torch.testing.assert_close(model.quantizer.steps, torch.tensor(1))
