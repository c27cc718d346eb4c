"""``vqkernels tokenize``: a folder of images or a data set to token shards.

Called by :mod:`vqkernels.cli`; the work is in :mod:`vqkernels.training.tokenize`.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLES = """\
examples:
  vqkernels tokenize runs/demo --images photos --output tokens          a folder; call again to go on after Ctrl-C
  vqkernels tokenize runs/demo --output tokens                          the built-in photographs
  vqkernels tokenize runs/demo --images photos --size 256 --output t    every image scaled and cut to 256 x 256
  vqkernels tokenize runs/demo --images data --column jpg --format parquet --output t
  torchrun --nproc-per-node 4 -m vqkernels tokenize runs/demo --images photos --output tokens

The tokens do not depend on --batch-size, --workers or the number of processes: the files are the same, byte for byte.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``tokenize`` command."""
    parser = subparsers.add_parser(
        "tokenize",
        help="images to token shards",
        description="Turn images into shards of tokens, with a manifest of checksums. The search is exact.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="run folder of vqkernels train, or a saved model")
    parser.add_argument(
        "--images", metavar="FOLDER", help="images, or a data set on disk (default: built-in photographs)"
    )
    parser.add_argument("--output", default="tokens", metavar="FOLDER", help="for the shards (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, metavar="N", help="scale the shorter side to N and cut out the middle square"
    )
    parser.add_argument("--column", default="image", metavar="NAME", help="of a data set (default: %(default)s)")
    parser.add_argument("--split", default="train", metavar="NAME", help="of a data set (default: %(default)s)")
    parser.add_argument(
        "--shard-size", type=int, default=1024, metavar="N", help="images per shard (default: %(default)s)"
    )
    parser.add_argument("--format", default="safetensors", metavar="NAME", help="safetensors or parquet")
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="images read ahead (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="images encoded side by side (default: torch's threads)"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tokenise.

    Raises:
        ValueError: something the user can put right.
    """
    from vqkernels.training.config import TrainingError
    from vqkernels.training.tokenize import TokenizeConfig, tokenize

    names = TokenizeConfig.__dataclass_fields__
    try:
        tokenize(TokenizeConfig(**{k: v for k, v in vars(args).items() if k in names}))
    except TrainingError as e:
        raise ValueError(str(e)) from e
    return 0
