"""What a call costs beyond its kernels, on inputs so small that this is most of it: ``python -m benchmarks.overhead``.

Times are of the processor, on one thread, so that other programs disturb them little; beside them stands how many
operators torch runs. With ``--against FOLDER`` another version takes turns with this one, and ratios are printed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Operators", "calls", "count", "main"]

ROWS = (1, 16, 64, 2048)
DIMS = (8, 256)
CODES = 2048
# Processor seconds that a stretch between two turns lasts.
STRETCH = 0.01
Call = Callable[[], object]
EXAMPLES = """\
examples:
  python -m benchmarks.overhead                                  microseconds a call, and operators
  python -m benchmarks.overhead --rows 1 --dim 8                 one size
  git worktree add ../older HEAD~20
  python -m benchmarks.overhead --against ../older               how many times as long an older version takes

The other version runs on this one's native library, so it must know the same ABI.
"""


class Operators(TorchDispatchMode):
    """Counts what torch runs, inside of this package's ops too: ``every`` operator, and those that ``compute``.

    On a GPU an operator that computes is a launch or more; a view, or memory without a value, is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.every: list[str] = []
        self.compute: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from vqkernels import dispatch

        self.every.append(str(func))
        if not (func.is_view or (func.namespace == "aten" and "empty" in func._schema.name)):
            self.compute.append(str(func))
        if func.namespace != "vqkernels":
            return func(*args, **(kwargs or {}))
        arguments = [*args, *(a.default_value for a in func._schema.arguments[len(args) :])]
        with self:
            return dispatch.call(func._schema.name.partition("::")[2], arguments.pop(), tuple(arguments))


def count(call: Call) -> Operators:
    """The operators of one call, after one that fills the caches."""
    call()
    with Operators() as operators:
        call()
    return operators


def _kernel(x: Tensor, codebook: Tensor) -> Call | None:
    """The search without Python around it: the C function on memory that is there already."""
    from vqkernels import _native

    if _native.unavailable() is not None:
        return None
    library, pointer = ctypes.CDLL(_native.lib()._name), ctypes.c_void_p
    rows, codes = _native.rows(x[None, None]), _native.codes(codebook[None])
    at = ctypes.byref(rows), ctypes.byref(codes)
    library.vqk_cpu_nearest_isa.argtypes = [ctypes.c_int64] * 2
    isa = library.vqk_cpu_nearest_isa(*codebook.shape)
    library.vqk_cpu_nearest_packed_bytes.restype = ctypes.c_int64
    storage = torch.zeros(library.vqk_cpu_nearest_packed_bytes(at[1], 0, isa) + 64, dtype=torch.uint8)
    packed = storage[-storage.data_ptr() % 64 :]
    assert library.vqk_cpu_nearest_pack(at[1], 0, isa, pointer(packed.data_ptr())) == 0
    indices, score = torch.zeros(len(x), dtype=torch.int64), torch.zeros(len(x))
    places = [pointer(t.data_ptr()) for t in (packed, indices, score)]
    search = library.vqk_cpu_nearest

    def call(kept: Any = (x, codebook, rows, codes, storage, indices, score)) -> object:
        return search(*at, 0, 0, isa, *places)

    return call


def calls(rows: int, dim: int, codes: int = CODES) -> dict[str, Call]:
    """What is timed, by name. Inputs and modules are made once; a training step ends with the gradients."""
    import vqkernels

    torch.manual_seed(0)
    x, codebook = torch.randn(rows, dim), torch.randn(codes, dim)
    indices = torch.arange(rows) % codes
    op = torch.ops.vqkernels.nearest.default

    def quantizer(**options: Any) -> Any:
        vq = vqkernels.VectorQuantizer(codes, dim, channel_dim=-1, **options)
        with torch.no_grad():
            vq.codebook.copy_(codebook)
            if vq.embed_avg is not None:
                vq.embed_avg.copy_(codebook)
        return vq

    def inference(call: Call) -> Call:
        return torch.inference_mode()(call)

    def training(vq: Any) -> Call:
        leaf = x.clone().requires_grad_()
        parameters = [leaf, *vq.parameters()]

        def step() -> object:
            out = vq(leaf)
            return torch.autograd.grad([out.quantized, out.loss], parameters, [x, torch.ones(())])

        return step

    evaluated = quantizer().eval()
    found = {
        "the search's C function": _kernel(x, codebook),
        "op nearest": lambda: op(x[None, None], codebook[None]),
        "nearest": lambda: vqkernels.nearest(x, codebook),
        "lookup": lambda: vqkernels.lookup(codebook, indices),
        "codebook_sum": lambda: vqkernels.codebook_sum(x, indices, codes),
        "vector_quantize": lambda: vqkernels.vector_quantize(x, codebook),
        "VectorQuantizer, inference": inference(lambda: evaluated(x)),
        "VectorQuantizer, eval": lambda: evaluated(x),
        "training step, gradient": training(quantizer()),
        "training step, moving averages": training(quantizer(decay=0.99)),
        "training step, and dead codes": training(quantizer(decay=0.99, dead_code_ratio=0.01)),
    }
    return {name: call for name, call in found.items() if call is not None}


