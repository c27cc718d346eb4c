"""The examples of docs/drop-in.md run as they stand there."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import vector_quantize_pytorch as library

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "drop-in.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(2))
def test_example_runs(number: int) -> None:
    assert len(EXAMPLES) == 2
    exec(EXAMPLES[number], {})


def options_of(*names: str) -> set[str]:
    """Parameters of the constructors and of ``forward``, but for those of every module."""
    found: set[str] = set()
    for name in names:
        for method in ("__init__", "forward"):
            found |= set(inspect.signature(getattr(getattr(library, name), method)).parameters)
    return found - {"self", "x", "args", "kwargs", "vq_kwargs", "dim", "codebook_size"}


@pytest.mark.parametrize(
    ("document", "names"),
    [
        (DOCUMENT, ("VectorQuantize", "ResidualVQ", "GroupedResidualVQ", "SimVQ", "HierarchicalVQ")),
        (
            DOCUMENT.with_name("quantizers.md"),
            (
                "VectorQuantize",
                "ResidualVQ",
                "GroupedResidualVQ",
                "SimVQ",
                "HierarchicalVQ",
                "RandomProjectionQuantizer",
                "FSQ",
                "LFQ",
            ),
        ),
    ],
    ids=["patch", "modules"],
)
def test_every_option_of_the_library_has_a_row(document: Path, names: tuple[str, ...]) -> None:
    text = document.read_text()
    assert not sorted(name for name in options_of(*names) if not re.search(rf"\b{name}\b", text))
