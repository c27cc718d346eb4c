"""The examples of docs/drop-in-models.md run as they stand there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import restated

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "drop-in-models.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
LIBRARIES = [(re.findall(r"from (\w+)", example) or ["convert"])[0] for example in EXAMPLES]
STAND_INS = [
    cls
    for cls in vars(restated).values()
    if isinstance(cls, type) and cls.__module__.startswith(("taming", "tokenizer", "dac", "encodec", "moshi"))
]


@pytest.fixture
def _repositories(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of that name which hold the re-statements."""
    for cls in STAND_INS:
        parts = cls.__module__.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setattr(sys.modules[cls.__module__], cls.__name__, cls, raising=False)


@pytest.mark.usefixtures("_repositories")
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
    assert len(EXAMPLES) == 8
