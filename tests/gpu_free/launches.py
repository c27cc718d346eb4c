"""Names the package's Triton kernels, records what it launches, and compiles that for GPUs that are not there.

Called by test_triton_compiles.py and test_ptx_triton.py. The launches come from the backend itself, run on CPU tensors
with the launcher replaced: there is no list of signatures to keep up to date.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

PACKAGE = Path(__file__).resolve().parents[2] / "vqkernels"
# First arguments of functions that kernels call; they are compiled with their callers.
HELPERS = {"value", "exponent", "a_start", "best", "bounds", "x_start", "partials"}
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def is_kernel(node: ast.FunctionDef) -> bool:
    """Whether Triton compiles it, as a kernel or into one."""
    return any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list)


def defined() -> set[str]:
    """Every kernel of the package."""
    return {
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and is_kernel(node) and node.args.args[0].arg not in HELPERS
    }


@dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel: what Triton would compile for a call."""

    fn: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        types = sorted({t for _, t in self.signature if t.startswith("*")})
        return f"{self.fn.__name__}[{','.join(types)}]{dict(self.constants)}{dict(self.options)}"


def describe(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """As Triton specialises: pointers and integers by divisibility by 16, integers that are 1 as constants."""
    names = [p.name for p in fn.params]
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    signature, constants, divisible = [], [], []
    for position, parameter in enumerate(fn.params):
        value = values[parameter.name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not free):
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
        elif isinstance(value, torch.Tensor):
            signature.append((parameter.name, "*" + TYPES[value.dtype]))
            divisible.append(position)
        elif isinstance(value, float):
            signature.append((parameter.name, "fp32"))
        else:
            signature.append((parameter.name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and not free:
                divisible.append(position)
    options = tuple((k, kwargs[k]) for k in OPTIONS if k in kwargs)
    return Launch(fn, tuple(signature), tuple(constants), tuple(divisible), options)


@contextmanager
def recorded() -> Iterator[dict[Launch, None]]:
    """Launches inside the block are recorded, not run."""
    found: dict[Launch, None] = {}

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found[describe(self, args, kwargs)] = None

    original = JITFunction.run
    JITFunction.run = record
    try:
        yield found
    finally:
        JITFunction.run = original


def compiled(launch: Launch, target: GPUTarget) -> Any:
    """Compile for a GPU that need not be there."""
    source = ASTSource(
        launch.fn,
        dict(launch.signature),
        {(launch.fn.arg_names.index(name),): value for name, value in launch.constants},
        {(position,): [["tt.divisibility", 16]] for position in launch.divisible},
    )
    return triton.compile(source, target=target, options=dict(launch.options))


def _read(binary: Any, tool: str, option: str) -> str:
    """What a tool that ships with Triton says about a cubin."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        return subprocess.run([str(path), option, file.name], capture_output=True, text=True, check=True).stdout


def resources(binary: Any) -> dict[str, int]:
    """Registers, bytes of stack and spills of a cubin."""
    out = _read(binary, "cuobjdump", "-res-usage")
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", out)}


def machine_loops(binary: Any) -> list[list[str]]:
    """The machine instructions of every loop, by name, inner loops in the outer ones."""
    labels: dict[str, int] = {}
    found, names = [], []
    for line in _read(binary, "nvdisasm", "-c").splitlines():
        if match := re.match(r"(\.L_\w+):", line):
            labels[match[1]] = len(names)
        elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)(.*)", line):
            names.append(match[1])
            target = re.search(r"`\((\.L_\w+)\)", match[2]) if match[1] == "BRA" else None
            if target and target[1] in labels:  # backwards
                found.append(names[labels[target[1]] :])
    return found
