"""Records what the Triton backend launches, and compiles it ahead of time for GPUs that are not there.

Called by tests/gpu_free/test_triton_compiles.py. The launches come from the backend itself, run on CPU tensors with the
launcher replaced: there is no list of signatures to keep up to date.
"""

from __future__ import annotations

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

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


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


def resources(binary: Any) -> dict[str, int]:
    """Registers, bytes of stack and spills of a cubin, as cuobjdump (which ships with Triton) reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        out = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", out)}
