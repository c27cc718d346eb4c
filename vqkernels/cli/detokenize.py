"""``vqkernels detokenize``: token shards back to images.

Called by :mod:`vqkernels.cli`; the work is in :mod:`vqkernels.training.detokenize`.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLES = """\
examples:
  vqkernels detokenize tokens --model runs/demo --output restored
  torchrun --nproc-per-node 4 -m vqkernels detokenize tokens --model runs/demo --output restored

Images that are in the output folder already are kept: the same call goes on after an interruption. A damaged shard is
named and left out.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``detokenize`` command."""
    parser = subparsers.add_parser(
        "detokenize",
        help="token shards back to images",
        description="Decode the shards that vqkernels tokenize wrote, after checking them against their manifest.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("tokens", metavar="TOKENS", help="folder with manifest.json")
    parser.add_argument("--model", required=True, metavar="MODEL", help="the model that made the tokens")
    parser.add_argument("--output", default="restored", metavar="FOLDER", help="for the PNGs (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="images decoded side by side (default: torch's threads)"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Decode.

    Returns:
        0, or 1 if damaged shards were left out.

    Raises:
        ValueError: something the user can put right.
    """
    from vqkernels.training.config import TrainingError
    from vqkernels.training.detokenize import detokenize

    try:
        found = detokenize(args.tokens, args.model, args.output, device=args.device, workers=args.workers)
    except TrainingError as e:
        raise ValueError(str(e)) from e
    return 1 if found["damaged"] else 0
