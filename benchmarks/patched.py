"""Quantizers of other libraries, before and after ``vqkernels.patch``: ``python -m benchmarks.patched``.

Each is built with random weights in the sizes of a released model. Original and patched take turns; before that, the
patched indices are compared with the float64 oracle. Peak memory is measured in a second process, one call each.
Writes ``results/<device>/patched.json``; takes about a minute.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__all__ = ["CASES", "main"]


@dataclass(frozen=True)
class PatchedCase:
    """One quantizer.

    Attributes:
        title: library and class.
        make: the module, from the module that is torch.
        shape: of the input; ``tiny`` is what ``--quick`` takes instead.
        levels, codes, dim: Q, K, D, for the table.
        work: "encode" (no gradients), or "train" (forward, backward for a fixed gradient; EMA where the class has it).
        rows: from an input, what its first level compares: rows (N, D), codes (K, D), the metric.
        indices: those of the first level, from the result.
    """

    title: str
    make: Callable[[], Any]
    shape: tuple[int, ...]
    tiny: tuple[int, ...]
    levels: int
    codes: int
    dim: int
    work: str
    rows: Callable[[Any, Any], tuple[Any, Any, str]]
    indices: Callable[[Any], Any]


def _transformers(model: str, name: str) -> Any:
    import importlib

    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)


def _fill(module: Any) -> Any:
    """Codes as far apart as N(0, 1) latents; the residual levels of a codec get smaller and smaller ones."""
    level = 0
    for name, tensor in [*module.named_buffers(), *module.named_parameters()]:
        if name.endswith((".embed", ".embed_sum", "codebook.weight", "embedding.weight")):
            tensor.data.normal_(std=0.7**level)
            level += 1
    return module


def _encodec() -> Any:
    from transformers import EncodecConfig

    return _transformers("encodec", "EncodecResidualVectorQuantizer")(EncodecConfig(target_bandwidths=[6.0]))


def _mimi() -> Any:
    from transformers import MimiConfig

    return _transformers("mimi", "MimiSplitResidualVectorQuantizer")(MimiConfig(num_quantizers=8))


def _dac() -> Any:
    from transformers import DacConfig

    return _transformers("dac", "DacResidualVectorQuantizer")(DacConfig())


def _table(model: str, name: str, codes: int, dim: int) -> Callable[[], Any]:
    config = SimpleNamespace(num_embeddings=codes, embed_dim=dim, codebook_size=codes, num_patches=24)
    return lambda: _transformers(model, name)(config)


def _diffusers() -> Any:
    from diffusers.models.autoencoders.vae import VectorQuantizer

    return VectorQuantizer(8192, 3, 0.25)


def _lucidrains(**options: Any) -> Callable[[], Any]:
    def make() -> Any:
        import vector_quantize_pytorch as library

        if "num_quantizers" in options:
            return library.ResidualVQ(**options)
        return library.VectorQuantize(**options)

    return make


def _map_rows(module: Any, x: Any) -> tuple[Any, Any, str]:
    channels = 2 if x.dim() == 5 else 1
    return x.movedim(channels, -1).flatten(0, -2), module.embedding.weight, "l2"


def _mimi_rows(module: Any, x: Any) -> tuple[Any, Any, str]:
    semantic = module.semantic_residual_vector_quantizer
    return semantic.input_proj(x).transpose(1, 2).flatten(0, 1), semantic.layers[0].codebook.embed, "l2"


def _dac_rows(module: Any, x: Any) -> tuple[Any, Any, str]:
    level = module.quantizers[0]
    return level.in_proj(x).transpose(1, 2).flatten(0, 1), level.codebook.weight, "cosine"


def _encodec_rows(module: Any, x: Any) -> tuple[Any, Any, str]:
    return x.transpose(1, 2).flatten(0, 1), module.layers[0].codebook.embed, "l2"


def _lucidrains_rows(module: Any, x: Any) -> tuple[Any, Any, str]:
    first = module.layers[0] if hasattr(module, "layers") else module
    return x.flatten(0, -2), first._codebook.embed[0], "l2"


CASES: dict[str, PatchedCase] = {
    "encodec": PatchedCase("transformers EnCodec 24 kHz, 6 kbps", _encodec, (64, 128, 75), (2, 128, 9),
                           8, 1024, 128, "encode", _encodec_rows, lambda out: out[0]),
    "mimi": PatchedCase("transformers Mimi", _mimi, (16, 512, 125), (1, 512, 7),
                        8, 2048, 256, "encode", _mimi_rows, lambda out: out[0]),
    "mimi-stream": PatchedCase("transformers Mimi, one frame", _mimi, (1, 512, 1), (1, 512, 1),
                               8, 2048, 256, "encode", _mimi_rows, lambda out: out[0]),
    "dac": PatchedCase("transformers DAC 44 kHz", _dac, (24, 1024, 86), (2, 1024, 5),
                       9, 1024, 8, "train", _dac_rows, lambda out: out[1][:, 0]),
    "chameleon": PatchedCase("transformers Chameleon", _table("chameleon", "ChameleonVQVAEVectorQuantizer", 8192, 256),
                             (4, 256, 32, 32), (1, 256, 4, 4), 1, 8192, 256, "encode", _map_rows, lambda out: out[2]),
    "janus": PatchedCase("transformers Janus", _table("janus", "JanusVQVAEVectorQuantizer", 16384, 8),
                         (8, 8, 24, 24), (1, 8, 5, 5), 1, 16384, 8, "encode", _map_rows, lambda out: out[2]),
    "emu3": PatchedCase("transformers Emu3", _table("emu3", "Emu3VQVAEVectorQuantizer", 32768, 4),
                        (1, 1, 4, 64, 64), (1, 1, 4, 5, 5), 1, 32768, 4, "encode", _map_rows, lambda out: out),
    "diffusers": PatchedCase("diffusers VQModel, LDM f4", _diffusers, (2, 3, 64, 64), (1, 3, 5, 5),
                             1, 8192, 3, "train", _map_rows, lambda out: out[2][2]),
    "vector-quantize-pytorch": PatchedCase("vector-quantize-pytorch VectorQuantize",
                                           _lucidrains(dim=256, codebook_size=8192), (8, 256, 256), (1, 9, 256),
                                           1, 8192, 256, "train", _lucidrains_rows, lambda out: out[1]),
    "residual-vq": PatchedCase("vector-quantize-pytorch ResidualVQ",
                               _lucidrains(dim=128, codebook_size=1024, num_quantizers=8), (64, 75, 128), (1, 9, 128),
                               8, 1024, 128, "train", _lucidrains_rows, lambda out: out[1][..., 0]),
}  # fmt: skip


class GateFailed(RuntimeError):
    """The patched quantizer named a code that is not the nearest: there is nothing to report."""


def _work(case: PatchedCase, module: Any, x: Any) -> Callable[[], Any]:
    import torch

    if case.work == "encode":
        module.eval()
        call = getattr(module, "encode", module)

        def encode() -> Any:
            with torch.no_grad():
                return call(x)

        return encode
    module.train()
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))

    def train() -> Any:
        z = x.detach().requires_grad_()
        out = module(z)
        losses = [t for t in (out[-2:] if len(out) == 5 else out[1:3]) if torch.is_tensor(t) and t.requires_grad]
        torch.autograd.backward([out[0], *(t.sum() for t in losses)], [gradient] + [None] * len(losses))
        module.zero_grad()
        return out

    return train


def _pair(case: PatchedCase, quick: bool) -> tuple[Any, Any, Any]:
    """Original, patched copy, input."""
    import torch

    import vqkernels

    torch.manual_seed(1)
    module = _fill(case.make())
    other = copy.deepcopy(module)
    vqkernels.patch(other, strict=True)
    return module, other, torch.randn(case.tiny if quick else case.shape)


def _gate(case: PatchedCase, original: Any, patched: Any, x: Any) -> float:
    """Compare the patched indices with the oracle; return the share of codes that differ from the original's, in %."""
    import torch

    from benchmarks.stages import ORACLE_WORK
    from vqkernels.testing import oracle_nearest

    with torch.no_grad():
        rows, codes, metric = case.rows(original, x)
        rows, codes = rows.clone(), codes.clone()
    torch.manual_seed(2)
    theirs = _work(case, copy.deepcopy(original), x)()
    torch.manual_seed(2)
    ours = _work(case, copy.deepcopy(patched), x)()
    count = min(len(rows), max(64, int(ORACLE_WORK / 10 / (case.codes * case.dim))))
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))[:count]
    expected, _ = oracle_nearest(rows[chosen], codes, metric)
    wrong = int((case.indices(ours).reshape(-1)[chosen] != expected).sum())
    if wrong:
        raise GateFailed(f"{wrong} of {count} rows")
    a, b = (_integers(out) for out in (theirs, ours))
    return 100 * float((a != b).double().mean())


