"""``vqkernels evaluate``: measure saved models on images and write an HTML report.

Called by :mod:`vqkernels.cli`; the work is in :mod:`vqkernels.training.evaluate`.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLES = """\
examples:
  vqkernels evaluate runs/demo                                    on the built-in photographs
  vqkernels evaluate runs/a runs/b --images photos --size 256     two models side by side, on your images
  vqkernels evaluate runs/seed0 runs/seed1 runs/seed2             spread over seeds
  vqkernels evaluate runs/demo --images data --column jpg --limit 1000

report.html opens offline; report.json beside it holds every number, image by image. The same call goes on after Ctrl-C.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``evaluate`` command."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure models on images, write an HTML report",
        description="Reconstruction, rate, use of the codebook, diversity, stability and speed of saved models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run folders of vqkernels train, or saved models")
    parser.add_argument(
        "--images", metavar="FOLDER", help="images, or a data set on disk (default: built-in photographs)"
    )
    parser.add_argument("--output", default="report", metavar="FOLDER", help="for the report (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, metavar="N", help="scale the shorter side to N and cut out the middle square"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most N images, spread evenly (default: all)")
    parser.add_argument("--column", default="image", metavar="NAME", help="of a data set (default: %(default)s)")
    parser.add_argument("--split", default="train", metavar="NAME", help="of a data set (default: %(default)s)")
    parser.add_argument("--inception", metavar="FILE", help="Inception weights on this machine, for rFID")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="images measured side by side (default: torch's threads)"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate.

    Raises:
        ValueError: something the user can put right.
    """
    from vqkernels.training.config import TrainingError
    from vqkernels.training.evaluate import EvaluateConfig, evaluate

    names = EvaluateConfig.__dataclass_fields__
    options = {k: v for k, v in vars(args).items() if k in names} | {"models": tuple(args.models)}
    try:
        evaluate(EvaluateConfig(**options))
    except TrainingError as e:
        raise ValueError(str(e)) from e
    return 0
