"""``vqkernels bench``: run the benchmark suite of a source checkout.

Called by :mod:`vqkernels.cli`; every argument goes to ``benchmarks/run.py``, which the installed package does not ship.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import vqkernels

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``bench`` command."""
    parser = subparsers.add_parser(
        "bench", help="compare with other libraries (needs a source checkout)", add_help=False, allow_abbrev=False
    )
    parser.set_defaults(run=run, forward=True)


def checkout() -> Path | None:
    """The folder that holds ``benchmarks/run.py``: around the package, else the current one."""
    candidates = [*(Path(path).parent for path in vqkernels.__path__), Path.cwd()]
    return next((folder for folder in candidates if (folder / "benchmarks" / "run.py").is_file()), None)


def run(args: argparse.Namespace) -> int:
    """Hand over to ``benchmarks.run.main``.

    Raises:
        FileNotFoundError: there is no checkout around the package or in the current folder.
    """
    root = checkout()
    if root is None:
        raise FileNotFoundError(
            "benchmarks/run.py is part of the source checkout, not of the installed package; "
            "run this from the root of a clone, or `make bench` there"
        )
    sys.path.insert(0, str(root))
    return int(importlib.import_module("benchmarks.run").main(args.rest) or 0)
