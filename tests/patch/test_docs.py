"""The examples of docs/drop-in-models.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "drop-in-models.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
LIBRARIES = [(re.findall(r"from (\w+)", example) or ["convert"])[0] for example in EXAMPLES]


@pytest.mark.usefixtures("repositories")
@pytest.mark.parametrize("example", EXAMPLES, ids=LIBRARIES)
def test_example_runs(example: str) -> None:
    if "from transformers" in example:
        pytest.importorskip("transformers")
    if "from diffusers" in example:
        pytest.importorskip("diffusers")
    names: dict[str, object] = {}
    exec(example, names)
    assert len(example.strip().splitlines()) <= 6


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 11
