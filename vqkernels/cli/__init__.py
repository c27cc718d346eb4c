"""The ``vqkernels`` command: one module per subcommand, found by its file name.

Called by the ``vqkernels`` script and ``python -m vqkernels``. A module here offers ``add_parser(subparsers)``, which
sets ``run=callable(args) -> int``; it imports nothing heavy at its top, so that ``vqkernels info`` needs no extras.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import pkgutil
import sys
from collections.abc import Sequence

from vqkernels.dispatch import Unsupported
from vqkernels.info import version

__all__ = ["main"]

EXAMPLES = """\
examples:
  vqkernels info                  what runs where, and why not: versions, instruction sets, every op x backend
  vqkernels train                 train a small VQ-VAE on photographs that ship with scikit-image and scikit-learn
  vqkernels train --data FOLDER   the same on your images
  vqkernels evaluate runs/demo    measure what was trained: one HTML page
  vqkernels tokenize runs/demo    images to tokens, and with detokenize back
  vqkernels tune                  measure launch configurations of the Triton kernels on this GPU
  vqkernels bench                 compare with other libraries (from a source checkout)
"""

# What brings the modules that a command imports.
EXTRAS = {"bench": "bench", "tune": "triton"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vqkernels",
        description="Exact, fused vector quantization for PyTorch.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"vqkernels {version()}")
    parser.add_argument("--debug", action="store_true", help="show the Python traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        importlib.import_module(f"{__name__}.{module.name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments, ``sys.argv[1:]`` by default.

    Returns:
        The exit status: 0 for success, 2 for an error that was explained on stderr, 130 after Ctrl-C, 141 where nobody
        reads the output any more (``| head``).

    Raises:
        SystemExit: unknown command or option (status 2), ``--help`` and ``--version`` (status 0).

    Example:
        >>> from vqkernels.cli import main
        >>> main(["info"])  # doctest: +ELLIPSIS
        vqkernels ...
        0
    """
    _mend_streams()
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # A command that sets `forward` hands what it does not know to another parser.
    if rest and not hasattr(args, "forward"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command is None:
        parser.print_help()
        return 0
    args.rest = rest
    try:
        status = int(args.run(args))
        print(end="", flush=True)
        return status
    except KeyboardInterrupt:
        print(f"vqkernels {args.command}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as e:
        if args.debug or (e.name or "").partition(".")[0] == "vqkernels":
            raise
        reason = f"{e.name} is not installed; try: pip install 'vqkernels[{EXTRAS.get(args.command, 'train')}]'"
    except (OSError, ValueError, Unsupported) as e:
        if isinstance(e, BrokenPipeError) and _reader_left():
            return 141
        if args.debug:
            raise
        reason = str(e)
    with contextlib.suppress(OSError):  # stderr is full, too
        print(f"vqkernels {args.command}: error: {' '.join(reason.split())}", file=sys.stderr)
    return 2


def _mend_streams() -> None:
    """Streams that take whatever is said: closed ones lead nowhere, and what an encoding lacks is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _reader_left() -> bool:
    """Whether nobody reads stdout any more; it then leads nowhere, or Python would complain when it flushes at exit."""
    try:
        print(flush=True)  # of nothing at all, a pipe would not notice
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
