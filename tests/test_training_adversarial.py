"""Training against a discriminator: two players, and every option with an effect that can be seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_vqgan
import torch
from small_vqgan import MODEL, quiet, same, started, tensors, without_timing

from vqkernels.models import load_model
from vqkernels.training import TrainConfig, TrainingError, loop, steps, train
from vqkernels.training.checkpoint import load_checkpoint

# Fixtures, the last one for every test here.
photos, config, quick = small_vqgan.photos, small_vqgan.config, small_vqgan.one_thread_no_plots


# The two players


def test_the_discriminator_joins_when_it_is_due(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    result = train(config, say=quiet)
    lines = result["history"]["train"]
    assert ["discriminator" in line for line in lines] == [False, False, True, True, True, True, True]
    assert all(math.isfinite(line["adversarial"]) and line["adaptive_weight"] > 0 for line in lines[2:])
    assert all({"l1", "l2", "perceptual", "quantizer"} <= line.keys() for line in lines)
    fresh = started(replace(config, output=config.output + "0"), monkeypatch).stepper.critic.state_dict()
    early = replace(config, output=config.output + "2", steps=2)
    train(early, say=quiet)
    assert same(tensors(early, "discriminator."), fresh)
    assert not any(name.startswith("discriminator_optimizer.") for name in tensors(early))
    assert not same(tensors(config, "discriminator."), fresh)
    assert any(name.startswith("discriminator_optimizer.exp_avg") for name in tensors(config))


def test_each_player_moves_only_itself(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run = started(replace(config, loss={"discriminator_start": 0, "r1": 1.0, "lecam": 0.1}), monkeypatch)
    stepper, before = run.stepper, {}
    images = torch.rand(4, 3, 32, 32)

    def remember(*_: Any) -> None:
        before["generator"] = {n: t.clone() for n, t in stepper.model.state_dict().items()}
        before["critic"] = {n: t.clone() for n, t in stepper.critic.state_dict().items()}

    fresh = {n: t.clone() for n, t in stepper.critic.state_dict().items()}
    original: Callable[..., Any] = stepper._after

    def after(seen: Any, step: int) -> Any:
        remember()
        return original(seen, step)

    monkeypatch.setattr(stepper, "_after", after)
    terms, _ = stepper.run(images, 0)
    assert same(before["critic"], fresh)  # the generator's step left it alone
    assert same(before["generator"], dict(stepper.model.state_dict()))  # and the other way round
    assert not same(before["critic"], dict(stepper.critic.state_dict()))
    assert {"r1", "lecam", "discriminator"} <= terms.keys()


def test_the_generator_learns_to_please_the_discriminator(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing but the adversarial loss, a fixed discriminator: its opinion of the reconstructions must rise.
    loss = {"l1": 0.0, "perceptual": "none", "codebook_weight": 0.0, "adaptive": False, "discriminator_start": 0}
    run = started(replace(config, loss=loss, steps=100, lr=1e-3, discriminator_lr=0.0), monkeypatch)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    opinions = [float(run.stepper.run(images, step)[0]["logits_fake"]) for step in range(12)]
    assert opinions[-1] > opinions[0] + 0.05


# Options of a step


def test_micro_batches_add_up_to_the_batch(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**MODEL, "quantizer": {"init": "normal", "dead_code_ratio": 0.0, "decay": 0.9}}
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for accumulate in (1, 2):
        changed = replace(
            config, stage="vqvae", accumulate=accumulate, model_options=options, output=f"{config.output}{accumulate}"
        )
        run = started(changed, monkeypatch)
        terms, counts = run.stepper.run(images, 0)
        gradients = {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}
        found.append((terms, counts[0], gradients, dict(run.model.quantizer.state_dict())))
    (terms, counts, gradients, codebook), (terms2, counts2, gradients2, codebook2) = found
    assert torch.equal(counts, counts2)
    for whole, parts in ((terms, terms2), (gradients, gradients2), (codebook, codebook2)):
        assert whole.keys() == parts.keys()
        for name, value in whole.items():
            torch.testing.assert_close(
                parts[name], value, rtol=1e-4, atol=1e-6, msg=lambda t, name=name: f"{name}: {t}"
            )


def test_clipping_bounds_the_gradient(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: dict[str, float] = {}
    for name, clip in (("free", None), ("bound", 1e-3)):
        run = started(
            replace(config, clip=clip, output=config.output + name, loss={"discriminator_start": 0}), monkeypatch
        )
        run.stepper.run(torch.rand(4, 3, 32, 32), 0)
        for player, module in (("generator", run.stepper.model), ("critic", run.stepper.critic)):
            grads = [p.grad.norm() for p in module.parameters() if p.grad is not None]
            norms[f"{name} {player}"] = float(torch.stack(grads).norm())
    for player in ("generator", "critic"):
        assert norms[f"free {player}"] > 2e-3
        assert norms[f"bound {player}"] == pytest.approx(1e-3, rel=1e-2)


def test_the_moving_average_is_what_is_saved(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, average=0.5, steps=4, checkpoint_every=1)
    seen: list[torch.Tensor] = []
    original = steps.PlainStep.run

    def wrapped(self: Any, images: torch.Tensor, step: int) -> Any:
        found = original(self, images, step)
        seen.append(self.model.decoder.conv_out.weight.detach().clone())
        return found

    monkeypatch.setattr(steps.PlainStep, "run", wrapped)
    train(config, say=quiet)
    expected = seen[0]
    for weight in seen[1:]:
        expected = 0.5 * expected + 0.5 * weight
    saved = load_model(Path(config.output) / "model").state_dict()
    torch.testing.assert_close(saved["decoder.conv_out.weight"], expected)
    assert not torch.equal(saved["decoder.conv_out.weight"], seen[-1])
    own = tensors(config, "model.")
    assert torch.equal(own["decoder.conv_out.weight"], seen[-1])
    # An EMA codebook is an average already: indices must fit it.
    assert torch.equal(saved["quantizer.codebook"], own["quantizer.codebook"])


def test_sizes_are_drawn_per_step(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    original = loop._Run._step

    def wrapped(self: Any, batch: torch.Tensor) -> None:
        seen.append(tuple(batch.shape))
        original(self, batch)

    monkeypatch.setattr(loop._Run, "_step", wrapped)
    train(replace(config, sizes=(32, 40, 48), steps=12, eval_every=12, checkpoint_every=12), say=quiet)
    assert {shape[0] for shape in seen} == {4}
    assert all(shape[2] == shape[3] for shape in seen)
    assert {shape[2] for shape in seen} == {32, 40, 48}


# Stages


def test_pretraining_then_fine_tuning(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = replace(config, stage="vqvae", output=config.output + "1")
    train(first, say=quiet)
    assert not any(name.startswith("discriminator") for name in tensors(first))
    second = replace(config, init_from=first.output, loss=None, output=config.output + "2")
    assert second.loss_config is not None
    assert second.loss_config.discriminator_start == 0  # at once
    run = started(second, monkeypatch)
    assert same(dict(run.model.state_dict()), tensors(first, "model."))
    train(second, overwrite=True, say=quiet)
    assert "discriminator" in without_timing(second)["history"]["train"][0]
    # Interrupted before its first checkpoint, it starts from there again.
    (Path(second.output) / "checkpoint.safetensors").unlink()
    with monkeypatch.context() as patch:
        held: list[Any] = []
        patch.setattr(loop._Run, "train", lambda self, _: held.append(self) or {})  # type: ignore[func-returns-value]
        train(second, resume=True, say=quiet)
    assert same(dict(held[0].model.state_dict()), tensors(first, "model."))


def test_a_model_that_does_not_fit_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    other = replace(config, output=str(tmp_path / "other"), model_options={**MODEL, "codes": 12}, steps=1)
    train(other, say=quiet)
    vqvae = TrainConfig(data=config.data, output=str(tmp_path / "vqvae"), image_size=32, batch_size=2, steps=1,
                        codes=13, dim=6, base_channels=8, device="cpu", held_out=0.3)  # fmt: skip
    train(vqvae, say=quiet)
    for folder, words in (
        (other.output, r"codebook is \(12, 6\) float32, expected \(13, 6\)"),
        (vqvae.output, "holds a VQVAE, this run trains a VQGAN"),
        (str(tmp_path / "none"), "init_from: .*none"),
    ):
        with pytest.raises(TrainingError, match=words):
            train(replace(config, init_from=folder), say=quiet)
    assert not Path(config.output).exists()


# What a run says


def test_the_best_model_is_kept(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([10.0, 12.0, 11.0])
    original = loop.metrics.evaluate

    def scored(*arguments: Any) -> dict[str, Any]:
        return original(*arguments) | {"psnr": next(scores), "sharpness": 1.0}

    monkeypatch.setattr(loop.metrics, "evaluate", scored)
    halves = []
    for steps_, name in ((4, "a"), (6, "b")):
        scores = iter([10.0, 12.0, 11.0])
        each = replace(config, steps=steps_, eval_every=2, checkpoint_every=2, output=config.output + name,
                       lr=config.lr, loss={"discriminator_start": 2})  # fmt: skip
        halves.append((each, train(each, say=quiet)))
    best = halves[1][1]["best"]
    assert (best["step"], best["score"]) == (4, 12.0)
    folder = Path(halves[1][0].output)
    a, b = (load_model(folder / name).state_dict() for name in ("best", "model"))
    assert not same(a, b)


def test_a_loss_that_is_not_finite_never_reaches_a_checkpoint(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, log_every=100, eval_every=100, checkpoint_every=2)
    original = loop._Run._step

    def wrapped(self: Any, batch: torch.Tensor) -> None:
        original(self, batch)
        if self.step == 3:
            self.model.decoder.conv_out.bias.data.fill_(float("nan"))

    monkeypatch.setattr(loop._Run, "_step", wrapped)
    with pytest.raises(TrainingError, match=r"not finite at step 4: .* is from before"):
        train(config, say=quiet)
    found = tensors(config)
    assert all(t.isfinite().all() for t in found.values() if t.is_floating_point())
    assert load_checkpoint(Path(config.output) / "checkpoint.safetensors")[1]["step"] == 2


def test_warnings_reach_the_user_and_the_record(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    usage = iter([0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05])
    original = loop.metrics.Window.take
    monkeypatch.setattr(loop.metrics.Window, "take", lambda self: original(self) | {"usage": next(usage)})
    result = train(config, say=quiet)
    assert [(w["kind"], w["step"]) for w in result["warnings"]] == [("collapse", 6)]
    assert "step 6: warning: codebook usage has fallen from 90% to 10%" in capfd.readouterr().err
