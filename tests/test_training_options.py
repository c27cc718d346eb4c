"""Options of a run: presets and recipes, YAML and --set, what is refused and with which words; early warnings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vqkernels.cli import main
from vqkernels.models import VQGANConfig, VQVAE2Config, build_model
from vqkernels.models.presets import PRESETS
from vqkernels.training import TrainConfig, TrainingError, train
from vqkernels.training.watch import warnings_of
from vqkernels.training.yaml_config import merge_options

# Presets and recipes


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_config_that_trains(preset: str) -> None:
    config = TrainConfig.from_preset(preset)
    assert type(config.model) is type(PRESETS[preset])
    assert (config.discriminator_config is not None) == isinstance(config.model, VQGANConfig)
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config


def test_recipes_are_the_published_ones() -> None:
    f16 = TrainConfig.from_preset("vqgan-f16")
    assert f16.loss_config is not None
    assert (f16.loss_config.discriminator_start, f16.loss_config.adversarial_weight, f16.lr) == (250_001, 0.8, 5.4e-5)
    llama = TrainConfig.from_preset("llamagen-vq16")
    assert llama.loss_config is not None
    assert (llama.loss_config.l1, llama.loss_config.l2, llama.loss_config.adaptive) == (0.0, 1.0, False)
    assert (llama.batch_size, llama.precision, llama.clip) == (128, "bf16", 1.0)


def test_changes_to_a_preset_reach_the_model_and_keep_the_rest() -> None:
    config = TrainConfig.from_preset("tiny-vqgan", model_options={"codes": 99, "quantizer": {"heads": 2}})
    assert isinstance(config.model, VQGANConfig)
    assert config.model.codes == 99
    assert config.model.quantizer["heads"] == 2
    assert config.model.quantizer["init"] == "kmeans"  # the preset's
    assert config.model.quantizer["decay"] == 0.95  # the recipe's
    flat = TrainConfig(model_options={"max_channels": 48})
    assert flat.model.max_channels == 48  # type: ignore[union-attr]
    assert flat.model.codes == 512


def test_the_discriminator_starts_by_the_length_of_the_run_and_at_once_after_pretraining() -> None:
    starts = [
        TrainConfig.from_preset("tiny-vqgan", steps=900, init_from=source).loss_config
        for source in (None, "runs/first")
    ]
    assert [s.discriminator_start for s in starts if s is not None] == [300, 0]
    stage = TrainConfig.from_preset("tiny-vqgan", stage="vqvae")
    assert stage.loss_config is not None
    assert stage.loss_config.adversarial_weight == 0
    assert stage.discriminator_config is None


def test_a_vqvae_may_have_a_discriminator_too() -> None:
    config = TrainConfig(loss={"adversarial_weight": 0.1}, discriminator={"scales": 2, "norm": "spectral"})
    assert config.discriminator_config is not None
    assert (config.discriminator_config.scales, config.discriminator_config.norm) == (2, "spectral")
    assert TrainConfig().loss_config is None
    two_level = TrainConfig(preset="vqvae2-256", image_size=64, loss={"ms_ssim": 0.0, "l1": 1.0})
    assert isinstance(two_level.model, VQVAE2Config)
    assert two_level.discriminator_config is not None  # a loss of its own brings the defaults of VQGANLossConfig


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preset": "tiny-vqgam"}, "unknown preset 'tiny-vqgam'; did you mean 'tiny-vqgan'"),
        ({"preset": "tiny", "codes": 9}, "codes is 9 beside preset 'tiny'; .*--set model_options.codes"),
        ({"model_options": {"cods": 9}}, r"unknown option 'model_options.cods'; did you mean 'model_options.codes'"),
        ({"model_options": 3}, "model_options is 3; expected a table"),
        ({"loss": {"l3": 1}}, "unknown option 'loss.l3'; did you mean 'loss.l2'"),
        ({"loss": {"l1": -1.0}}, "loss: l1 is -1.0"),
        ({"loss": 1}, "loss is 1; expected a table"),
        ({"discriminator": {"layer": 1}}, "did you mean 'discriminator.layers'"),
        ({"discriminator": {"norm": "layer"}, "loss": {}}, "discriminator: norm is 'layer'"),
        ({"stage": "second"}, "stage is 'second'; expected one of joint, vqvae"),
        ({"average": 1.0}, "average is 1.0; expected 0 <= average < 1"),
        ({"accumulate": 5}, "batch_size is 32; expected a multiple of accumulate=5"),
        ({"accumulate": 0}, "accumulate is 0; expected an integer >= 1"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"sizes": []}, "sizes is .*; expected a list"),
        ({"sizes": [64, 30]}, "sizes has 30; expected integers >= 32"),
        ({"sizes": [64, 34]}, "sizes is 34; expected a multiple of downsample=4"),
        ({"sizes": [64, 128], "resize": 100}, "resize is 100; expected at least image_size=128"),
        ({"preset": "tiny-vqgan", "image_size": 32, "discriminator": {"layers": 4}}, "discriminator needs at least 48"),
        ({"preset": "vqvae2-256", "image_size": 60}, "expected a multiple of the model's multiple=8"),
        ({"discriminator_lr": "fast"}, "discriminator_lr is 'fast'; expected a number"),
    ],
)  # fmt: skip
def test_what_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        TrainConfig.from_dict(changes)


# YAML and --set


def test_flags_win_over_set_over_file_over_recipe(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(
        "preset: llamagen-vq16\nsteps: 10\nlr: 1e-3\nseed: 4\nloss:\n  l2: 2.0\n  lecam: ${seed}\n"
        "model_options:\n  codes: 64\n"
    )
    values = merge_options({}, str(file), ["lr=2e-3", "loss.lecam=0.5", "sizes=[64,96]", "average=null"], {"steps": 7})
    config = TrainConfig.from_dict(values)
    assert (config.steps, config.lr, config.seed, config.sizes, config.average) == (7, 2e-3, 4, (64, 96), None)
    assert config.loss == {
        "l1": 0.0, "l2": 2.0, "adaptive": False, "adversarial_weight": 0.5, "discriminator_start": 20_000,
        "discriminator_ramp": 0, "lecam": 0.5,
    }  # fmt: skip
    assert config.model.codes == 64
    assert merge_options({}, str(file), [], {})["loss"]["lecam"] == 4  # a reference


def test_the_file_in_the_documentation_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    file = tmp_path / "my.yaml"
    file.write_text(text.partition("```yaml")[2].partition("```")[0])
    config = TrainConfig.from_dict(merge_options({}, str(file), ["loss.lecam=0.1"], {"steps": 20_000}))
    assert (config.accumulate, config.steps, config.sizes) == (4, 20_000, (192, 256, 320))
    assert config.loss_config is not None
    assert config.discriminator_config is not None
    assert (config.loss_config.lecam, config.loss_config.perceptual) == (0.1, "lpips")
    assert build_model(config.model, channels=32).bits_per_pixel == 2 * 13 / 64


def test_a_resumed_run_keeps_its_options_and_takes_new_ones(tmp_path: Path) -> None:
    base = TrainConfig.from_preset("vqvae-cifar", lr=1e-3).to_dict()
    values = merge_options(base, None, ["steps=60000"], {"output": "elsewhere"})
    assert (values["lr"], values["steps"], values["output"]) == (1e-3, 60_000, "elsewhere")


def test_the_config_of_a_run_is_a_config_file(tmp_path: Path) -> None:
    config = TrainConfig.from_preset("tiny-vqgan", sizes=(64, 96))
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"format": "vqkernels-train-1", **config.to_dict()}))
    assert TrainConfig.from_dict(merge_options({}, str(file), [], {})) == config


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        ("stepz: 3", [], "config .*my.yaml: unknown option 'stepz'; did you mean 'steps'"),
        ("[1, 2]", [], "is no table of options"),
        ("a: [", [], "cannot be read"),
        (None, [], "there is no config .*my.yaml"),
        ("steps: 3", ["stepz=3"], "--set: unknown option 'stepz'; did you mean 'steps'"),
        ("steps: 3", ["steps"], "--set steps: expected NAME=VALUE"),
        ("steps: ${nothing}", [], "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str | None, settings: list[str], words: str) -> None:
    file = tmp_path / "my.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(TrainingError, match=words):
        merge_options({}, str(file), settings, {})


def test_command_line_refuses_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (("--preset", "big"), "unknown preset 'big'"),
        (("--set", "loss.l9=1"), "unknown option 'loss.l9'; did you mean 'loss.l2'"),
        (("--config", str(tmp_path / "none.yaml")), "there is no config"),
        (("--init-from", str(tmp_path / "none"), "--steps", "1"), "init_from"),
        (("--streaming",), "the built-in photographs are no stream"),
    ):
        assert main(["train", "--output", str(tmp_path / "run"), *arguments]) == 2
        errors = capfd.readouterr().err
        assert (errors.count("\n"), words in errors) == (1, True), errors
        assert not (tmp_path / "run").exists()


def test_sharded_parameters_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.FSDP))
    with pytest.raises(TrainingError, match="configured for FSDP, which is not supported"):
        train(TrainConfig(output=str(tmp_path / "run"), device="cpu"), say=lambda line: None)
    assert not (tmp_path / "run").exists()


# Early warnings


def lines(usage: list[float], reconstruction: list[float] | None = None) -> list[dict[str, float]]:
    losses = reconstruction or [1.0] * len(usage)
    return [{"step": i, "usage": u, "reconstruction": r} for i, (u, r) in enumerate(zip(usage, losses, strict=True))]


def test_a_codebook_that_collapses_is_told_of_once() -> None:
    history = lines([0.9, 0.6, 0.4, 0.3, 0.19, 0.1, 0.05])
    found: list[dict[str, Any]] = []
    for n in range(1, len(history) + 1):
        found += warnings_of(history[:n], found)
    assert [(w["kind"], w["step"]) for w in found] == [("collapse", 4)]
    assert "from 90% to 19%" in found[0]["message"]


@pytest.mark.parametrize(
    "usage",
    [
        [0.9, 0.6, 0.4, 0.3, 0.25],  # low, not that low
        [0.1, 0.1, 0.1, 0.1, 0.1, 0.1],  # always was low
        [0.9, 0.1, 0.12, 0.15, 0.18, 0.19],  # recovering
        [0.9, 0.5, 0.1, 0.05],  # too few points
    ],
)
def test_a_codebook_that_does_not_collapse(usage: list[float]) -> None:
    assert warnings_of(lines(usage)) == []


def test_a_loss_that_grows_is_told_of() -> None:
    grown = lines([0.5] * 9, [1.0, 0.5, 0.2, 0.3, 0.7, 0.8, 0.9, 1.0, 1.4])
    assert [(w["kind"], w["step"]) for w in warnings_of(grown)] == [("divergence", 8)]
    assert "7.0 times its least" in warnings_of(grown)[0]["message"]
    assert warnings_of(grown[:8]) == []
    assert warnings_of(lines([0.5] * 8, [1.0, 0.2, 0.9, 0.9, 0.3, 0.9, 0.9, 0.9])) == []  # a spike or two
