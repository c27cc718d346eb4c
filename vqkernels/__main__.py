"""``python -m vqkernels``: the command line, for when the ``vqkernels`` script is not on the path."""

from vqkernels.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
