"""What runs on a GPU leave behind: outcomes that add up over several calls, and the file that ``backend="auto"`` reads.

Called by ``gpu``. A call may run some steps only; what earlier calls found counts as long as nothing that it depends on
has changed: device, versions, commit, and the hashes of the kernels.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, write_json

__all__ = ["PROOF", "SANITIZERS", "carried", "sources", "table", "verdict"]

Record = dict[str, Any]
# What must be green before "auto" may choose these kernels, and what must not have found anything.
PROOF = ("blocks", "selftest", "smoke", "tests")
SANITIZERS = ("memcheck", "racecheck")


def sources(device: str) -> dict[str, str]:
    """Hash of the kernels by backend, as :func:`vqkernels.tuned.untrusted` compares it; of those that can run there."""
    from vqkernels import _cuda, dispatch, tuned

    found = {b.name for b in dispatch.BACKENDS if b.probe(device) is None}
    hashes = {"triton": tuned.triton_sources() if "triton" in found else None}
    if device == "cuda" and "native" in found:
        hashes["native"] = _cuda.sources()
    return {name: value for name, value in sorted(hashes.items()) if value is not None}


def _same(a: Record, b: Record) -> str | None:
    """The first thing in which two runs differ, or ``None``."""
    for key in ("device", "versions", "commit", "sources", "quick"):
        if a.get(key) != b.get(key):
            return key
    return None


def _read(path: Path) -> Record | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def carried(output: Path, stamp: Record, now: set[str]) -> tuple[list[Record], str | None]:
    """Outcomes of earlier calls for steps that are not in ``now``, and why they do not count if they do not."""
    run = _read(output / "run.json")
    if run is None:
        return [], None
    kept = [step for step in run.get("steps", []) if step["step"] not in now]
    if kept and (what := _same(run, stamp)) is not None:
        return [], f"results of an earlier call are left out: another {what.removesuffix('s')}"
    return kept, None


def table(stages: Record) -> dict[str, list[Record]]:
    """Measured milliseconds by op and size, for :func:`vqkernels.tuned.choice`.

    A search of a few rows counts with what an eager caller waits for, launches included, all else with the time that
    the device takes. Of two cases with the same sizes the first counts.
    """
    found: dict[str, list[Record]] = {}
    for stage in ("search", "few", "residual", "ops"):
        for record in stages.get(stage, {}).values():
            times = {
                name.removeprefix("vqkernels-"): max(r["device_us"], r["eager_us"]) / 1e3
                if "eager_us" in r
                else r["ms"]["median"]
                for name, r in record["results"].items()
                if name.startswith("vqkernels-")
            }
            entry = {key: record[key] for key in ("rows", "codes", "dim")}
            entries = found.setdefault(record.get("op", "nearest"), [])
            if times and not any(all(e[k] == entry[k] for k in entry) for e in entries):
                entries.append({"case": record.get("size", record["case"]) if stage == "ops" else record["case"],
                                **entry, "milliseconds": times})  # fmt: skip
    return {op: entries for op, entries in found.items() if entries}


def verdict(output: Path, stamp: Record, outcomes: list[Record], device: str) -> str:
    """Write tuned.json: configurations and the table if they were measured, the record if the proof is green."""
    from vqkernels import tuned

    name, path = stamp["device"]["name"], output / "tuned.json"
    slug = tuned.slug(name)
    content: Record = {"schema": tuned.SCHEMA, "device": name, "nearest": {}}
    before = _read(path) or {}
    measured = _read(output / "tuned" / f"{slug}.json") or (before if before.get("device") == name else {})
    content |= {key: measured[key] for key in ("nearest", "measured") if key in measured}
    bench = _read(output / "gpu.json") or {}
    lines = []
    counts = device == "cuda" and not stamp.get("quick")  # few tests and tiny sizes prove nothing
    if bench and counts:
        if (what := _same(bench.get("environment", {}), stamp)) is not None:
            lines.append(f'gpu.json is of another {what.removesuffix("s")}: no table for "auto" was written from it')
        elif found := table(bench["stages"]):
            content["auto"] = found
            content["auto_measured"] = {k: stamp[k] for k in ("commit", "date", "versions", "sources")}
    status = {o["step"]: o["status"] for o in outcomes}
    missing = [step for step in PROOF if status.get(step) != "ok"]
    bad = [step for step in SANITIZERS if status.get(step) == "FAILED"]
    if not missing and not bad and counts:
        content["verified"] = {
            "commit": stamp["commit"], "date": stamp["date"], **stamp["versions"], "sources": stamp["sources"],
        }  # fmt: skip
    shutil.rmtree(output / "tuned", ignore_errors=True)
    write_json(path, content)
    if "verified" not in content:
        why = ", ".join(f"{s}: {status.get(s, 'not run')}" for s in (*missing, *bad)) or (
            "--quick" if device == "cuda" else "not a GPU"
        )
        return "\n".join([*lines, f'backend="auto" goes on not choosing these kernels here ({why})'])
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    chosen = "CUDA or Triton by measured times" if "auto" in content else "Triton (CUDA needs the step bench)"
    return "\n".join([
        *lines,
        f'GREEN. To let backend="auto" choose {chosen} on {name}: cp {shown} vqkernels/tuned/{slug}.json, '
        "commit it with these results, and say so in docs/gpu.md",
    ])  # fmt: skip
