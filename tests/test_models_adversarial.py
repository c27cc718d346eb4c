"""Discriminators, adversarial losses, the adaptive weight, LeCam and R1: values, and gradients where they belong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from vqkernels.models import DiscriminatorConfig, MultiScaleDiscriminator, PatchGANDiscriminator, build_discriminator
from vqkernels.models.adversarial import (
    KINDS,
    LeCam,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)
from vqkernels.models.loss import without_gradient


def test_values_of_the_losses() -> None:
    real, fake = torch.tensor([2.0, -0.5]), torch.tensor([-3.0, 0.5])
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    assert discriminator_loss("hinge", real, fake).item() == pytest.approx(0.5 * (1.5 / 2 + 1.5 / 2))
    logistic = 0.5 * ((softplus(-2.0) + softplus(0.5)) / 2 + (softplus(-3.0) + softplus(0.5)) / 2)
    for kind in ("vanilla", "non_saturating"):
        assert discriminator_loss(kind, real, fake).item() == pytest.approx(logistic)
    assert generator_loss("hinge", fake).item() == generator_loss("vanilla", fake).item() == pytest.approx(1.25)
    assert generator_loss("non_saturating", fake).item() == pytest.approx((softplus(3.0) + softplus(-0.5)) / 2)
    with pytest.raises(ValueError, match="kind is 'wasserstein'; expected one of hinge, vanilla, non_saturating"):
        generator_loss("wasserstein", fake)


def test_scales_count_equally_whatever_their_size() -> None:
    large, small = torch.full((1, 1, 8, 8), 3.0), torch.full((1, 1, 2, 2), -1.0)
    assert generator_loss("hinge", (large, small)).item() == -1.0
    assert discriminator_loss("hinge", (large, small), (small, large)).item() == pytest.approx(0.5 * (2 / 2 + 4 / 2))


@pytest.mark.parametrize("kind", KINDS)
def test_generator_and_discriminator_pull_in_opposite_directions(kind: str) -> None:
    fake = torch.tensor([0.3], requires_grad=True)
    up = torch.autograd.grad(generator_loss(kind, fake), fake)[0]
    down = torch.autograd.grad(discriminator_loss(kind, torch.zeros(1), fake), fake)[0]
    assert up.item() < 0 < down.item()


def test_adaptive_weight_is_the_ratio_of_numeric_gradients() -> None:
    layer = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x, target = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)

    def losses(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = x @ w.T
        return (out - target).square().mean(), generator_loss("non_saturating", out.sum(1)).double()

    def numeric(which: int) -> float:
        total, eps = 0.0, 1e-4
        for i in range(layer.numel()):
            step = torch.zeros(layer.numel(), dtype=torch.float64)
            step[i] = eps
            with torch.no_grad():
                high, low = (losses(layer + s * step.view_as(layer))[which].item() for s in (1, -1))
            total += ((high - low) / (2 * eps)) ** 2
        return math.sqrt(total)

    assert torch.autograd.gradcheck(lambda w: losses(w)[0], layer)
    weight = adaptive_weight(*losses(layer), layer)
    # The adversarial loss is computed in float32, so its differences have some 4 digits.
    assert weight.item() == pytest.approx(numeric(0) / (numeric(1) + 1e-4), rel=2e-2)
    assert not weight.requires_grad
    assert adaptive_weight(*losses(layer), layer, most=0.1).item() == pytest.approx(0.1)


def test_adaptive_weight_is_finite_when_the_adversarial_gradient_vanishes() -> None:
    layer = torch.ones(2, requires_grad=True)
    weight = adaptive_weight(layer.sum(), (layer * 0).sum(), layer)
    assert weight.item() == pytest.approx(math.sqrt(2) / 1e-4 if math.sqrt(2) / 1e-4 < 1e4 else 1e4)


def test_r1_of_a_linear_discriminator_is_the_norm_of_its_weights() -> None:
    images = torch.randn(4, 3, 2, 2, requires_grad=True)
    w = torch.randn(3, 2, 2, requires_grad=True)
    logits = (images * w).sum((1, 2, 3))[:, None]
    penalty = r1_penalty(logits, images)
    torch.testing.assert_close(penalty, w.square().sum())
    torch.testing.assert_close(torch.autograd.grad(penalty, w)[0], 2 * w)


@pytest.mark.parametrize("config", [{"attention": True}, {"scales": 2}, {"norm": "spectral"}, {"norm": "none"}])
def test_r1_is_differentiable_through_every_discriminator(config: dict[str, Any]) -> None:
    critic = build_discriminator(channels=4, layers=2, **config)
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    penalty = r1_penalty(critic(images), images)
    penalty.backward()  # type: ignore[no-untyped-call]
    assert penalty.item() > 0
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in critic.parameters())


def test_lecam_follows_the_logits_and_penalises_distance() -> None:
    lecam = LeCam(decay=0.9)
    lecam.update(torch.tensor([2.0]), torch.tensor([-1.0]))
    assert (lecam.real.item(), lecam.fake.item()) == (2.0, -1.0)
    lecam.update((torch.tensor([4.0]), torch.tensor([2.0])), torch.tensor([-1.0]))
    assert lecam.real.item() == pytest.approx(0.9 * 2 + 0.1 * 3)
    lecam.real.fill_(2.0)
    # (1.5 - (-1))^2 + (2 - 0.5)^2; logits on the right side of the averages cost nothing.
    assert lecam(torch.tensor([1.5]), torch.tensor([0.5])).item() == pytest.approx(6.25 + 2.25)
    assert lecam(torch.tensor([-2.0]), torch.tensor([3.0])).item() == 0.0
    assert {"real", "fake", "started"} == set(lecam.state_dict())


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_discriminator_sees_patches(layers: int) -> None:
    critic = PatchGANDiscriminator(DiscriminatorConfig(channels=4, layers=layers, norm="none"))
    least = critic.least_size
    assert critic(torch.rand(1, 3, least, least)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=f"expected sides of at least {least}"):
        critic(torch.rand(1, 3, least - 1, least))
    images = torch.rand(1, 3, 96, 96, requires_grad=True)
    logits = critic(images)
    middle = logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2]
    seen = torch.autograd.grad(middle, images)[0].abs().sum((0, 1)) > 0
    field = {1: 16, 2: 34, 3: 70}[layers]  # Isola et al. 2017, section 6.2
    assert (int(seen.any(1).sum()), int(seen.any(0).sum())) == (field, field)


def test_every_scale_sees_the_image_at_half_the_side() -> None:
    critic = MultiScaleDiscriminator(DiscriminatorConfig(channels=4, layers=2, scales=3, norm="none"))
    images = torch.rand(2, 3, 64, 64)
    logits = critic(images)
    assert [s.shape[-1] for s in logits] == [14, 6, 2]
    torch.testing.assert_close(logits[2], critic.scales[2](nn.functional.avg_pool2d(images, 4)))
    with pytest.raises(ValueError, match="expected sides of at least 48"):
        critic(torch.rand(1, 3, 40, 64))


def test_coarse_scales_see_further_than_the_fine_one() -> None:
    critic = MultiScaleDiscriminator(DiscriminatorConfig(channels=4, layers=1, scales=2, norm="none"))
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    fields = []
    for logits in critic(images):
        middle = logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2]
        seen = torch.autograd.grad(middle, images, retain_graph=True)[0].abs().sum((0, 1)) > 0
        fields.append(int(seen.any(1).sum()))
    assert fields == [16, 32]


def test_attention_lets_every_patch_see_the_whole_image() -> None:
    def seen(attention: bool) -> int:
        critic = PatchGANDiscriminator(DiscriminatorConfig(channels=4, layers=1, norm="none", attention=attention))
        images = torch.rand(1, 3, 48, 48, requires_grad=True)
        return int((torch.autograd.grad(critic(images)[0, 0, 0, 0], images)[0].abs().sum((0, 1)) > 0).sum())

    assert seen(False) < 16 * 16
    assert seen(True) > 0.9 * 48 * 48


def test_spectral_norm_bounds_every_convolution() -> None:
    critic = PatchGANDiscriminator(DiscriminatorConfig(channels=8, layers=2, norm="spectral"))
    for _ in range(30):
        critic(torch.rand(1, 3, 32, 32))
    critic.eval()
    for layer in critic.main:
        if isinstance(layer, nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(("norm", "kind"), [("group", nn.GroupNorm), ("batch", nn.BatchNorm2d), ("none", None)])
def test_norms(norm: str, kind: Any) -> None:
    critic = PatchGANDiscriminator(DiscriminatorConfig(channels=8, layers=2, norm=norm))
    found = {type(m) for m in critic.main if isinstance(m, (nn.GroupNorm, nn.BatchNorm2d))}
    assert found == ({kind} if kind else set())
    # Without batch statistics the logits of an image do not depend on its neighbours.
    images = torch.rand(3, 3, 32, 32)
    alone = torch.allclose(critic(images)[:1], critic(images[:1]), atol=1e-5)
    assert alone == (norm != "batch")


def test_discriminators_are_saved_and_loaded(tmp_path: Any) -> None:
    pytest.importorskip("safetensors")
    for scales in (1, 2):
        critic = build_discriminator(channels=4, layers=2, scales=scales, norm="spectral").eval()
        critic.save_pretrained(tmp_path / str(scales))
        loaded = type(critic).from_pretrained(tmp_path / str(scales))
        images = torch.rand(1, 3, 32, 32)
        assert all(torch.equal(a, b) for a, b in zip(critic(images), loaded(images), strict=True))
    with pytest.raises(ValueError, match="norm is 'layer'"):
        build_discriminator(norm="layer")
    with pytest.raises(ValueError, match="scales is 2"):
        PatchGANDiscriminator(DiscriminatorConfig(scales=2))


def test_parameters_are_left_alone_and_given_back() -> None:
    critic = build_discriminator(channels=4, layers=1)
    frozen = next(iter(critic.parameters()))
    frozen.requires_grad_(False)
    images = torch.rand(1, 3, 16, 16, requires_grad=True)
    with without_gradient(critic):
        loss = generator_loss("hinge", critic(images))
    loss.backward()  # type: ignore[no-untyped-call]
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None for p in critic.parameters())
    assert [p.requires_grad for p in critic.parameters()] == [p is not frozen for p in critic.parameters()]
