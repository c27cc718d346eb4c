"""The examples in docs/quantizers.md run, and its table names options that exist."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path

from vqkernels import nn

PAGE = Path(__file__).resolve().parents[1] / "docs" / "quantizers.md"


def test_examples_run() -> None:
    found = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 30
    assert found.failed == 0


def test_every_module_has_a_section() -> None:
    text = PAGE.read_text()
    headings = " ".join(re.findall(r"^## (.*)$", text, re.MULTILINE))
    classes = [n for n in nn.__all__ if inspect.isclass(getattr(nn, n)) and not n.endswith("Output")]
    assert not [name for name in classes if name not in headings]


def test_keywords_in_the_right_column_exist() -> None:
    known = {
        parameter
        for name in nn.__all__
        if inspect.isclass(cls := getattr(nn, name))
        for base in cls.__mro__
        if base.__module__.startswith("vqkernels")
        for method in ("__init__", "forward")
        if method in vars(base)
        for parameter in inspect.signature(vars(base)[method]).parameters
    }
    table = PAGE.read_text().split("| option there | here |")[1]
    rows = [line.split(" | ")[1] for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    used = {word for cell in rows for code in re.findall(r"`([^`]*)`", cell) for word in re.findall(r"\b(\w+)=", code)}
    assert len(used) > 20
    assert not used - known
