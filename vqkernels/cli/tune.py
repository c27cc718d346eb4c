"""``vqkernels tune``: measure launch configurations of the Triton search on this GPU and write them to a file.

Called by :mod:`vqkernels.cli`. A configuration counts only if its indices equal the heuristic's, which were compared
with the reference first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vqkernels import _triton, tuned
from vqkernels._files import replace_file
from vqkernels.ops import nearest

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

# D to measure for each entry of the heuristic: dims that people use (LDM, LlamaGen, EnCodec, VQGAN among them).
DIMS = {16: 4, 32: 8, 64: 64, 128: 128, 2**31: 256}
ROWS, CODES = 65536, 16384
REPEATS = 9


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``tune`` command."""
    parser = subparsers.add_parser("tune", help="measure launch configurations of the Triton kernels on this GPU")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to write <device>.json (default: a folder read by this user)",
    )
    parser.add_argument(
        "--seconds", type=float, default=900.0, help="stop trying configurations after this time (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def candidates(largest: int) -> list[tuned.Config]:
    """What is tried for one entry of the heuristic, the heuristic's own configuration first."""
    start = tuned.HEURISTIC[largest]
    steps = (64, 128, 256) if largest > 128 else (start.block_d,)
    found = [
        tuned.Config(block_m, block_n, block_d, num_warps, num_stages)
        for block_m in (64, 128)
        for block_n in (64, 128, 256)
        for block_d in steps
        for num_warps in (4, 8)
        for num_stages in (2, 3, 4)
    ]
    return [start, *(c for c in found if c != start)]


def run(args: argparse.Namespace) -> int:
    """Measure and write.

    Raises:
        ValueError: there is no GPU with Triton here, or the kernels are wrong on it.
    """
    if (reason := _triton.unavailable("cuda")) is not None:
        raise ValueError(f"nothing to tune, for {reason}; configurations come from the built-in heuristic")
    import triton

    chosen: dict[str, dict[str, int]] = {}
    milliseconds: dict[str, dict[str, float]] = {}
    begin = time.monotonic()
    for number, (largest, dim) in enumerate(DIMS.items(), 1):
        x, codes = torch.randn(1, 1, ROWS, dim, device="cuda"), torch.randn(1, CODES, dim, device="cuda")
        expected, _ = nearest(x[:, :, :512], codes, "l2", "exact", "reference")
        times: dict[tuned.Config, float] = {}
        first: Tensor | None = None
        for config in candidates(largest):
            # The heuristic's is always measured; each entry gets its share of the time.
            if times and time.monotonic() - begin > args.seconds * number / len(DIMS):
                break
            with tuned.override(config):
                try:
                    indices, _ = nearest(x, codes, "l2", "exact", "triton")
                    torch.cuda.synchronize()
                except triton.OutOfResources:
                    continue
                first = indices if first is None else first
                if not indices[:, :, :512].equal(expected) or not indices.equal(first):
                    raise ValueError(f"{config} gives wrong indices at D={dim} on this GPU; please report it")
                times[config] = measure(x, codes)
        best = min(times, key=times.__getitem__)
        chosen[str(largest)] = best.to_dict()
        heuristic = times.get(tuned.HEURISTIC[largest], float("nan"))
        milliseconds[str(largest)] = {"best": times[best], "heuristic": heuristic}
        print(f"D={dim}: {times[best]:.3f} ms with {best} (heuristic: {heuristic:.3f} ms; {len(times)} tried)")
    name = torch.cuda.get_device_name()
    path = write(args.output or tuned.user_folder(), name, chosen, {
        "rows": ROWS, "codes": CODES, "milliseconds": milliseconds,
        "torch": torch.__version__, "triton": triton.__version__,
    })  # fmt: skip
    print(f"wrote {path}")
    return 0


def measure(x: Tensor, codes: Tensor) -> float:
    """Median milliseconds of one search."""
    found = []
    for _ in range(REPEATS):
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        nearest(x, codes, "l2", "exact", "triton")
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return float(statistics.median(found))


def write(folder: Path, device_name: str, chosen: dict[str, dict[str, int]], facts: dict[str, Any]) -> Path:
    """One JSON file per device, which :func:`vqkernels.tuned.load` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{tuned.slug(device_name)}.json"
    text = json.dumps({"device": device_name, "nearest": chosen, "measured": facts}, indent=2) + "\n"
    replace_file(path, text.encode())
    tuned.clear_cache()
    return path