def _integers(out: Any) -> Any:
    """All indices of a result."""
    import torch

    if torch.is_tensor(out):
        return out
    found = [t for t in out if torch.is_tensor(t) and t.dtype == torch.int64]
    return found[0] if found else _integers(next(t for t in out if isinstance(t, tuple)))


def _measure_memory(names: list[str], threads: int, quick: bool) -> dict[str, dict[str, float]]:
    """MiB by which one call raises the peak, by case and contestant."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    from benchmarks.environment import ROOT

    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.patched", "--memory-only", "--threads", str(threads), "--case", *names]
    run = subprocess.run(
        [*command, *(["--quick"] if quick else [])], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=300, check=True,
    )  # fmt: skip
    found: dict[str, dict[str, float]] = json.loads(run.stdout.splitlines()[-1])
    return found


def _memory_only(names: list[str], quick: bool) -> None:
    from benchmarks.memory import _status

    found: dict[str, dict[str, float]] = {}
    for name in names:
        case = CASES[name]
        for i, who in enumerate(("original", "patched")):
            warm = _pair(case, True)
            _work(case, warm[i], warm[2])()
            module, x = (pair := _pair(case, quick))[i], pair[2]
            work = _work(case, module, x)
            del pair, warm
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS
            before = _status("VmRSS")
            result = work()
            found.setdefault(name, {})[who] = max(0, _status("VmHWM") - before) / 2**20
            del result
    print(json.dumps(found))


def _measure(name: str, rounds: int, seconds: float, quick: bool) -> dict[str, Any]:
    from benchmarks.timing import interleave, ratios

    case = CASES[name]
    original, patched, x = _pair(case, quick)
    differs = _gate(case, original, patched, x)
    contestants = {"original": _work(case, original, x), "patched": _work(case, patched, x)}
    series = interleave(contestants, rounds=rounds, budget=seconds, fewest=3 if quick else 5)
    shape = case.tiny if quick else case.shape
    rows = x.numel() // shape[{3: 1, 4: 1, 5: 2}[len(shape)] if not name.startswith(("vec", "res")) else 2]
    return {
        "case": name,
        "title": case.title,
        "size": f"{rows} x {case.codes} x {case.dim}",
        "levels": case.levels,
        "work": case.work,
        "ms": {who: s.summary() for who, s in series.items()},
        "speedup": ratios(series["patched"], series["original"]),
        "differs_percent": differs,
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.patched", description=__doc__.split("\n")[0])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=4.0, help="per case; at least 5 rounds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, three rounds; saved only with --results")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="instead of benchmarks/results/<device>")
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    if options.memory_only:
        _memory_only(options.case, options.quick)
        return 0
    from benchmarks import environment as env

    stamp = env.describe(options.threads) | {"commit": env.commit()}
    folder = options.results or (None if options.quick else env.results_folder())
    path = None if folder is None else folder / "patched.json"
    empty: dict[str, Any] = {"kind": "patched", "cases": {}}
    data = json.loads(path.read_text()) if path is not None and path.exists() else empty
    memory = _measure_memory(options.case, options.threads, options.quick)
    failed = []
    for name in options.case:
        try:
            record = _measure(name, 3 if options.quick else options.rounds, options.seconds, options.quick)
        except GateFailed as e:
            failed.append(name)
            print(f"{name}: NOT REPORTED, the correctness gate failed: {e}")
            continue
        record |= {"memory_mib": memory.get(name, {}), "environment": {**stamp, "date": env.now()}}
        ms, ratio = record["ms"], record["speedup"]
        print(
            f"{name:<24} {ms['original']['median']:9.2f} -> {ms['patched']['median']:8.2f} ms, {ratio['median']:.2f}x "
            f"[{ratio['q25']:.2f}, {ratio['q75']:.2f}]; MiB {record['memory_mib']}; "
            f"{record['differs_percent']:.3g} % of codes differ",
            flush=True,
        )
        if path is not None:
            data["cases"][name] = record
            env.write_json(path, data)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