def _serve() -> None:
    """A worker: reads requests as lines of JSON, answers with processor seconds per call."""
    torch.set_num_threads(1)
    made: dict[str, dict[str, Call]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = json.dumps(request["size"])
        if key not in made:
            made.clear()
            made[key] = calls(*request["size"])
        call = made[key].get(request["call"])
        print(json.dumps(None if call is None else _stretch(call)), flush=True)


def _stretch(call: Call) -> float:
    call()  # the first one imports, compiles and fills caches
    done, begin = 0, time.thread_time()
    while True:
        for _ in range(max(1, done)):
            call()
        done = 2 * done or 1
        if (took := time.thread_time() - begin) > STRETCH:
            return took / done


class Worker:
    """A process with one version of the package."""

    def __init__(self, package: Path | None) -> None:
        command = [sys.executable, __file__, "--serve", *([] if package is None else ["--against", str(package)])]
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        if package is not None and "VQKERNELS_LIBRARY" not in environment:
            from vqkernels import _native

            environment["VQKERNELS_LIBRARY"] = str(_native._library_path())
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd="/"
        )

    def seconds(self, size: Sequence[int], call: str) -> float | None:
        """Per call, of one stretch."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"size": size, "call": call}), file=self.process.stdin, flush=True)
        found: float | None = json.loads(self.process.stdout.readline())
        return found

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Entry(NamedTuple):
    """One call at one size: its fastest stretch, its operators, and how many times as long the other version took."""

    call: str
    rows: int
    dim: int
    microseconds: float
    every: int
    compute: int
    against: float | None


def measure(rows: Sequence[int], dims: Sequence[int], codes: int, rounds: int, against: Path | None) -> list[Entry]:
    """All calls at all sizes; versions take turns, and the fastest stretch of each counts."""
    workers = [Worker(None), *([] if against is None else [Worker(against)])]
    found = []
    try:
        for n, d in [(n, d) for d in dims for n in rows]:
            size = (n, d, codes)
            for name, call in calls(*size).items():
                taken = [[w.seconds(size, name) for w in workers] for _ in range(rounds)]
                least = [min(s for s in series if s is not None) for series in zip(*taken, strict=True)]
                operators = count(call)
                ratio = least[1] / least[0] if against else None
                found.append(Entry(name, n, d, 1e6 * least[0], len(operators.every), len(operators.compute), ratio))
    finally:
        for worker in workers:
            worker.close()
    return found


def table(entries: Sequence[Entry]) -> str:
    """A line per call, a column per size: microseconds, and the ratio to the other version."""
    sizes = list(dict.fromkeys((e.rows, e.dim) for e in entries))
    lines = [f"{'microseconds, rows x dims':<34}{'operators':>12}" + "".join(f"{f'{n} x {d}':>17}" for n, d in sizes)]
    for name in dict.fromkeys(e.call for e in entries):
        row = {(e.rows, e.dim): e for e in entries if e.call == name}
        first = row[sizes[0]]
        line = f"{name:<34}{f'{first.every} ({first.compute})':>12}"
        for entry in row.values():
            ratio = "" if entry.against is None else f" {entry.against:5.2f}x"
            line += f"{f'{entry.microseconds:.1f}{ratio}':>17}"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead",
        description="Microseconds and operators (in brackets: those that compute) of calls on few rows.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="N", help="default: 1 16 64 2048")
    parser.add_argument("--dim", type=int, nargs="+", default=DIMS, metavar="D", help="default: 8 256")
    parser.add_argument("--codes", type=int, default=CODES, metavar="K", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each version (default: %(default)s)")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="with another version's `vqkernels` in it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, with device and versions")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        if options.against is not None:  # before what an editable installation says
            sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]
            sys.path.insert(0, str(options.against))
        _serve()
        return 0
    if options.against is not None and not (options.against / "vqkernels" / "__init__.py").is_file():
        parser.error(f"--against is {options.against}; expected a folder with the package `vqkernels` in it")
    against = None if options.against is None else options.against.resolve()
    torch.set_num_threads(1)
    entries = measure(options.rows, options.dim, options.codes, options.rounds, against)
    print(table(entries))
    if options.json is not None:
        _write(options.json, entries, options.codes, against)
    return 0


def _write(path: Path, entries: Sequence[Entry], codes: int, against: Path | None) -> None:
    from benchmarks import environment

    environment.write_json(
        path,
        {
            "kind": "overhead",
            **environment.describe(threads=1),
            "commit": environment.commit(),
            "date": environment.now(),
            "against": None if against is None else against.name,
            "codes": codes,
            "entries": [entry._asdict() for entry in entries],
        },
    )


if __name__ == "__main__":
    sys.exit(main())
