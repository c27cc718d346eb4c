"""The examples of docs/drop-in.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "drop-in.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(2))
def test_example_runs(number: int) -> None:
    assert len(EXAMPLES) == 2
    exec(EXAMPLES[number], {})
