"""vector-quantize-pytorch's own test-suite with every quantizer patched right after construction, and without.

The suite is in that project's repository, not in its packages, so this takes the path of a checkout; the library
under test is the installed one. Run ``python -m benchmarks.upstream_suite CHECKOUT``. This module is
also the pytest plugin that does the patching.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_CLASSES = ("VectorQuantize", "SimVQ")  # all others are built on these
_PATCHING = "VQKERNELS_UPSTREAM_SUITE_PATCHED"
_patched: Counter[str] = Counter()


def pytest_runtest_setup(item: Any) -> None:
    """The suite draws without a seed, and some of its tests fail now and then: both runs draw the same."""
    import torch

    torch.manual_seed(0)


def pytest_configure(config: Any) -> None:
    """Make the constructors patch what they made."""
    if os.environ.get(_PATCHING) != "1":
        return
    import vector_quantize_pytorch as library

    import vqkernels

    def patching(original: Any) -> Any:
        @functools.wraps(original)
        def construct(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            report = vqkernels.patch(self, strict=True)
            _patched.update(r.adapter for r in report.replaced)

        return construct

    for name in _CLASSES:
        cls = getattr(library, name)
        cls.__init__ = patching(cls.__init__)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"patched instances: {json.dumps(dict(_patched))}")


def outcomes(tests: Path, patched: bool) -> dict[str, Any]:
    """Test id -> outcome of one run, and how many instances were patched."""
    plugins = ["-p", "no:cacheprovider", "-p", "benchmarks.upstream_suite"]
    command = [sys.executable, "-m", "pytest", "-rA", "-q", "--tb=short", *plugins, str(tests.resolve())]
    environment = os.environ | {"PYTHONPATH": str(ROOT), _PATCHING: str(int(patched))}
    with tempfile.TemporaryDirectory() as folder:  # not in the checkout: its package would hide the installed one
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    found = {
        test: outcome
        for outcome, test in re.findall(r"^(PASSED|FAILED|ERROR|XFAIL) \S*?(test_\S+\.py(?:::\S+)?)", run.stdout, re.M)
    }
    instances = re.search(r"^patched instances: (.*)$", run.stdout, re.M)
    if not found:
        raise RuntimeError(f"no test ran:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return {"outcomes": found, "instances": json.loads(instances[1]) if instances else {}, "log": run.stdout}


def compare(checkout: Path) -> dict[str, Any]:
    """Both runs, and the tests whose outcome differs."""
    plain, patched = (outcomes(checkout / "tests", on) for on in (False, True))
    differ = {
        test: [plain["outcomes"].get(test), patched["outcomes"].get(test)]
        for test in plain["outcomes"] | patched["outcomes"]
        if plain["outcomes"].get(test) != patched["outcomes"].get(test)
    }
    return {
        "library": importlib.metadata.version("vector-quantize-pytorch"),
        "tests_of": _version(checkout),
        "unpatched": dict(Counter(plain["outcomes"].values())),
        "patched": dict(Counter(patched["outcomes"].values())),
        "patched_instances": patched["instances"],
        "failed_in_both": sorted(
            t for t, outcome in plain["outcomes"].items() if outcome != "PASSED" and t not in differ
        ),
        "different": differ,
    }


def _version(checkout: Path) -> str:
    found = re.search(r'^version = "(.*)"', (checkout / "pyproject.toml").read_text(), re.M)
    return found[1] if found else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="a checkout of lucidrains/vector-quantize-pytorch")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    arguments = parser.parse_args()
    result = compare(arguments.checkout)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    sys.exit(any(before == "PASSED" for before, _ in result["different"].values()))


if __name__ == "__main__":
    main()
