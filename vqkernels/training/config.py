"""What a training run is: one flat, validated record, and the error type for everything a user can put right.

Filled by :mod:`vqkernels.cli.train`, stored as config.json in the run folder, read by the rest of the package.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from vqkernels.models import DiscriminatorConfig, VQGANConfig, VQGANLossConfig, VQVAE2Config, VQVAEConfig
from vqkernels.models.presets import PRESETS, ModelConfig, config_of
from vqkernels.training.recipes import recipe
from vqkernels.training.suggest import unknown_key

__all__ = ["FREE_ON_RESUME", "TrainConfig", "TrainingError", "require"]

PRECISIONS = ("fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "mps")
BACKENDS = ("auto", "native", "reference")
STAGES = ("joint", "vqvae")
# Fields that size the demo's VQ-VAE; a preset brings its own.
FLAT = (
    "codes", "dim", "downsample", "base_channels", "residual_blocks", "decay", "commitment", "metric", "heads",
    "gradient", "init", "dead_code_ratio",
)  # fmt: skip

# What a resumed run may change: none of it alters the data or the shapes of the model.
FREE_ON_RESUME = frozenset(
    {"output", "steps", "device", "backend", "threads", "tensorboard", "eval_every", "log_every", "checkpoint_every"}
    | {"workers"}
)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``, tables in tables merged.

    Example:
        >>> merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": 4}})
        {'a': {'b': 1, 'c': 4}, 'd': 3}
    """
    found = dict(base)
    for name, value in changes.items():
        old = found.get(name)
        found[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return found


class TrainingError(Exception):
    """Something the user can put right: shown as one line, without a traceback."""


def require(name: str, extra: str = "train") -> ModuleType:
    """Import an optional module.

    Args:
        name: dotted module name.
        extra: the extra of this package that installs it.

    Raises:
        TrainingError: it is not installed; the message says what to type.
    """
    try:
        return importlib.import_module(name)
    except ImportError as e:
        package = name.partition(".")[0]
        raise TrainingError(f"{package} is not installed: pip install 'vqkernels[{extra}]' ({e})") from e


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults are the demo: built-in photographs, a few minutes on two cores.

    Args:
        preset: a model of ``vqkernels.models.PRESETS``; None: the demo's VQ-VAE, sized by the fields below.
        stage: "joint", or "vqvae" for a VQGAN without its adversarial loss: the first stage of pretraining and
            fine-tuning.
        model_options: fields of the model's config to change.
        loss: fields of :class:`vqkernels.models.VQGANLossConfig`; None: mean squared error for a VQ-VAE, and for a
            VQGAN the losses of :attr:`loss_config`.
        discriminator: fields of :class:`vqkernels.models.DiscriminatorConfig`.
        discriminator_lr: its peak learning rate; None: half of ``lr``.
        init_from: folder of a saved model of the same sizes, or of a run, to start from.
        average: decay of a moving average of the weights, which is then evaluated and saved; None for none.
        accumulate: micro-batches per step; the codebook's statistics are pooled over them.
        clip: largest norm of the gradient, of the generator and the discriminator each; None does not clip.
        sizes: sides of crops, one of which is drawn for every step; None: always ``image_size``.
        data: folder of images, of parquet, arrow or WebDataset tar files, or one written by ``datasets.save_to_disk``;
            None: the photographs that ship with scikit-image and scikit-learn.
        column, split: of a data set: where its images are, and which part of it is used.
        streaming: read shards in pieces, each image once per epoch, instead of drawing images by number: for data sets
            too large to list.
        output: run folder.
        image_size: side of the training crops in pixels, a multiple of ``downsample``.
        resize: bring the shorter side of every image to this many pixels first; None keeps the pixels.
        held_out: share of the images that is kept for evaluation (a folder only; the photographs have a fixed split).
        shuffle_channels: share of the crops whose colour channels are permuted, so that a few photographs teach many
            hues; None: a quarter of the crops of the built-in photographs, none of a folder's.
        batch_size: crops per step, over all processes together.
        steps: optimiser steps.
        lr: peak learning rate: linear warm-up over the first 2 % of the steps, then a cosine to 5 %.
        seed: everything random follows from it.
        codes, dim, downsample, base_channels, residual_blocks: see :class:`vqkernels.models.VQVAEConfig`.
        decay: EMA decay of the codebook; None trains the codebook by gradient.
        commitment: weight of the commitment loss (beta).
        codebook_weight: weight of the quantizer's loss against the mean squared error of pixels in [0, 1].
        metric, heads, gradient, init, dead_code_ratio: see :class:`vqkernels.VectorQuantizer`.
        precision: "fp32", "bf16" or "fp16" (autocast; the quantizer stays in float32).
        device: "auto", "cpu", "cuda" or "mps".
        backend: "auto" or the vqkernels backend that must run.
        threads: CPU threads; None leaves torch's choice.
        workers: processes that load images; 0 loads in the training process.
        tensorboard: also write TensorBoard events.
        log_every, eval_every, checkpoint_every: in steps.

    Raises:
        TrainingError: a value is out of range.
    """

    preset: str | None = None
    stage: str = "joint"
    model_options: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] | None = None
    discriminator: dict[str, Any] = field(default_factory=dict)
    discriminator_lr: float | None = None
    init_from: str | None = None
    average: float | None = None
    accumulate: int = 1
    clip: float | None = None
    sizes: tuple[int, ...] | None = None
    data: str | None = None
    column: str = "image"
    split: str = "train"
    streaming: bool = False
    output: str = "runs/demo"
    image_size: int = 64
    resize: int | None = None
    held_out: float = 0.1
    shuffle_channels: float | None = None
    batch_size: int = 32
    steps: int = 800
    lr: float = 2e-3
    seed: int = 0
    codes: int = 512
    dim: int = 64
    downsample: int = 4
    base_channels: int = 32
    residual_blocks: int = 2
    decay: float | None = 0.95
    commitment: float = 0.25
    codebook_weight: float = 1.0
    metric: str = "l2"
    heads: int = 1
    gradient: str = "straight_through"
    init: str = "kmeans"
    dead_code_ratio: float = 0.05
    precision: str = "fp32"
    device: str = "auto"
    backend: str = "auto"
    threads: int | None = None
    workers: int = 0
    tensorboard: bool = False
    log_every: int = 10
    eval_every: int = 100
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        for name, least in (
            ("image_size", 32), ("batch_size", 1), ("steps", 1), ("seed", 0), ("heads", 1), ("workers", 0),
            ("accumulate", 1), ("log_every", 1), ("eval_every", 1), ("checkpoint_every", 1),
        ):  # fmt: skip
            self._check_number(name, int, least)
        for name in ("resize", "threads"):
            if getattr(self, name) is not None:
                self._check_number(name, int, 1)
        for name in ("discriminator_lr", "clip"):
            if getattr(self, name) is not None:
                self._check_number(name, float, 0.0)
        self._check_number("lr", float, 0.0)
        self._check_number("commitment", float, 0.0)
        self._check_number("codebook_weight", float, 0.0)
        self._check_number("dead_code_ratio", float, 0.0)
        if self.seed >= 2**63:
            raise TrainingError(f"seed is {self.seed}; expected less than 2^63")
        if not 0 < self.held_out < 1:
            raise TrainingError(f"held_out is {self.held_out!r}; expected a share between 0 and 1")
        if self.shuffle_channels is not None and not 0 <= self.shuffle_channels <= 1:
            raise TrainingError(f"shuffle_channels is {self.shuffle_channels!r}; expected a share between 0 and 1")
        if self.decay is not None and not 0 <= self.decay < 1:
            raise TrainingError(f"decay is {self.decay!r}; expected 0 <= decay < 1, or none for a gradient codebook")
        if self.average is not None and not 0 <= self.average < 1:
            raise TrainingError(f"average is {self.average!r}; expected 0 <= average < 1")
        if self.batch_size % self.accumulate:
            raise TrainingError(f"batch_size is {self.batch_size}; expected a multiple of accumulate={self.accumulate}")
        for name, choices in (
            ("precision", PRECISIONS), ("device", DEVICES), ("backend", BACKENDS), ("stage", STAGES),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise TrainingError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        self._check_sizes()
        if self.resize is not None and self.resize < self.largest:
            raise TrainingError(f"resize is {self.resize}; expected at least image_size={self.largest}")

    def _check_sizes(self) -> None:
        if self.sizes is not None:
            if not isinstance(self.sizes, (list, tuple)) or not self.sizes:
                raise TrainingError(f"sizes is {self.sizes!r}; expected a list of integers >= 32")
            object.__setattr__(self, "sizes", tuple(self.sizes))
        model, adversary = self.model, self.discriminator_config  # their own checks
        if isinstance(model, VQVAEConfig):
            multiple, name = model.downsample, "downsample"
        else:
            multiple = 2 * model.bottom_factor if isinstance(model, VQVAE2Config) else model.multiple
            name = "the model's multiple"
        least = 0 if adversary is None else 3 * 2 ** (adversary.layers + adversary.scales - 1)
        for what, size in [("image_size", self.image_size), *(("sizes", size) for size in self.sizes or ())]:
            if not isinstance(size, int) or isinstance(size, bool) or size < 32:
                raise TrainingError(f"{what} has {size!r}; expected integers >= 32")
            if size % multiple:
                raise TrainingError(f"{what} is {size}; expected a multiple of {name}={multiple}")
            if size < least:
                raise TrainingError(f"{what} is {size}; the discriminator needs at least {least} (or fewer layers)")

    def _check_number(self, name: str, kind: type, least: float) -> None:
        value = getattr(self, name)
        allowed = (int,) if kind is int else (int, float)
        # `not >=` also refuses NaN.
        if isinstance(value, bool) or not isinstance(value, allowed) or not value >= least:
            what = "an integer" if kind is int else "a number"
            raise TrainingError(f"{name} is {value!r}; expected {what} >= {least}")

    @property
    def shuffled_share(self) -> float:
        """``shuffle_channels`` with its default filled in."""
        if self.shuffle_channels is not None:
            return self.shuffle_channels
        return 0.25 if self.data is None else 0.0

    @property
    def largest(self) -> int:
        """Side of the largest crop."""
        return max(self.image_size, *(self.sizes or (0,)))

    @property
    def model(self) -> ModelConfig:
        """The model of this run."""
        if not isinstance(self.model_options, dict):
            raise TrainingError(f"model_options is {self.model_options!r}; expected a table of fields")
        try:
            if self.preset is not None:
                return self._preset(self.preset)
            config = self._flat()
            self._check_keys("model_options", self.model_options, VQVAEConfig)
            return VQVAEConfig.from_dict(config.to_dict() | self.model_options)
        except (ValueError, TypeError) as e:
            raise TrainingError(str(e)) from e

    def _preset(self, preset: str) -> ModelConfig:
        if preset not in PRESETS:
            raise TrainingError(str(unknown_key({preset: 0}, PRESETS)).replace("option", "preset"))
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in FLAT:
            if getattr(self, name) != defaults[name]:
                raise TrainingError(
                    f"{name} is {getattr(self, name)!r} beside preset {preset!r}; a preset has sizes of its own, "
                    f"change them with --set model_options.{name}=... or model_options.quantizer.{name}=..."
                )
        self._check_keys("model_options", self.model_options, type(PRESETS[preset]))
        changes = dict(self.model_options)
        if isinstance(changes.get("quantizer"), dict):  # some of its options
            changes["quantizer"] = merged(PRESETS[preset].quantizer, changes["quantizer"])
        return config_of(preset, **changes)

    @staticmethod
    def _check_keys(name: str, values: dict[str, Any], known: type[Any]) -> None:
        if wrong := unknown_key(values, known, name):
            raise TrainingError(wrong)

    def _flat(self) -> VQVAEConfig:
        quantizer: dict[str, Any] = {
            "commitment_cost": self.commitment,
            "decay": self.decay,
            "metric": self.metric,
            "heads": self.heads,
            "gradient": self.gradient,
            "init": self.init,
            "dead_code_ratio": self.dead_code_ratio,
        }
        return VQVAEConfig(
            base_channels=self.base_channels,
            residual_blocks=self.residual_blocks,
            residual_channels=self.base_channels,
            downsample=self.downsample,
            codes=self.codes,
            dim=self.dim,
            quantizer=quantizer,
        )

    @property
    def loss_config(self) -> VQGANLossConfig | None:
        """The loss of this run; None for the demo's mean squared error.

        A VQGAN's discriminator starts after a third of the steps (at once after ``init_from``), and its weight grows
        over the next tenth.
        """
        is_gan = isinstance(self.model, VQGANConfig)
        if self.loss is None and not is_gan:
            return None
        values: dict[str, Any] = {"codebook_weight": self.codebook_weight}
        if is_gan:
            start = 0 if self.init_from is not None else self.steps // 3
            values |= {"discriminator_start": start, "discriminator_ramp": self.steps // 10, "adversarial_weight": 0.8}
        if self.loss is not None:
            if not isinstance(self.loss, dict):
                raise TrainingError(f"loss is {self.loss!r}; expected a table of fields")
            self._check_keys("loss", self.loss, VQGANLossConfig)
            values |= self.loss
        if self.stage == "vqvae":
            values["adversarial_weight"] = 0.0
        try:
            return VQGANLossConfig.from_dict(values)
        except (ValueError, TypeError) as e:
            raise TrainingError(f"loss: {e}") from e

    @property
    def discriminator_config(self) -> DiscriminatorConfig | None:
        """The discriminator of this run; None without an adversarial loss."""
        loss = self.loss_config
        if not isinstance(self.discriminator, dict):
            raise TrainingError(f"discriminator is {self.discriminator!r}; expected a table of fields")
        self._check_keys("discriminator", self.discriminator, DiscriminatorConfig)
        if loss is None or loss.adversarial_weight == 0:
            return None
        # The demo's model is small; a preset's recipe has a discriminator of its own.
        values: dict[str, Any] = {"channels": 32, "layers": 2} if self.preset is None else {}
        try:
            return DiscriminatorConfig.from_dict(values | self.discriminator)
        except (ValueError, TypeError) as e:
            raise TrainingError(f"discriminator: {e}") from e

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values

    @classmethod
    def from_preset(cls, preset: str | None = None, **changes: Any) -> TrainConfig:
        """The recipe of a preset (:mod:`vqkernels.training.recipes`), with some fields changed.

        Args:
            preset: a name of ``vqkernels.models.PRESETS``, or None for the demo.
            changes: fields; tables (``loss``, ``model_options``, ...) are merged key by key.

        Raises:
            TrainingError: a name is unknown, or a value is out of range.

        Example:
            >>> config = TrainConfig.from_preset("llamagen-vq16", loss={"lecam": 0.1})
            >>> config.batch_size, config.loss["adversarial_weight"], config.loss["lecam"]
            (128, 0.5, 0.1)
        """
        return cls.from_dict(merged({"preset": preset, **recipe(preset)}, changes))

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> TrainConfig:
        """The reverse of :meth:`to_dict`.

        Raises:
            TrainingError: a name is unknown, or a value is out of range.
        """
        if not isinstance(values, dict):
            raise TrainingError(f"{source} is not a training config: it is no table of options")
        if wrong := unknown_key(values, cls):
            raise TrainingError(f"{source} is not a training config: {wrong}")
        return cls(**values)
