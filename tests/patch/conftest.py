"""What the tests of ``patch`` share: modules of the names that the re-stated classes stand for."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import restated
import restated_tokenizers

ROOTS = ("taming", "tokenizer", "dac", "encodec", "moshi", "models", "src")
STAND_INS = [
    cls
    for module in (restated, restated_tokenizers)
    for cls in vars(module).values()
    if isinstance(cls, type) and cls.__module__.partition(".")[0] in ROOTS
]


@pytest.fixture
def repositories(monkeypatch: pytest.MonkeyPatch) -> None:
    """The re-statements can be imported, and so pickled, from where the originals are."""
    for cls in STAND_INS:
        parts = cls.__module__.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setattr(sys.modules[cls.__module__], cls.__name__, cls, raising=False)
