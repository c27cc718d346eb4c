"""The losses together: reconstruction, perceptual terms, the two steps, averaged weights, and two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.photographs import crops
from vqkernels.models import (
    LPIPS,
    VQGAN,
    LaplacianPyramidLoss,
    VQGANConfig,
    VQGANLoss,
    VQGANLossConfig,
    average_of,
    averaged,
    build_discriminator,
    find_lpips,
)
from vqkernels.models.perceptual import _layers
from vqkernels.models.reconstruction import ms_ssim_loss


def small() -> VQGAN:
    return VQGAN(
        VQGANConfig(
            channels=8, multipliers=(1, 2), blocks=1, attention_factors=(), middle_attention=False, z_channels=8,
            codes=16, dim=4, quantizer={"decay": 0.9}, norm_groups=4,
        )
    )  # fmt: skip


def blurred(images: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(nn.functional.pad(images, (2, 2, 2, 2), mode="reflect"), 5, stride=1)


def with_error_of(images: Tensor, other: Tensor, change: Tensor) -> Tensor:
    """``images`` plus ``change``, scaled to the squared error of ``other``."""
    return images + change * ((other - images).square().mean() / change.square().mean()).sqrt()


def test_ms_ssim_is_zero_for_equal_images_and_sees_structure() -> None:
    pytest.importorskip("torchmetrics")
    images = crops(2, 64)
    assert ms_ssim_loss(images, images).item() == pytest.approx(0, abs=1e-5)
    blur = blurred(images)
    shifted = with_error_of(images, blur, torch.ones_like(images))
    assert ms_ssim_loss(images, blur) > 2 * ms_ssim_loss(images, shifted) > 0
    reconstruction = torch.rand(1, 3, 16, 16, requires_grad=True)
    loss = ms_ssim_loss(1 - reconstruction.detach(), reconstruction)  # negative similarity
    loss.backward()  # type: ignore[no-untyped-call]
    assert reconstruction.grad is not None
    assert reconstruction.grad.isfinite().all()
    with pytest.raises(ValueError, match="MS-SSIM expects sides of at least 11"):
        ms_ssim_loss(images[..., :8, :8], images[..., :8, :8])


def test_laplacian_pyramid_asks_for_edges_more_than_for_brightness() -> None:
    loss, images = LaplacianPyramidLoss(), crops(4, 64)
    assert loss(images, images).item() == 0
    blur = blurred(images)
    shifted = with_error_of(images, blur, torch.ones_like(images))
    l1_ratio = ((blur - images).abs().mean() / (shifted - images).abs().mean()).item()
    assert (loss(images, blur) / loss(images, shifted)).item() > 1.2 * l1_ratio
    # One level is plain L1; small images have fewer levels.
    torch.testing.assert_close(LaplacianPyramidLoss(1)(images, blur), (blur - images).abs().mean())
    assert loss(images[..., :5, :3], blur[..., :5, :3]).isfinite()
    x, y = (torch.rand(1, 2, 13, 9, dtype=torch.float64) for _ in range(2))
    assert loss(x, y) == loss(y, x) > 0


def test_lpips_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("VQKERNELS_LPIPS", str(tmp_path / "weights"))
    found = find_lpips("vgg")
    assert isinstance(found, str)
    assert "vgg16-*.pth" in found
    assert "VQKERNELS_LPIPS" in found
    with pytest.raises(FileNotFoundError, match="LPIPS is not available: torchvision's weights"):
        VQGANLoss(VQGANLossConfig(perceptual="lpips"))
    with pytest.raises(ValueError, match="net is 'squeeze'"):
        find_lpips("squeeze")


def test_lpips_with_random_weights_follows_its_formula(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VQKERNELS_LPIPS", str(tmp_path))
    features = _layers("alex")
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()}, tmp_path / "alexnet-0.pth")
    widths = (64, 192, 384, 256, 256)
    linear = {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1) for i, w in enumerate(widths)}
    torch.save(linear, tmp_path / "alex.pth")
    loss = LPIPS("alex")
    images, other = torch.rand(2, 1, 3, 64, 64)
    other.requires_grad_(True)
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    want, a, b = torch.zeros(()), (images * 2 - 1 - shift) / scale, (other * 2 - 1 - shift) / scale
    tap = 0
    for layer in features:
        a, b = layer(a), layer(b)
        if isinstance(layer, nn.ReLU):
            unit = [x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt() for x in (a, b)]
            want = want + nn.functional.conv2d((unit[0] - unit[1]).square(), linear[f"lin{tap}.model.1.weight"]).mean()
            tap += 1
    torch.testing.assert_close(loss(images, other), want)
    assert loss(images, images).item() == 0
    assert torch.autograd.grad(loss(images, other), other)[0].abs().sum() > 0
    assert not any(p.requires_grad for p in loss.parameters())
    assert not loss.train().training
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "alexnet-0.pth")
    with pytest.raises(ValueError, match="does not hold the weights of LPIPS"):
        LPIPS("alex")


def test_total_is_the_weighted_sum_of_the_terms() -> None:
    pytest.importorskip("torchmetrics")
    torch.manual_seed(0)
    model, critic = small(), build_discriminator(channels=4, layers=1)
    config = VQGANLossConfig(
        l1=0.5, l2=2.0, ms_ssim=0.3, perceptual_weight=0.7, codebook_weight=1.5, adversarial_weight=0.8,
        discriminator_start=3, r1=10.0, lecam=0.1,
    )  # fmt: skip
    loss, images = VQGANLoss(config), crops(2, 32)
    output = model(images)
    before = loss.generator(images, output, None, model.last_layer, step=2)
    t = before.terms
    reconstruction = 0.5 * t["l1"] + 2 * t["l2"] + 0.3 * t["ms_ssim"] + 0.7 * t["perceptual"]
    torch.testing.assert_close(t["reconstruction"], reconstruction)
    torch.testing.assert_close(before.total.detach(), reconstruction + 1.5 * t["quantizer"])
    assert "adversarial" not in t
    with pytest.raises(ValueError, match="discriminator is None; expected one from step 3 on"):
        loss.generator(images, output, None, model.last_layer, step=3)
    after = loss.generator(images, output, critic, model.last_layer, step=3)
    t = after.terms
    torch.testing.assert_close(t["total"], before.terms["total"] + 0.8 * t["adaptive_weight"] * t["adversarial"])
    d = loss.discriminator(images, output.reconstruction, critic, step=3)
    torch.testing.assert_close(d.total.detach(), d.terms["discriminator"] + 5 * d.terms["r1"] + 0.1 * d.terms["lecam"])
    assert all(v.dim() == 0 and not v.requires_grad for v in (after.terms | d.terms).values())


def test_the_adaptive_weight_balances_the_two_gradients_at_the_last_layer() -> None:
    torch.manual_seed(0)
    # In evaluation mode, or the codebook would move between the two forward passes.
    model, critic, images = small().eval(), build_discriminator(channels=4, layers=1), crops(2, 32)
    norms = {}
    for weight in (0.0, 1.0):
        loss = VQGANLoss(VQGANLossConfig(adversarial_weight=weight, codebook_weight=0.0))
        total = loss.generator(images, model(images), critic, model.last_layer, step=0).total
        norms[weight] = torch.autograd.grad(total, model.last_layer)[0]
    first, second = norms[0.0], norms[1.0] - norms[0.0]
    assert second.norm().item() == pytest.approx(first.norm().item(), rel=0.02)


def test_each_step_has_gradients_for_its_own_parameters_only() -> None:
    model, critic, loss, images = small(), build_discriminator(channels=4, layers=1), VQGANLoss(), crops(2, 32)
    output = model(images)
    loss.generator(images, output, critic, model.last_layer, step=0).total.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())
    model.zero_grad()
    loss.discriminator(images, output.reconstruction, critic, step=0).total.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in critic.parameters())


def test_before_its_start_the_discriminator_learns_nothing() -> None:
    critic, loss = (
        build_discriminator(channels=4, layers=1),
        VQGANLoss(VQGANLossConfig(discriminator_start=5, lecam=1.0)),
    )
    images = crops(2, 32)
    terms = loss.discriminator(images, 1 - images, critic, step=4)
    terms.total.backward()  # type: ignore[no-untyped-call]
    assert terms.terms["total"] == 0 < terms.terms["discriminator"]
    # Zero, not absent: with several processes every parameter must take part.
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in critic.parameters())
    assert loss.lecam is not None
    assert not loss.lecam.started


def test_a_discriminator_learns_to_tell_and_the_generator_gets_sharper_images_from_it() -> None:
    torch.manual_seed(0)
    critic, loss, images = build_discriminator(channels=8, layers=2, scales=2), VQGANLoss(), crops(8, 32)
    optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3, betas=(0.5, 0.9))
    losses = []
    for _ in range(30):
        terms = loss.discriminator(images, blurred(images), critic, step=0)
        optimizer.zero_grad()
        terms.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(terms.terms["discriminator"].item())
    assert losses[-1] < 0.6 * losses[0]
    # Following the generator's gradient from the blurred images raises what the blur took away: local contrast.
    fake = blurred(images).requires_grad_(True)
    logits = critic(fake)
    grad = torch.autograd.grad(-torch.stack([s.mean() for s in logits]).mean(), fake)[0]
    moved = fake.detach() - 0.02 * grad / grad.abs().mean()

    def detail(x: Tensor) -> float:
        return float((x - blurred(x)).square().mean())

    assert detail(moved) > detail(fake.detach())


def test_evaluation_has_terms_without_gradients() -> None:
    model, critic, loss, images = small().eval(), build_discriminator(channels=4, layers=1), VQGANLoss(), crops(1, 32)
    with torch.no_grad():
        terms = loss.generator(images, model(images), critic, model.last_layer, step=0)
    assert terms.terms["adaptive_weight"] == 1
    assert not terms.total.requires_grad


def test_half_precision_inputs_are_compared_in_float32() -> None:
    loss, images = VQGANLoss(), crops(1, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = loss.reconstruction(images, blurred(images).bfloat16())
    assert {t.dtype for t in terms.terms.values()} == {torch.float32}


def test_averaged_weights_follow_the_formula_and_copy_the_codebook() -> None:
    model = small()
    average = averaged(model, 0.9)
    want = None
    for _ in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
            model.train()(torch.rand(1, 3, 8, 8))
        average.update_parameters(model)
        weight = model.last_layer.detach().clone()
        want = weight if want is None else 0.9 * want + 0.1 * weight
    torch.testing.assert_close(average.module.last_layer.detach(), want)
    assert torch.equal(average.module.quantizer.codebook, model.quantizer.codebook)  # type: ignore[arg-type]
    own = {k: v.clone() for k, v in model.state_dict().items()}
    with average_of(model, average):
        torch.testing.assert_close(model.last_layer.detach(), want)
    assert all(torch.equal(v, own[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"l1": -1.0}, "l1 is -1.0"),
        ({"r1": float("nan")}, "r1 is nan"),
        ({"perceptual": "vgg"}, "perceptual is 'vgg'"),
        ({"adversarial": "wgan"}, "adversarial is 'wgan'"),
        ({"discriminator_start": -1}, "discriminator_start is -1"),
        ({"lecam_decay": 1.5}, "lecam_decay is 1.5"),
    ],
)
def test_bad_options_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as e:
        VQGANLossConfig(**changes)
    assert words in str(e.value)


STEPS = 6


def gan_steps(model: nn.Module, critic: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """The loop that a trainer writes; plain modules or their DistributedDataParallel."""
    inner: Any = getattr(model, "module", model)
    plain = getattr(critic, "module", critic)
    loss = VQGANLoss(VQGANLossConfig(discriminator_start=2, r1=0.5, lecam=0.1))
    first = torch.optim.SGD(model.parameters(), lr=0.05)
    second = torch.optim.SGD(critic.parameters(), lr=0.05)
    for step, images in enumerate(batches):
        output = model(images)
        first.zero_grad()
        loss.generator(images, output, plain, inner.last_layer, step).total.backward()  # type: ignore[no-untyped-call]
        first.step()
        second.zero_grad()
        loss.discriminator(images, output.reconstruction, critic, step).total.backward()  # type: ignore[no-untyped-call]
        second.step()
    state = {f"model.{k}": v.clone() for k, v in inner.state_dict().items()}
    return state | {f"critic.{k}": v.clone() for k, v in plain.state_dict().items()}


def make() -> tuple[VQGAN, nn.Module, list[Tensor]]:
    torch.manual_seed(5)
    return (
        small(),
        build_discriminator(channels=4, layers=2, scales=2),
        [torch.rand(4, 3, 32, 32) for _ in range(STEPS)],
    )


def work(rank: int, file: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model, critic, batches = make()
    parts = [b[rank * 2 : rank * 2 + 2] for b in batches]
    state = gan_steps(DistributedDataParallel(model), DistributedDataParallel(critic), parts)
    if rank == 0:
        torch.save(state, results)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one_on_the_joined_batch(tmp_path: Path) -> None:
    results = tmp_path / "state.pt"
    mp.start_processes(work, args=(str(tmp_path / "store"), str(results)), nprocs=2, start_method="forkserver")  # type: ignore[no-untyped-call]
    got = torch.load(results)
    want = gan_steps(*make())
    start = make()
    assert not torch.equal(want["model.decoder.conv_out.weight"], start[0].decoder.conv_out.weight)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
