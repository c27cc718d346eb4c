"""Measure vqkernels against its peers on this machine: ``python -m benchmarks.run --help``.

Writes ``benchmarks/results/<device>/{search,train,memory,scaling}.json``; ``python -m benchmarks.report`` makes the
tables and charts of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import BY_NAME, MEMORY, SEARCH, TRAIN, shrink

PEERS = ("cdist", "addmm", "compile", "faiss", "reference")
ISAS = ("auto", "scalar", "avx2", "avx512", "avx512bf16", "amx")
OPS = ("search", "train", "memory", "scaling")
EXAMPLES = """\
examples:
  python -m benchmarks.run --all                                         everything (minutes), then the bars
  python -m benchmarks.run --case vqgan-big --peer cdist faiss           one search against two peers
  python -m benchmarks.run --case var --isa auto avx2 avx512             one search, instruction sets forced
  python -m benchmarks.run --op train --case encodec llamagen            training steps
  python -m benchmarks.run --op memory                                   peak memory
  python -m benchmarks.run --all --quick                                 tiny sizes: does it run? (nothing is saved)
  python -m benchmarks.run --check                                       saved results against the bars

Times of short runs mean little on a machine that others use: ratios are formed round by round, with contestants
taking turns, and their quartiles are printed. No speed is reported of a search whose indices are not the oracle's.
"""


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Speed and memory of vqkernels against its peers, behind a correctness gate.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--all", action="store_true", help="all operations on their default cases")
    parser.add_argument("--op", nargs="+", choices=OPS, default=["search"], help="what to measure (default: search)")
    parser.add_argument("--case", nargs="+", choices=list(BY_NAME), metavar="CASE", help=f"of {', '.join(BY_NAME)}")
    parser.add_argument("--peer", nargs="*", choices=PEERS, metavar="PEER", help=f"of {', '.join(PEERS)}")
    parser.add_argument(
        "--isa", nargs="+", choices=ISAS, default=["auto"], help="instruction sets to force, beside auto"
    )
    parser.add_argument("--threads", type=int, default=cores, help="for us and for every peer (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=15, help="turns of each contestant at most (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="per case; at least 5 rounds (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the records to this file instead of results/<device>/")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="instead of benchmarks/results/<device>")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, three rounds; saved only with --json, --results"
    )
    parser.add_argument("--resume", action="store_true", help="skip cases that were measured at this very commit")
    parser.add_argument("--check", action="store_true", help="compare saved results with the acceptance bars")
    options = parser.parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    if options.threads < 1 or options.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    return options


def _limit_threads(threads: int) -> None:
    """Every pool, also those that only read the environment when they are loaded (OpenBLAS in faiss)."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    import torch

    torch.set_num_threads(threads)


class _Results:
    """Records by operation and case, saved after each."""

    def __init__(self, options: argparse.Namespace, environment: dict[str, Any]) -> None:
        from benchmarks import environment as env

        self.stamp = {**environment, "commit": env.commit(), "command": _command(options.arguments)}
        self.path: Path | None = options.json
        self.folder = None if options.json else options.results or (None if options.quick else env.results_folder())
        self.new: list[dict[str, Any]] = []

    def _file(self, kind: str) -> dict[str, Any]:
        path = None if self.folder is None else self.folder / f"{kind}.json"
        empty: dict[str, Any] = {"kind": kind, "cases": {}}
        return json.loads(path.read_text()) if path is not None and path.exists() else empty

    def done(self, kind: str, case: str) -> bool:
        """Whether it was measured with this very code and number of threads."""
        stamp = self._file(kind)["cases"].get(case, {}).get("environment", {})
        same = all(stamp.get(key) == self.stamp[key] for key in ("commit", "threads", "device", "versions"))
        return same and not self.stamp["commit"].endswith("+")

    def save(self, kind: str, record: dict[str, Any]) -> None:
        """Add one record."""
        from benchmarks import environment as env

        record = {**record, "environment": {**self.stamp, "date": env.now()}}
        self.new.append({"kind": kind, **record})
        if self.path is not None:
            env.write_json(self.path, {"records": self.new})
        elif self.folder is not None:
            data = self._file(kind)
            data["cases"][record["case"]] = record
            env.write_json(self.folder / f"{kind}.json", data)


def _command(arguments: list[str]) -> str:
    hidden = ("--json", "--results")  # paths of a machine stay out of the results
    words = [a for i, a in enumerate(arguments) if a not in hidden and (i == 0 or arguments[i - 1] not in hidden)]
    return " ".join(["python -m benchmarks.run", *words])


def _print_search(record: dict[str, Any]) -> None:
    for name, r in record["results"].items():
        ms, share = r["ms"], r["fraction_of_peak"]
        text = (
            f"    {name:<21} {ms['median']:>10.3f} ms  [{ms['q25']:.3f}, {ms['q75']:.3f}]  {r['gflops']:>8.1f} GFLOP/s"
        )
        text += "" if share is None else f"  {100 * share:5.1f} % of {r['peak']} peak"
        if (ratio := record["speedup"].get(name)) is not None:
            text += f"  {ratio['median']:.2f}x ours [{ratio['q25']:.2f}, {ratio['q75']:.2f}]"
        text += f"  wrong rows {r['wrong_rows_percent']:.3g} %"
        print(text)
    for isa, peers in record["speedup_by_isa"].items():
        print(f"    with {isa}: " + ", ".join(f"{p} {r['median']:.2f}x" for p, r in peers.items()))
    for name, reason in record["skipped"].items():
        print(f"    {name}: not run: {reason}")


