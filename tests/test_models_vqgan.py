"""The VQGAN generator and VQ-VAE-2: sizes, tokens that decode to the reconstruction, numerics, compilation, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vqkernels.models import (
    PRESETS,
    VQGAN,
    VQVAE2,
    TokenModel,
    VQGANConfig,
    VQVAE2Config,
    build_model,
    config_of,
    load_model,
)
from vqkernels.models.blocks import AttentionBlock, Downsample, ResnetBlock
from vqkernels.models.tokens import TokenStream

TINY: dict[str, Any] = {
    "channels": 8,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention_factors": (),
    "z_channels": 6,
    "codes": 19,
    "dim": 5,
    "norm_groups": 4,
}


def small(**changes: Any) -> VQGAN:
    return VQGAN(VQGANConfig(**(TINY | changes)))


def hierarchical(**changes: Any) -> VQVAE2:
    sizes: dict[str, Any] = {"channels": 8, "residual_channels": 6, "residual_blocks": 1, "codes": 19, "dim": 5}
    return VQVAE2(VQVAE2Config(**(sizes | changes)))


MODELS = {
    "plain": lambda: small(),
    "attention": lambda: small(attention_factors=(1, 2)),
    "heads": lambda: small(quantizer={"heads": 3}),
    "levels": lambda: small(residual_levels=3),
    "hybrid": lambda: small(coarse_factor=3, coarse_codes=7),
    "hybrid levels heads": lambda: small(coarse_factor=2, residual_levels=2, quantizer={"heads": 2, "decay": 0.9}),
    "cosine": lambda: small(quantizer={"metric": "cosine"}),
    "no convolutions": lambda: small(resample_with_conv=False, middle_attention=False),
    "one resolution": lambda: small(multipliers=(2,)),
    "hierarchical": lambda: hierarchical(),
    "hierarchical heads": lambda: hierarchical(quantizer={"heads": 2}, bottom_factor=2),
    "deep hierarchical": lambda: hierarchical(bottom_factor=8),
    "vqvae": lambda: build_model("tiny", base_channels=8, residual_channels=4, codes=19),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> TokenModel:
    made: TokenModel = MODELS[request.param]()
    made(torch.rand(2, 3, made.multiple * 8, made.multiple * 4))  # a k-means codebook has seen something
    return made


def test_tokens_have_the_sizes_that_the_streams_say_and_decode_to_the_forward_pass(model: TokenModel) -> None:
    model.eval()
    h, w = model.multiple * 3, model.multiple * 5
    images = torch.rand(2, 3, h, w)
    indices = model.encode_to_indices(images)
    for stream, grid in zip(model.streams, indices, strict=True):
        places = (2, h // stream.downsample, w // stream.downsample)
        assert grid.shape == (places if stream.per_place == 1 else (*places, stream.per_place))
        assert grid.dtype == torch.int64
        assert 0 <= int(grid.min()) <= int(grid.max()) < stream.codes
    out = model(images)
    torch.testing.assert_close(model.decode_indices(indices), out.reconstruction.clamp(0, 1))
    assert out.reconstruction.shape == images.shape


def test_tokens_of_an_image_do_not_depend_on_its_batch(model: TokenModel) -> None:
    images = torch.rand(5, 3, model.multiple * 4, model.multiple * 4)
    together = model.encode_to_indices(images)
    alone = [model.encode_to_indices(image[None]) for image in images]
    for i, grid in enumerate(together):
        assert torch.equal(grid, torch.cat([one[i] for one in alone]))


def test_encoding_in_training_mode_moves_nothing(model: TokenModel) -> None:
    model.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.encode(torch.rand(2, 3, model.multiple * 4, model.multiple * 4))
    assert all(m.training for m in model.modules())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_gradients_reach_every_parameter(model: TokenModel) -> None:
    images = torch.rand(2, 3, model.multiple * 4, model.multiple * 4)
    model.train().zero_grad()
    out: Any = model(images)
    ((out.reconstruction - images).square().mean() + out.quantizer.loss).backward()
    # The bias of keys adds the same to every similarity: softmax has no gradient for it.
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [name for name in dead if not name.endswith(".k.bias")] == []


def test_saved_models_load_to_the_same_tokens(model: TokenModel, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    images = torch.rand(2, 3, model.multiple * 4, model.multiple * 4)
    for a, b in zip(model.encode_to_indices(images), loaded.encode_to_indices(images), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_say_their_rate(name: str) -> None:
    config = config_of(name)
    assert type(config).from_dict(config.to_dict()) == config
    published = {
        "vqgan-f16": ((TokenStream(16384, 16),), 14 / 256),
        "vqgan-f8": ((TokenStream(16384, 8),), 14 / 64),
        "llamagen-vq16": ((TokenStream(16384, 16),), 14 / 256),
        "vqvae-cifar": ((TokenStream(512, 4),), 9 / 16),
        "vqvae2-256": ((TokenStream(512, 8), TokenStream(512, 4)), 9 / 64 + 9 / 16),
    }
    if name in published:
        # The large ones without their memory; EMA statistics are computed at once, so those models are real.
        with torch.device("meta" if isinstance(config, VQGANConfig) else "cpu"):
            model = build_model(config)
        assert (model.streams, model.bits_per_pixel) == published[name]


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="preset is 'vqgan'; expected one of vqgan-f16"):
        build_model("vqgan")
    with pytest.raises(ValueError, match="unknown VQGANConfig field 'depth'"):
        config_of("tiny-vqgan", depth=3)
    with pytest.raises(FileNotFoundError, match="holds no model"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model": "Transformer"}')
    with pytest.raises(ValueError, match="holds a 'Transformer'; expected one of VQVAE, VQGAN, VQVAE2"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channels": 0}, "channels is 0"),
        ({"multipliers": ()}, "multipliers is ()"),
        ({"multipliers": (1, 0)}, "multipliers is 0"),
        ({"attention_factors": (16,)}, "attention_factors has 16; the levels have 1, 2"),
        ({"coarse_factor": 1}, "coarse_factor is 1"),
        ({"coarse_codes": 4}, "coarse_codes is 4 without coarse_factor"),
        ({"residual_levels": 0}, "residual_levels is 0"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"quantizer": {"embedding_dim": 3}}, "quantizer sets 'embedding_dim'"),
        ({"quantizer": {"speed": 3}}, "quantizer is {'speed': 3}"),
        ({"residual_levels": 2, "quantizer": {"gradient": "rotation"}}, "gradient is 'rotation'"),
        ({"residual_levels": 2, "quantizer": {"metric": "cosine"}}, "remainders are compared by 'l2'"),
    ],
)
def test_bad_sizes_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as e:
        small(**changes)
    assert words in str(e.value)


def test_images_that_do_not_fit_are_refused() -> None:
    model = small(coarse_factor=2)
    words = r"images has shape \(1, 3, 6, 8\); expected \(B, 3, H, W\) with H and W multiples of 4"
    with pytest.raises(ValueError, match=words):
        model.encode(torch.rand(1, 3, 6, 8))
    with pytest.raises(TypeError, match=r"images has dtype torch.uint8"):
        model(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="indices is a tensor; expected a sequence of 2"):
        model.decode_indices(torch.zeros(1, 4, 4, dtype=torch.int64))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="indices has 1 streams; expected 2"):
        model.decode(torch.zeros(1, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected twice the side"):
        hierarchical().decode((torch.zeros(1, 2, 2).long(), torch.zeros(1, 6, 4).long()))


def test_attention_block_is_softmax_attention_over_places() -> None:
    block = AttentionBlock(6, 3)
    twin = AttentionBlock(6, 3, twice_differentiable=True)
    twin.load_state_dict(block.state_dict())
    x = torch.randn(2, 6, 3, 5)
    h = block.norm(x)
    q, k, v = (layer(h).flatten(2) for layer in (block.q, block.k, block.v))
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / 6**0.5, -1)
    want = x + block.project(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))
    torch.testing.assert_close(block(x), want)
    torch.testing.assert_close(twin(x), want)


def test_halving_without_convolution_is_the_mean() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert Downsample(1, with_conv=False)(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert Downsample(3, with_conv=True)(torch.rand(1, 3, 6, 10)).shape == (1, 3, 3, 5)


def test_residual_block_keeps_its_input_where_the_last_convolution_is_zero() -> None:
    block = ResnetBlock(4, 4, 2)
    torch.nn.init.zeros_(block.conv2.weight)
    torch.nn.init.constant_(block.conv2.bias, 2.0)
    x = torch.randn(1, 4, 5, 7)
    assert torch.equal(block(x), x + 2)


def test_recomputed_activations_give_the_same_gradients() -> None:
    plain = small(attention_factors=(2,))
    recomputing = small(attention_factors=(2,), checkpoint_activations=True)
    recomputing.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 16, 16)
    for model in (plain, recomputing):
        out = model(images)
        ((out.reconstruction - images).square().mean() + out.quantizer.loss).backward()
    for (name, a), b in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_last_layer_is_the_last_convolution() -> None:
    for model in (small(), hierarchical(), build_model("tiny")):
        images = torch.rand(1, 3, 32, 32)
        grad = torch.autograd.grad(model(images).reconstruction[:, 1].sum(), model.last_layer)[0]  # type: ignore[call-overload]
        per_channel = grad.abs().flatten(1).sum(1) if isinstance(model, VQGAN) else grad.abs().sum((0, 2, 3))
        assert per_channel[1] > 0
        assert per_channel[0] == per_channel[2] == 0


def test_same_seed_same_bits() -> None:
    images = torch.rand(2, 3, 16, 16)
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        model = small(residual_levels=2, quantizer={"decay": 0.9, "init": "kmeans", "dead_code_ratio": 0.1})
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(3):
            out = model(images)
            ((out.reconstruction - images).square().mean() + out.quantizer.loss).backward()
            optimizer.step()
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("changes", [{}, {"residual_levels": 2, "coarse_factor": 2}])
def test_bf16_autocast_and_channels_last_train(changes: dict[str, Any]) -> None:
    model = small(attention_factors=(2,), **changes)
    images = torch.rand(2, 3, 16, 16)
    want = model(images).reconstruction
    last: Any = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(last(images.to(memory_format=torch.channels_last)).reconstruction, want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = last(images)
    assert out.quantizer.loss.dtype == torch.float32
    assert (out.reconstruction.float() - want).abs().mean() < 0.05
    (out.reconstruction.float().square().mean() + out.quantizer.loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_half_precision_inference_keeps_an_exact_codebook() -> None:
    for model in (small().bfloat16().eval(), hierarchical().bfloat16().eval()):
        images = torch.rand(1, 3, 16, 16, dtype=torch.bfloat16)
        assert model.decode_indices(model.encode_to_indices(images)).dtype == torch.bfloat16
        codebooks = [t for n, t in model.state_dict().items() if n.endswith("codebook")]
        assert all(t.dtype == torch.float32 for t in codebooks)


def check_compiled(changes: dict[str, Any], backend: str) -> None:
    model, twin = small(**changes), small(**changes)
    twin.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 8, 8)
    torch._dynamo.reset()  # nothing that an earlier test compiled decides what is compiled now
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for run in (model, compiled):
        out = run(images)
        ((out.reconstruction - images).square().mean() + out.quantizer.loss).backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name, rtol=1e-3, atol=1e-6)
    for (name, x), y in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(x, y, msg=name)


@pytest.mark.slow
def test_forward_and_backward_compile_to_one_graph() -> None:
    changes = {"multipliers": (1,), "residual_levels": 2, "coarse_factor": 2, "quantizer": {"decay": 0.9}}
    check_compiled(changes | {"attention_factors": (1,)}, "aot_eager")


@pytest.mark.slow
def test_inductor_compiles_forward_and_backward_to_one_graph() -> None:
    check_compiled({"multipliers": (1,), "channels": 4, "z_channels": 4, "middle_attention": False}, "inductor")
