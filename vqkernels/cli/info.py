"""``vqkernels info``: print what runs where.

Called by :mod:`vqkernels.cli`.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from vqkernels.info import info, self_test

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``info`` command."""
    parser = subparsers.add_parser("info", help="versions, instruction sets, and every op x backend with the reason")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="measure how the tensor cores add, for each configuration",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print :func:`vqkernels.info`."""
    if args.self_test:
        self_test()
    found = info()
    print(json.dumps(found.to_dict(), indent=2) if args.json else found)
    return 0