def _print_train(record: dict[str, Any]) -> None:
    for name, r in record["results"].items():
        ms = r["ms"]
        text = f"    {name:<21} {ms['median']:>10.3f} ms  [{ms['q25']:.3f}, {ms['q75']:.3f}]"
        if (ratio := record["speedup"].get(name)) is not None:
            text += f"  {ratio['median']:.2f}x ours [{ratio['q25']:.2f}, {ratio['q75']:.2f}]"
        print(text + f"  wrong rows {r['wrong_rows_percent']:.3g} %")
    for name, reason in record["skipped"].items():
        print(f"    {name}: not run: {reason}")


def _print_peaks(peaks: dict[str, float], reason: str | None) -> None:
    from benchmarks import peak

    if reason is not None:
        print(f"peaks: not measured: {reason}")
    for name, rate in peaks.items():
        print(f"  peak, {peak.LABELS[name]}: {rate / 1e9:.1f} G/s")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if a gate failed or, with ``--check``, a bar was missed."""
    options = _parse(arguments)
    from benchmarks import check
    from benchmarks import environment as env

    ran = options.all or not options.check
    status = 0
    if ran:
        status = _measure(options)
    if options.check or (options.all and not options.quick and options.json is None):
        folder = options.results or env.results_folder()
        results = check.load(folder)
        text, good = check.table(results)
        print(f"\nbars, from the results in {folder.name}:\n{text}")
        record = results.get("search", {}).get("vqgan-big", {})
        _print_peaks(record.get("peaks", {}), None if record else "no results yet")
        if options.check and not good:
            status = 1
    return status


def _measure(options: argparse.Namespace) -> int:
    _limit_threads(options.threads)
    if len(options.isa) > 1 or options.all:
        # Room for the packed codebooks of all instruction sets at once, so that none is packed anew in every round.
        os.environ.setdefault("VQKERNELS_CACHE_MB", "256")
    from benchmarks import environment as env
    from benchmarks import peak, stages

    begin = time.monotonic()
    results = _Results(options, env.describe(options.threads))
    stamp = results.stamp
    print(f"{stamp['device']['cpu']}, {options.threads} threads; {stamp['versions']}; commit {stamp['commit']}")
    if (reason := stamp["native"].get("unavailable")) is not None:
        print(f"no native library ({reason}): the reference backend is measured")
    peaks, reason = peak.measure(options.threads)
    _print_peaks(peaks, reason)

    rounds = 3 if options.quick else options.rounds
    operations = OPS if options.all else tuple(options.op)
    failed = []
    for op in operations:
        defaults = {"search": SEARCH, "train": TRAIN, "memory": MEMORY, "scaling": ("scaling",)}[op]
        cases = defaults if options.all or not options.case or op == "scaling" else tuple(options.case)
        for number, name in enumerate(cases, 1):
            first = {"scaling": "rows"}.get(op, name)
            if options.resume and results.done(op, first):
                print(f"[{op} {number}/{len(cases)}] {name}: measured before at this commit, skipped")
                continue
            size = "" if op == "scaling" else f" ({(shrink(BY_NAME[name]) if options.quick else BY_NAME[name]).size})"
            print(f"[{op} {number}/{len(cases)}] {name}{size}, {time.monotonic() - begin:.0f} s so far", flush=True)
            try:
                if op == "search":
                    isas = ["avx2", "avx512", "avx512bf16"] if options.all and name == "vqgan-big" else options.isa
                    # A neighbour may have slowed the first probe: the best of all counts.
                    peaks = peak.merge(peaks, peak.measure(options.threads)[0])
                    record = stages.measure_search(
                        name, options.peer, isas, rounds, options.seconds, peaks, options.quick
                    )
                    _print_search(record)
                    results.save(op, record)
                elif op == "train":
                    record = stages.measure_train(name, rounds, options.seconds, peaks, options.quick)
                    _print_train(record)
                    results.save(op, record)
                elif op == "memory":
                    record = stages.measure_memory(name, options.threads, options.quick)
                    for key, r in record["results"].items():
                        found = f"{r['mib']:.1f} MiB" if "mib" in r else f"not run: {r['not_run']}"
                        print(f"    {r['op']:<6} {key:<16} {found}")
                    results.save(op, record)
                else:
                    for record in stages.measure_scaling(min(rounds, 7), options.seconds, options.quick):
                        print(f"    {record['case']}: time ~ {record['case']}^{record['exponent']:.3f}")
                        results.save(op, record)
            except stages.GateFailed as e:
                print(f"    NOT REPORTED, the correctness gate failed: {e}")
                failed.append(f"{op} {name}")
    print(f"{time.monotonic() - begin:.0f} s in all")
    if failed:
        print(f"correctness gate failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
