"""The bars that this project set itself on CPU, compared with the results files.

Called by ``run --check``. The bars come from a Zen 4 machine, where the AVX512-BF16 dot runs at twice the fp32 FMA
rate; where it does not (Intel: half of it, but AMX at 14 times), the printed peaks let the reader judge.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["BARS", "Bar", "load", "table"]

Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Bar:
    """One acceptance bar: what is measured, the file and case that it comes from, how to read it, the limit."""

    what: str
    kind: str
    case: str
    read: Callable[[dict[str, Any]], float | None]
    limit: float
    unit: str = "x"
    at_most: bool = False


def _speedup(peer: str, isa: str | None = None) -> Callable[[dict[str, Any]], float | None]:
    def read(record: dict[str, Any]) -> float | None:
        ratios = record["speedup"] if isa is None else record["speedup_by_isa"].get(isa, {})
        value = ratios.get(peer, {}).get("median")
        return None if value is None else float(value)

    return read


def _share_of_bf16_dot(record: dict[str, Any]) -> float | None:
    peak = record["peaks"].get("avx512bf16")
    return 100e9 * record["results"]["vqkernels"]["gflops"] / peak if peak else None


def _mib(contestant: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda record: record["results"].get(contestant, {}).get("mib")


def _exponent(record: dict[str, Any]) -> float | None:
    return float(record["exponent"])


def _search(what: str, case: str, peer: str, limit: float, isa: str | None = None) -> Bar:
    return Bar(what, "search", case, _speedup(peer, isa), limit)


BARS = (
    _search("16384 x 16384 x 256 against torch.cdist + argmin", "vqgan-big", "cdist", 3.9),
    _search("16384 x 16384 x 256 against faiss", "vqgan-big", "faiss", 2.1),
    Bar("16384 x 16384 x 256, share of the AVX512-BF16 dot peak", "search", "vqgan-big", _share_of_bf16_dot, 78, "%"),
    _search(
        "16384 x 16384 x 256 with VQKERNELS_ISA=avx2 against torch.cdist + argmin", "vqgan-big", "cdist", 1.9, "avx2"
    ),
    _search("16384 x 8192 x 8 against torch.cdist + argmin", "small-d", "cdist", 20),
    _search("16384 x 8192 x 8 against faiss", "small-d", "faiss", 1.1),
    _search("LlamaGen against torch.cdist + argmin", "llamagen", "cdist", 18),
    _search("VAR against torch.cdist + argmin", "var", "cdist", 7),
    _search("VAR against faiss", "var", "faiss", 1.4),
    _search("EnCodec against torch.cdist + argmin", "encodec", "cdist", 3),
    _search("EnCodec against faiss", "encodec", "faiss", 2),
    Bar(
        "training step, VQGAN 16384, against vector-quantize-pytorch",
        "train",
        "vqgan-16384",
        _speedup("vqtorch-ema"),
        8,
    ),
    Bar("training step, LlamaGen, against vector-quantize-pytorch", "train", "llamagen", _speedup("vqtorch-ema"), 8),
    Bar("training step, EnCodec, against vector-quantize-pytorch", "train", "encodec", _speedup("vqtorch-ema"), 8),
    Bar(
        "training step, VQ-VAE CIFAR, against vector-quantize-pytorch",
        "train",
        "vqvae-cifar",
        _speedup("vqtorch-ema"),
        4,
    ),
    Bar("memory added by nearest at 65536 x 16384 x 8", "memory", "llamagen-256", _mib("vqkernels"), 64, "MiB", True),
    Bar(
        "memory added by a training step at that size",
        "memory",
        "llamagen-256",
        _mib("vqkernels-ema"),
        200,
        "MiB",
        True,
    ),
    Bar("cost grows with N to the power of", "scaling", "rows", _exponent, 1.05, "", True),
    Bar("cost grows with K to the power of", "scaling", "codes", _exponent, 1.05, "", True),
    Bar("cost grows with D to the power of", "scaling", "dim", _exponent, 1.05, "", True),
)


def load(folder: Path) -> Results:
    """kind -> case -> record, of all results files in a folder."""
    found: Results = {}
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        if "cases" in data:  # other commands keep results of their own kind here
            found[data["kind"]] = data["cases"]
    return found


def table(results: Results) -> tuple[str, bool]:
    """The bars with what was measured, as text, and whether all hold."""
    lines, good = [], True
    for bar in BARS:
        record = results.get(bar.kind, {}).get(bar.case)
        value = None if record is None else bar.read(record)
        if value is None:
            verdict, measured = "not measured", "-"
        else:
            verdict = "ok" if (value <= bar.limit if bar.at_most else value >= bar.limit) else "MISSED"
            measured = f"{value:.2f}" if value < 10 else f"{value:.1f}"
        good &= verdict == "ok"
        sign = "<=" if bar.at_most else ">="
        lines.append(f"  {bar.what:<82} {sign} {bar.limit:g} {bar.unit:<3}  measured {measured:>6}  {verdict}")
    return "\n".join(lines), good
