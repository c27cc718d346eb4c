"""Every technique that a config switches on does what it is for, on crops of photographs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.photographs import crops, error, patches, train
from vqkernels import ResidualVectorQuantizer, VectorQuantizer
from vqkernels.models import VQGAN, VQVAE, VQVAE2, VQGANConfig, VQVAE2Config, build_model
from vqkernels.models.quantizers import LevelsQuantizer

EMA: dict[str, Any] = {"decay": 0.8, "init": "kmeans"}


@pytest.fixture(scope="module")
def latents() -> tuple[Tensor, Tensor]:
    """Patches of 2 x 2 pixels, to learn from and to measure on."""
    return patches(crops(24, 64), 2), patches(crops(8, 64, seed=1), 2)


def learned(quantizer: Any, latents: tuple[Tensor, Tensor], steps: int = 3) -> float:
    """Quantization error after a few EMA steps, on other crops."""
    quantizer.train()
    for _ in range(steps):
        quantizer(latents[0])
    quantizer.eval()
    with torch.no_grad():
        return float((quantizer(latents[1]).quantized - latents[1]).square().mean())


def test_more_codes_are_finer(latents: tuple[Tensor, Tensor]) -> None:
    errors = [learned(VectorQuantizer(k, 12, **EMA), latents) for k in (4, 32, 256)]
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]


def test_more_heads_are_finer(latents: tuple[Tensor, Tensor]) -> None:
    errors = [learned(VectorQuantizer(16, 12 // h, heads=h, **EMA), latents) for h in (1, 2, 4)]
    assert errors[0] > 1.02 * errors[1] > 1.02**2 * errors[2]


def test_unit_codes_ignore_the_length_of_a_latent(latents: tuple[Tensor, Tensor]) -> None:
    same = {}
    for metric in ("cosine", "l2"):
        vq = VectorQuantizer(32, 12, metric=metric, **EMA)
        learned(vq, latents)
        same[metric] = torch.equal(vq(latents[1]).indices, vq(3 * latents[1]).indices)
    assert same == {"cosine": True, "l2": False}


def test_the_bottom_grid_of_two_depends_on_the_top_one() -> None:
    """VQ-VAE-2: both grids see the pixels, and the bottom one sees what the top one chose."""
    model = VQVAE2(VQVAE2Config(channels=8, residual_channels=8, codes=32, dim=4, quantizer=EMA))
    images = crops(8, 32)
    model(images)  # k-means
    top, bottom = model.eval().encode(images)
    with torch.no_grad():
        model.quantizer_top.codebook.mul_(-30)
    assert not torch.equal(model.encode(images)[1], bottom)
    restored = model.decode((top, bottom))
    for other in ((top.roll(1, -1), bottom), (top, bottom.roll(1, -1))):
        assert not torch.equal(model.decode(other), restored)


def test_every_residual_level_corrects_the_error_of_those_before(latents: tuple[Tensor, Tensor]) -> None:
    errors = [learned(LevelsQuantizer(12, 16, levels, **EMA), latents) for levels in (1, 2, 4)]
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]
    assert errors[0] == pytest.approx(learned(VectorQuantizer(16, 12, **EMA), latents), rel=1e-4)


def test_hybrid_coding_beats_one_codebook_at_the_same_rate(latents: tuple[Tensor, Tensor]) -> None:
    # 6 bits per place: 8 bits for 2 x 2 places and 4 for each, or 6 for each.
    hybrid = learned(LevelsQuantizer(12, 16, coarse_codes=256, coarse_factor=2, **EMA), latents)
    single = learned(VectorQuantizer(64, 12, **EMA), latents)
    assert hybrid < 0.97 * single


def test_streams_of_hybrid_coding_say_the_rate() -> None:
    config = VQGANConfig(
        multipliers=(1, 1), channels=4, z_channels=4, codes=16, dim=3, coarse_codes=256, coarse_factor=2
    )
    model = VQGAN(config)
    assert [(s.codes, s.downsample, s.per_place) for s in model.streams] == [(256, 4, 1), (16, 2, 1)]
    assert model.bits_per_pixel == pytest.approx(8 / 16 + 4 / 4)


def test_levels_of_a_trained_model_lower_its_reconstruction_error_one_by_one() -> None:
    torch.manual_seed(0)
    model = VQGAN(
        VQGANConfig(
            channels=8, multipliers=(1, 1), blocks=1, attention_factors=(), middle_attention=False, z_channels=8,
            codes=16, dim=8, residual_levels=3, quantizer=EMA, norm_groups=4,
        )
    )  # fmt: skip
    images = crops(16, 16)
    train(model, images, 40, lr=4e-3)
    indices = model.encode(images)
    assert isinstance(indices, Tensor)
    assert isinstance(model.quantizer, LevelsQuantizer)
    errors = []
    with torch.no_grad():
        for used in (1, 2, 3):
            total = sum(
                level.codes_to_output(indices[..., i])  # type: ignore[operator]
                for i, level in enumerate(list(model.quantizer.levels)[:used])
            )
            errors.append(float((model.decode_latents(total).clamp(0, 1) - images).square().mean()))  # type: ignore[arg-type]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] == pytest.approx(error(model, images), rel=1e-4)


def test_an_adaptive_codebook_follows_the_data(latents: tuple[Tensor, Tensor]) -> None:
    frozen = learned(VectorQuantizer(64, 12, init="uniform"), latents)  # nothing steps a gradient codebook here
    moving = learned(VectorQuantizer(64, 12, decay=0.8, init="uniform"), latents, steps=10)
    started = learned(VectorQuantizer(64, 12, decay=0.8, init="kmeans"), latents)
    assert started < moving < frozen


def test_dead_codes_are_used_again(latents: tuple[Tensor, Tensor]) -> None:
    usage = []
    for ratio in (0.0, 0.2):
        vq = VectorQuantizer(64, 12, decay=0.8, dead_code_ratio=ratio, init="normal")  # far from the data
        learned(vq, latents, steps=20)
        vq.train().reset_usage()
        vq(latents[0])
        usage.append(vq.usage())
    assert usage[0] < 0.6
    assert usage[1] > 0.9


def without_norms(half: torch.nn.Module) -> None:
    """GroupNorm sees the whole image; taking the mean out of the question leaves convolutions and attention."""
    for module in half.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x  # type: ignore[method-assign,assignment]


def test_a_deeper_generator_has_more_capacity() -> None:
    def count(**changes: Any) -> int:
        return sum(p.numel() for p in build_model("tiny-vqgan", **changes).parameters())

    plain, deep, wide = count(), count(decoder_blocks=4), count(blocks=2)
    assert deep > 1.3 * plain
    assert wide > 1.3 * plain
    model = build_model("tiny-vqgan", decoder_blocks=4)
    assert isinstance(model, VQGAN)
    assert [len(level.blocks) for level in model.decoder.levels] == [4, 4, 4]  # type: ignore[arg-type]
    assert [len(level.blocks) for level in model.encoder.levels] == [1, 1, 1]  # type: ignore[arg-type]


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_a_pixel_of_a_deeper_generator_sees_more_tokens(blocks: int) -> None:
    sizes: dict[str, Any] = {"channels": 4, "multipliers": (1,), "z_channels": 4, "dim": 4, "codes": 8}
    off: dict[str, Any] = {"attention_factors": (), "middle_attention": False}
    model = VQGAN(VQGANConfig(**sizes, **off, blocks=1, decoder_blocks=blocks, norm_groups=1)).double().eval()
    without_norms(model.decoder)
    latents = torch.randn(1, 4, 41, 41, dtype=torch.float64, requires_grad=True)
    seen = torch.autograd.grad(model.decode_latents(latents)[0, :, 20, 20].sum(), latents)[0][0].abs().sum(0) > 0
    rows, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
    # Two convolutions per block, two blocks in the middle, one convolution at each end: a place further with each.
    reach = 1 + 2 * 2 + 2 * blocks + 1
    assert (int(rows.min()), int(rows.max())) == (20 - reach, 20 + reach)
    assert (int(columns.min()), int(columns.max())) == (20 - reach, 20 + reach)


def test_attention_carries_information_across_the_image() -> None:
    def reach(half: str, **changes: Any) -> float:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "channels": 8,
            "multipliers": (1, 1),
            "blocks": 1,
            "z_channels": 4,
            "dim": 4,
            "codes": 8,
        }
        model = VQGAN(VQGANConfig(**sizes, norm_groups=1, **changes)).eval()
        without_norms(model)
        if half == "encoder":  # one latent, and the pixels of the opposite corner
            given = torch.rand(1, 3, 64, 64, requires_grad=True)
            out = model.latents(given)
        else:  # one pixel, and the latents of the opposite corner
            given = torch.rand(1, 4, 32, 32, requires_grad=True)
            out = model.decode_latents(given)
        side = given.shape[-1] * 3 // 4
        far = torch.autograd.grad(out[0, :, 0, 0].sum(), given)[0][0, :, side:, side:]
        return float(far.abs().sum())

    for half in ("encoder", "decoder"):
        assert reach(half, attention_factors=(), middle_attention=False) == 0.0
        assert reach(half, attention_factors=(2,), middle_attention=False) > 0.0
        assert reach(half, attention_factors=(), middle_attention=True) > 0.0


@pytest.mark.parametrize("name", ["tiny", "tiny-vqgan"])
def test_small_presets_learn_photographs(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, **({"multipliers": (1, 1, 1)} if name == "tiny-vqgan" else {}))
    images = crops(16, 32)
    losses = train(model, images, 40, lr=4e-3)
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert isinstance(model, VQVAE | VQGAN)


def test_losses_of_levels_are_those_of_each_against_its_own_remainder() -> None:
    vq = LevelsQuantizer(3, 7, 2, coarse_factor=2, coarse_codes=5)
    z = torch.randn(2, 3, 4, 6, requires_grad=True)
    out = vq(z)
    coarse, first, second = vq.coarse, *vq.levels
    assert coarse is not None
    pooled = torch.nn.functional.avg_pool2d(z, 2)
    a = coarse(pooled)
    spread = a.quantized.repeat_interleave(2, 2).repeat_interleave(2, 3).detach()
    b = first(z - spread)
    c = second(z - spread - b.quantized.detach())
    torch.testing.assert_close(out.loss, a.loss + b.loss + c.loss)
    torch.testing.assert_close(out.quantized, spread + b.quantized.detach() + c.quantized.detach())
    # Straight through, once: the gradient of the output's sum is one per value, however many codebooks there are.
    torch.testing.assert_close(torch.autograd.grad(out.quantized.sum(), z, retain_graph=True)[0], torch.ones_like(z))
    out.loss.backward()
    assert all(level.codebook.grad is not None for level in (coarse, first, second))


@pytest.mark.parametrize("decay", [None, 0.8])
def test_levels_are_a_residual_quantizer(decay: float | None) -> None:
    """:class:`LevelsQuantizer` without a coarse codebook and heads, against the one for users."""
    torch.manual_seed(2)
    ours = LevelsQuantizer(5, 17, 3, decay=decay)
    theirs = ResidualVectorQuantizer(17, 5, 3, decay=decay)
    state = {name.replace("levels.", "layers.", 1): t.clone() for name, t in ours.state_dict().items()}
    theirs.load_state_dict(state)
    for _ in range(3):
        z = torch.randn(2, 5, 6, 7)
        a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
        mine, other = ours(a), theirs(b)
        assert torch.equal(mine.indices, other.indices)
        torch.testing.assert_close(mine.quantized, other.quantized)
        torch.testing.assert_close(mine.loss, other.loss)
        torch.testing.assert_close(mine.commitment_loss, other.commitment_loss.sum())
        (mine.loss + mine.quantized.square().sum()).backward()
        (other.loss + other.quantized.square().sum()).backward()
        torch.testing.assert_close(a.grad, b.grad)
        torch.testing.assert_close(ours.codes_to_output(mine.indices), theirs.codes_to_output(other.indices))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name.replace("layers.", "levels.", 1)], value, msg=name)


def test_levels_share_the_interface_of_one_codebook() -> None:
    vq = LevelsQuantizer(4, 16, 2, coarse_factor=2, decay=0.9, init="kmeans")
    z = torch.randn(2, 4, 8, 8)
    vq.initialize(z)
    vq.reset_usage()
    with vq.accumulating():
        vq(z[:1])
        vq(z[1:])
    assert [int(level.steps) for level in (vq.coarse, *vq.levels)] == [1, 1, 1]  # type: ignore[union-attr,arg-type]
    assert 0 < vq.usage() <= 1 < vq.perplexity() <= 16
    before = {k: v.clone() for k, v in vq.state_dict().items()}
    vq.freeze()
    vq(z)
    assert all(torch.equal(v, before[k]) for k, v in vq.state_dict().items())
    vq.unfreeze()
    vq(z)
    assert not torch.equal(vq.state_dict()["levels.1.codebook"], before["levels.1.codebook"])
    with pytest.raises(ValueError, match="h and w multiples of 2"):
        vq(torch.randn(1, 4, 3, 4))
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 2\), one per level and head"):
        vq.codes_to_output((torch.zeros(1, 2, 2).long(), torch.zeros(1, 4, 4, 3).long()))
