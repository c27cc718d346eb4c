"""What documents and messages name is there: environment variables in CONTRIBUTING.md, extras in pyproject.toml."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch

import vqkernels
from vqkernels import cli

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("vqkernels", "csrc", "tests", "benchmarks", ".ci")
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh", ".txt", ".cmake", ".toml", ".j2", ""}
# Modules to the distributions that bring them, where names differ.
DISTRIBUTIONS = {"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn"}


def files() -> list[Path]:
    found = [ROOT / "Makefile", ROOT / "pyproject.toml"]
    for folder in SOURCES:
        found += [p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix in SUFFIXES and p != Path(__file__)]
    return found


def extras() -> dict[str, set[str]]:
    """Extra to the distributions that it names, those of the extras in it included."""
    # tomllib is not in Python 3.10.
    text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    found: dict[str, set[str]] = {}
    for name, listed in re.findall(r"^(\w+) = (\[.*?\])$", re.sub(r" #.*", "", text), re.DOTALL | re.MULTILINE):
        found[name] = set()
        for requirement in ast.literal_eval(listed):
            if inner := re.fullmatch(r"vqkernels\[(.*)\]", requirement):
                found[name] |= set().union(*(found[other] for other in inner[1].split(",")))
            else:
                found[name].add(re.split(r"[\[>=;\s]", requirement)[0])
    return found


def test_every_environment_variable_is_in_the_table() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Environment variables")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(VQKERNELS_[A-Z0-9_]+)` \|", table, re.MULTILINE)
    assert len(set(listed)) == len(listed)
    used: set[str] = set()
    for path in files():
        used |= set(re.findall(r"\bVQKERNELS_[A-Z0-9_]*[A-Z0-9]\b", path.read_text(errors="replace")))
    assert len(used) > 20
    assert used == set(listed)


def test_every_extra_that_is_suggested_exists() -> None:
    known = extras()
    assert {"train", "data", "bench", "triton", "tensorboard"} <= known.keys()
    suggested: set[str] = set(cli.EXTRAS.values())
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for path in [*documents, *(ROOT / "vqkernels").rglob("*.py")]:
        for names in re.findall(r"vqkernels\[(\w+(?:,\w+)*)\]", path.read_text()):
            suggested |= set(names.split(","))
    assert len(suggested) >= 5
    assert not suggested - known.keys()


def test_every_module_that_is_required_is_in_the_extra_that_is_suggested() -> None:
    known, asked = extras(), []
    for path in (ROOT / "vqkernels" / "training").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
                words = [a.value for a in node.args if isinstance(a, ast.Constant)]
                if len(words) == len(node.args):
                    asked.append((path.name, *words, *["train"][: 2 - len(words)]))
    assert len(asked) > 20
    for name, module, extra in asked:
        package = module.partition(".")[0]
        if module == "torch.utils.tensorboard":
            package = "tensorboard"
        assert DISTRIBUTIONS.get(package, package) in known[extra], (name, module, extra)


def command_lines() -> list[str]:
    """Calls of ``vqkernels`` in the documents' shell blocks and at the end of ``--help``, without what starts them."""
    found = []
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE):
            found += [line.partition("#")[0] for line in block.splitlines()] if not language else []
    for path in (ROOT / "vqkernels" / "cli").glob("*.py"):
        examples = re.findall(r'^EXAMPLES = """(.*?)"""', path.read_text(), re.DOTALL | re.MULTILINE)
        found += [re.split(r"\s{2,}", line.strip())[0] for text in examples for line in text.splitlines()]
    calls = (re.match(r"\s*(?:(?:torchrun|accelerate launch) .*-m )?vqkernels (.*)", line) for line in found)
    return [call[1].strip() for call in calls if call]


def test_every_call_of_the_command_in_documents_and_help_can_be_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = command_lines()
    assert len(lines) > 40
    wrong = []
    for line in lines:
        try:
            args, rest = cli._parser().parse_known_args(shlex.split(line))
        except SystemExit:
            wrong.append((line, capsys.readouterr().err))
        else:
            wrong += [(line, " ".join(rest))] if rest and not hasattr(args, "forward") else []
    assert not wrong


@pytest.mark.parametrize("name", ["lookup", "codebook_sum"])
def test_the_error_for_an_index_out_of_range_is_the_documented_one(name: str) -> None:
    function = getattr(vqkernels, name)
    given = (torch.zeros(5, 3), torch.tensor([5])) if name == "lookup" else (torch.zeros(1, 3), torch.tensor([5]), 5)
    with pytest.raises(Exception, match="indices contains 5") as found:
        function(*given)
    errors = inspect.getdoc(function).partition("Raises:")[2].partition("Example:")[0]
    (line,) = [line for line in errors.splitlines() if "out of range" in line]
    assert found.type.__name__ in line


@pytest.mark.parametrize("command", ["train", "tokenize", "detokenize", "evaluate", "tune", "bench"])
def test_a_module_that_is_missing_is_told_with_an_extra(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib

    def missing(args: object) -> int:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(importlib.import_module(f"vqkernels.cli.{command}"), "run", missing)
    positional = {"tokenize": ["m"], "detokenize": ["t", "--model", "m"], "evaluate": ["m"]}
    assert cli.main([command, *positional.get(command, [])]) == 2
    found = re.search(r"pip install 'vqkernels\[(\w+)\]'", capsys.readouterr().err)
    assert found is not None
    assert found[1] in extras()
