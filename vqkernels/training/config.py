"""What a training run is: one flat, validated record, and the error type for everything a user can put right.

Filled by :mod:`vqkernels.cli.train`, stored as config.json in the run folder, read by the rest of the package.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from vqkernels.models import VQVAEConfig

__all__ = ["FREE_ON_RESUME", "TrainConfig", "TrainingError", "require"]

PRECISIONS = ("fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "mps")
BACKENDS = ("auto", "native", "reference")

# What a resumed run may change: none of it alters the data or the shapes of the model.
FREE_ON_RESUME = frozenset(
    {"output", "steps", "device", "backend", "threads", "tensorboard", "eval_every", "log_every", "checkpoint_every"}
    | {"workers"}
)


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
        data: folder of images, or None for the photographs that ship with scikit-image and scikit-learn.
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

    data: str | None = None
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
            ("log_every", 1), ("eval_every", 1), ("checkpoint_every", 1),
        ):  # fmt: skip
            self._check_number(name, int, least)
        for name in ("resize", "threads"):
            if getattr(self, name) is not None:
                self._check_number(name, int, 1)
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
        for name, choices in (("precision", PRECISIONS), ("device", DEVICES), ("backend", BACKENDS)):
            if getattr(self, name) not in choices:
                raise TrainingError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        model = self.model  # its own checks
        if self.image_size % model.downsample:
            raise TrainingError(f"image_size is {self.image_size}; expected a multiple of downsample={self.downsample}")
        if self.resize is not None and self.resize < self.image_size:
            raise TrainingError(f"resize is {self.resize}; expected at least image_size={self.image_size}")

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
    def model(self) -> VQVAEConfig:
        """The model of this run."""
        quantizer: dict[str, Any] = {
            "commitment_cost": self.commitment,
            "decay": self.decay,
            "metric": self.metric,
            "heads": self.heads,
            "gradient": self.gradient,
            "init": self.init,
            "dead_code_ratio": self.dead_code_ratio,
        }
        try:
            return VQVAEConfig(
                base_channels=self.base_channels,
                residual_blocks=self.residual_blocks,
                residual_channels=self.base_channels,
                downsample=self.downsample,
                codes=self.codes,
                dim=self.dim,
                quantizer=quantizer,
            )
        except ValueError as e:
            raise TrainingError(str(e)) from e

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> TrainConfig:
        """The reverse of :meth:`to_dict`.

        Raises:
            TrainingError: a name is unknown, or a value is out of range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(values, dict) or (unknown := sorted(values.keys() - known)):
            what = f"unknown option {unknown[0]!r}" if isinstance(values, dict) else "it is no table of options"
            raise TrainingError(f"{source} is not a training config: {what}")
        return cls(**values)
