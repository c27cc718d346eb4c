"""``vqkernels train``: train a VQ-VAE or VQGAN on built-in photographs or on a folder of images.

Called by :mod:`vqkernels.cli`; parses options into a :class:`vqkernels.training.TrainConfig` and hands over.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLES = """\
examples:
  vqkernels train                                     the demo: photographs that ship with scikit-image, a few minutes
  vqkernels train --data photos --output runs/photos  your own images; damaged files are reported and skipped
  vqkernels train --output runs/photos --resume       go on after Ctrl-C; the result is that of an uninterrupted run
  vqkernels train --downsample 8 --codes 1024 --steps 4000 --output runs/f8
  vqkernels train --preset tiny-vqgan --output runs/gan  adversarial training, discriminator included
  vqkernels train --preset tiny-vqgan --stage vqvae --output runs/first     pretraining without it, and then:
  vqkernels train --preset tiny-vqgan --init-from runs/first --output runs/second
  vqkernels train --config my.yaml --set loss.l1=0.5 --set model_options.codes=1024
  accelerate launch --num_processes 2 -m vqkernels train --data photos --output runs/photos
"""


def _decay(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


_decay.__name__ = "number or none"


def _sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


_sizes.__name__ = "integers with commas between"

METAVARS: dict[object, str] = {
    int: "N",
    float: "X",
    str: "NAME",
    _decay: "X",
    _sizes: "N,N",
    "init-from": "FOLDER",
    "data": "FOLDER",
    "output": "FOLDER",
}

# Option, type, help: the field of TrainConfig has the option's name. Defaults are read from there.
Option = tuple[str, Callable[[str], Any], str]
GROUPS: tuple[tuple[str, tuple[Option, ...]], ...] = (
    (
        "data",
        (
            ("data", str, "folder of images, or of parquet, arrow or tar shards (default: built-in photographs)"),
            ("column", str, "of a data set, with the images"),
            ("split", str, "of a data set"),
            ("image-size", int, "side of the training crops in pixels"),
            ("resize", int, "first bring the shorter side of every image to this (default: keep the pixels)"),
            ("held-out", float, "share of the images in --data kept for evaluation"),
            ("shuffle-channels", float, "share of crops with permuted colours (default: 0.25, with --data 0)"),
            ("sizes", _sizes, "sides of training crops, one drawn per step, like 48,64,96 (default: image-size)"),
            ("workers", int, "processes that load images; 0: none besides the training process"),
        ),
    ),
    (
        "training",
        (
            ("batch-size", int, "crops per step, over all processes together"),
            ("steps", int, "optimiser steps"),
            ("lr", float, "peak learning rate"),
            ("accumulate", int, "micro-batches per step"),
            ("clip", float, "largest norm of the gradient (default: no limit)"),
            ("average", float, "decay of a moving average of the weights, evaluated and saved (default: none)"),
            ("init-from", str, "start from this saved model, or from the model in this run folder"),
            ("discriminator-lr", float, "peak learning rate of the discriminator (default: half of lr)"),
            ("seed", int, "same seed, same machine, same numbers"),
            ("precision", str, "fp32, bf16 or fp16"),
            ("device", str, "auto, cpu, cuda or mps"),
            ("backend", str, "vqkernels backend: auto, native or reference"),
            ("threads", int, "CPU threads (default: torch's choice)"),
        ),
    ),
    (
        "model",
        (
            ("preset", str, "a model of vqkernels.models.PRESETS (default: the VQ-VAE of the options below)"),
            ("stage", str, "joint, or vqvae: a VQGAN without its discriminator"),
            ("downsample", int, "pixels per code along each side: 2, 4, 8 or 16"),
            ("codes", int, "number of codes"),
            ("dim", int, "length of a code"),
            ("base-channels", int, "width after the first halving"),
            ("residual-blocks", int, "in the encoder and again in the decoder"),
        ),
    ),
    (
        "codebook",
        (
            ("decay", _decay, "EMA decay; none trains the codebook by gradient"),
            ("commitment", float, "weight of the commitment loss"),
            ("codebook-weight", float, "weight of the quantizer's loss against the pixels' mean squared error"),
            ("metric", str, "l2, cosine or dot"),
            ("heads", int, "independent codebooks, each with its own channels"),
            ("gradient", str, "straight_through, rotation or none"),
            ("init", str, "kmeans, uniform or normal"),
            ("dead-code-ratio", float, "replace codes used less than this share of the average; 0: never"),
        ),
    ),
    (
        "output",
        (
            ("output", str, "run folder"),
            ("log-every", int, "steps between points of the curves"),
            ("eval-every", int, "steps between evaluations of the held-out images"),
            ("checkpoint-every", int, "steps between checkpoints"),
        ),
    ),
)


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``train`` command."""
    from vqkernels.training.config import TrainConfig

    parser = subparsers.add_parser(
        "train",
        help="train a VQ-VAE or VQGAN on photographs",
        description="Train a tokeniser. Without any option: on photographs that ship inside packages.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    defaults = TrainConfig()
    files = parser.add_argument_group("configuration")
    files.add_argument("--config", metavar="FILE", help="YAML with options by name (image_size: 64); flags win over it")
    files.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], dest="settings",
        help="set one option, also inside model_options, loss and discriminator: --set loss.l1=0.5",
    )  # fmt: skip
    for title, options in GROUPS:
        group = parser.add_argument_group(title)
        for name, kind, text in options:
            default = getattr(defaults, name.replace("-", "_"))
            shown = text if default is None else f"{text} (default: {default})"
            # No default here: --resume must know which options were given.
            group.add_argument(
                f"--{name}",
                type=kind,
                help=shown,
                metavar=METAVARS.get(name, METAVARS[kind]),
                default=argparse.SUPPRESS,
            )
        if title == "data":
            group.add_argument(
                "--streaming", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                help="read shards in pieces, each image once per epoch: for data sets too large to list",
            )  # fmt: skip
        if title == "codebook":
            group.add_argument(
                "--gradient-codebook", dest="decay", action="store_const", const=None, default=argparse.SUPPRESS,
                help="the same as --decay none",
            )  # fmt: skip
        if title == "output":
            group.add_argument(
                "--tensorboard", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                help="also write TensorBoard events",
            )  # fmt: skip
            how = group.add_mutually_exclusive_group()
            how.add_argument("--resume", action="store_true", help="go on from the checkpoint in the run folder")
            how.add_argument("--overwrite", action="store_true", help="replace the run in the run folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train; one line on stderr for what the user can put right.

    Returns:
        0; 2 after an error that was explained; 130 after Ctrl-C with a checkpoint saved.
    """
    from vqkernels import Unsupported
    from vqkernels.training import TrainConfig, TrainingError, train
    from vqkernels.training.loop import Interrupted
    from vqkernels.training.run_folder import RunFolder
    from vqkernels.training.yaml_config import merge_options

    names = {name.replace("-", "_") for _, options in GROUPS for name, _, _ in options} | {"tensorboard", "streaming"}
    given = {name: value for name, value in vars(args).items() if name in names}
    try:
        if args.resume:
            output = given.get("output", TrainConfig().output)
            old = RunFolder(output).read_config().to_dict()
            values = merge_options(old, args.config, args.settings, given | {"output": output})
        else:
            values = merge_options({}, args.config, args.settings, given)
        config = TrainConfig.from_dict(values)
        train(config, resume=args.resume, overwrite=args.overwrite, say=lambda line: print(line, flush=True))
    except (TrainingError, Unsupported) as e:
        if getattr(args, "debug", False):
            raise
        return _fail(str(e), 2)
    except Interrupted as e:
        return _fail(str(e), 130)
    return 0


def _fail(reason: str, status: int) -> int:
    # With several processes they all fail alike: the first one speaks.
    if os.environ.get("RANK", "0") == "0":
        kind = "" if status == 130 else "error: "
        print(f"vqkernels train: {kind}{' '.join(reason.split())}", file=sys.stderr)
    return status
