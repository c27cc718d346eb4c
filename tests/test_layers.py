"""The rules of the layout: imports point one way, one stem everywhere, small files, a lean import."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vqkernels import dispatch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vqkernels"

# Left to right: a module imports only from its own layer and from those after it. `vqkernels` is `__init__.py`.
LAYERS = (
    ("vqkernels.__main__",),
    ("vqkernels.cli",),
    ("vqkernels.training",),
    ("vqkernels.models",),
    ("vqkernels",),
    ("vqkernels.convert", "vqkernels.patch", "vqkernels.recognisers"),
    ("vqkernels.nn", "vqkernels.distributed"),
    ("vqkernels.testing",),
    ("vqkernels.functional", "vqkernels.levels", "vqkernels.explanation", "vqkernels.export"),
    ("vqkernels._gradients",),
    ("vqkernels._arguments",),
    ("vqkernels.info",),
    ("vqkernels.ops",),
    ("vqkernels.dispatch",),
    ("backend",),
    ("vqkernels._cuda_residual",),
    ("vqkernels._cpu_nearest", "vqkernels._cuda_nearest", "vqkernels._indices", "vqkernels._softmax"),
    ("vqkernels._cuda_selftest",),
    ("vqkernels._cuda", "vqkernels._triton"),
    ("vqkernels._native", "vqkernels.tuned"),
    ("vqkernels._files", "vqkernels._devices"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
BACKENDS = {"reference", "native", "triton"}
# What a backend file may show besides the two names that dispatch calls.
OPTIONAL = {"describe", "clear_cache"}
EXTRAS = {
    "PIL",
    "accelerate",
    "einops",
    "matplotlib",
    "safetensors",
    "skimage",
    "sklearn",
    "tensorboard",
    "torchmetrics",
    "tqdm",
    "triton",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_backend(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 4 and parts[1] == "ops" and parts[3] in BACKENDS


def layer(name: str) -> str:
    return "backend" if is_backend(name) else ".".join(name.split(".")[:2])


class Imports(ast.NodeVisitor):
    """Modules of this package that a module imports, at any depth, but not for type checkers only."""

    def __init__(self, name: str, is_package: bool) -> None:
        self.parents = name.split(".") if is_package else name.split(".")[:-1]
        self.found: set[str] = set()
        self.bare = False

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.dump(node.test):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.bare |= alias.name == "vqkernels"
            if alias.name.startswith("vqkernels."):
                self.found.add(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            base = ".".join([*self.parents[: len(self.parents) - node.level + 1], *filter(None, [node.module])])
        if base.partition(".")[0] == "vqkernels":
            for alias in node.names:
                full = f"{base}.{alias.name}"
                self.found.add(full if full in MODULES else base)


def imports_of(name: str) -> Imports:
    path = MODULES[name]
    visitor = Imports(name, path.name == "__init__.py")
    visitor.visit(ast.parse(path.read_text()))
    return visitor


def test_every_module_has_a_layer() -> None:
    unknown = [name for name in MODULES if layer(name) not in RANK]
    assert not unknown, f"give {unknown} a place in LAYERS"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_right(name: str) -> None:
    wrong = [
        found
        for found in imports_of(name).found
        if RANK[layer(found)] < RANK[layer(name)] and not (is_backend(name) and found == name.rpartition(".")[0])
    ]
    assert not wrong, f"{name} imports {wrong}, which lie to its left"


@pytest.mark.parametrize(
    "name", [m for m in MODULES if RANK.get(layer(m), 0) >= RANK["vqkernels"] and m != "vqkernels"]
)
def test_package_itself_is_imported_for_its_path_only(name: str) -> None:
    # `import vqkernels` and then `vqkernels.nn` would be an import to the left that the rule above cannot see.
    tree = ast.parse(MODULES[name].read_text())
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vqkernels"
    }
    assert not imports_of(name).bare or attributes <= {"__path__"}


@pytest.mark.parametrize("name", [m for m in MODULES if m != "vqkernels.dispatch"])
def test_only_dispatch_and_backends_reach_a_backend(name: str) -> None:
    if not is_backend(name):
        assert not [found for found in imports_of(name).found if is_backend(found)]


def test_import_rules_can_fail() -> None:
    visitor = Imports("vqkernels.ops.nearest.native", is_package=False)
    visitor.visit(
        ast.parse("def f():\n    from ... import dispatch\n    from ..lookup import native\n    import vqkernels")
    )
    assert visitor.found == {"vqkernels.dispatch", "vqkernels.ops.lookup.native"} & set(MODULES)
    assert visitor.bare
    assert (
        RANK[layer("vqkernels.nn.modules")] < RANK[layer("vqkernels.functional")] < RANK[layer("vqkernels.ops.nearest")]
    )
    assert layer("vqkernels.ops.nearest.native") == "backend"


def test_op_folders_are_the_registered_ops() -> None:
    folders = {path.parent.name for path in (PACKAGE / "ops").glob("*/__init__.py")}
    assert folders == set(dispatch.OPS)


def test_backend_names_are_files() -> None:
    assert {b.name for b in dispatch.BACKENDS} <= BACKENDS
    extra = {
        p.relative_to(PACKAGE).as_posix()
        for p in (PACKAGE / "ops").glob("*/*.py")
        if p.stem not in BACKENDS | {"__init__"}
    }
    assert not {path for path in extra if not Path(path).name.startswith("_")}


@pytest.mark.parametrize("op", dispatch.OPS)
def test_same_stem_everywhere(op: str) -> None:
    expected = [PACKAGE / "ops" / op / "reference.py", ROOT / "tests" / "ops" / f"test_{op}.py"]
    if (PACKAGE / "ops" / op / "native.py").exists():
        expected.append(ROOT / "csrc" / "cpu" / f"{op}.cpp")
    assert not [str(path.relative_to(ROOT)) for path in expected if not path.is_file()]
    assert f"vqkernels::{op}" == getattr(torch.ops.vqkernels, op).default._schema.name


@pytest.mark.parametrize("name", [m for m in MODULES if is_backend(m)])
def test_backend_file_exposes_supports_and_run(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    defined = {
        n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")
    }
    assert {"supports", "run"} <= defined
    assert defined - {"supports", "run"} <= OPTIONAL


@pytest.mark.parametrize("name", [m for m in MODULES if is_backend(m) and not m.endswith(".triton")])
def test_backend_takes_the_arguments_of_the_schema(name: str) -> None:
    op = name.split(".")[2]
    expected = [a.name for a in getattr(torch.ops.vqkernels, op).default._schema.arguments]
    assert expected.pop() == "backend"
    module = importlib.import_module(name)
    for function in (module.supports, module.run, getattr(module, "describe", module.run)):
        assert list(inspect.signature(function).parameters) == expected


def test_files_are_small() -> None:
    sources = [
        path
        for folder in ("vqkernels", "csrc", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}
    ]
    assert len(sources) > 40
    long = {str(p.relative_to(ROOT)): n for p in sources if (n := len(p.read_text().splitlines())) > 450}
    assert not long, f"split by meaning: {long}"


IMPORT = """
import json, os, sys
import torch
before, start = set(sys.modules), sum(os.times()[:4])
import vqkernels
seconds = sum(os.times()[:4]) - start  # of processor time, that of children included
added = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
heavy = sorted(n for n in set(sys.modules) - before if n.startswith(("torch._dynamo", "torch._inductor")))
print(json.dumps({"seconds": seconds, "added": added, "heavy": heavy, "cuda": torch.cuda.is_initialized()}))
"""


def fresh_import(tmp_path: Path) -> dict[str, object]:
    run = subprocess.run([sys.executable, "-c", IMPORT], cwd=tmp_path, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(run.stdout)
    return found


def test_import_is_lean(tmp_path: Path) -> None:
    found = fresh_import(tmp_path)
    assert isinstance(found["added"], list)
    assert "vqkernels" in found["added"]
    assert not EXTRAS & set(found["added"])
    assert found["heavy"] == []
    assert found["cuda"] is False


@pytest.mark.slow
def test_import_adds_less_than_150_ms_to_torch(tmp_path: Path) -> None:
    # A busy machine stretches the time on the clock; what it adds to that of the processor a few tries leave behind.
    seconds = []
    for _ in range(12):
        seconds.append(float(str(fresh_import(tmp_path)["seconds"])))
        if seconds[-1] < 0.150:
            return
    pytest.fail(f"imports took {seconds} s of processor time")
