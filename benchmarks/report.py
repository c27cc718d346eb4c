"""Results files -> tables between markers in the Markdown files, and charts: ``python -m benchmarks.report``.

Reads ``benchmarks/results/<device>/*.json``, nothing else: a number in the documents is a number that
``benchmarks.run`` wrote. Run it again at any time; it replaces what it wrote before.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import check
from benchmarks.environment import RESULTS, ROOT

__all__ = ["main"]

Record = dict[str, Any]
IMAGES = ROOT / "docs" / "img"
# The README shows models; streaming frames and the first training step are in benchmarks/README.md.
README_CASES = (
    "vqvae-cifar",
    "vqgan-1024",
    "vqgan-16384",
    "vqgan-big",
    "encodec",
    "var",
    "llamagen",
    "dac",
    "ldm-f4",
)
PEERS = {"cdist": "torch.cdist + argmin", "addmm": "addmm + argmin", "compile": "torch.compile", "faiss": "faiss-cpu"}


def _times(value: float) -> str:
    return f"{value:.1f}x" if value < 100 else f"{value:.0f}x"


def _milliseconds(value: float) -> str:
    return (
        f"{value:.3f}"
        if value < 1
        else f"{value:.2f}"
        if value < 10
        else f"{value:.1f}"
        if value < 100
        else f"{value:.0f}"
    )


def _percent(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}"


def _markdown(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    rule = ["---" if i < left else "--:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def _conditions(records: list[Record]) -> str:
    """One sentence: where, with what, when."""
    stamps = [r["environment"] for r in records]
    first = stamps[0]
    versions = ", ".join(f"{k} {v}" for k, v in first["versions"].items() if v != "not installed" and k != "vqkernels")
    commits = " and ".join(sorted({s["commit"] for s in stamps}))
    dates = sorted({s["date"] for s in stamps})
    from benchmarks.charts import kernels

    isa = kernels(records)
    return (
        f"{first['device']['cpu']}, {first['threads']} threads for every contestant, {isa}; "
        f"{versions}; commit {commits}, {dates[0] if len(dates) == 1 else f'{dates[0]} to {dates[-1]}'}."
    )


def _ordered(cases: dict[str, Record], names: tuple[str, ...] | None = None) -> list[Record]:
    from benchmarks.cases import BY_NAME

    return [cases[name] for name in (names or tuple(BY_NAME)) if name in cases]


def _search_short(cases: dict[str, Record]) -> str:
    records = _ordered(cases, README_CASES)
    rows = []
    for r in records:
        speed = [_times(r["speedup"][p]["median"]) if p in r["speedup"] else "-" for p in PEERS]
        rows.append(
            [r["title"], r["size"], r["metric"], _milliseconds(r["results"]["vqkernels"]["ms"]["median"]), *speed]
        )
    header = ["search", "N x K x D", "metric", "vqkernels, ms", *(f"vs {title}" for title in PEERS.values())]
    return _markdown(header, rows, 3) + "\n\n" + "Medians of per-round ratios. " + _conditions(records)


def _search_long(cases: dict[str, Record]) -> str:
    records = _ordered(cases)
    rows = []
    for r in records:
        for i, (name, result) in enumerate(r["results"].items()):
            ms, share, ratio = result["ms"], result["fraction_of_peak"], r["speedup"].get(name)
            rows.append(
                [
                    f"{r['title']} ({r['size']}, {r['metric']})" if i == 0 else "",
                    result["title"],
                    f"{_milliseconds(ms['median'])} [{_milliseconds(ms['q25'])}, {_milliseconds(ms['q75'])}]",
                    f"{result['gflops']:.0f}",
                    "-" if share is None else f"{100 * share:.0f} % of {result['peak']}",
                    "" if ratio is None else f"{ratio['median']:.2f}x [{ratio['q25']:.2f}, {ratio['q75']:.2f}]",
                    _percent(result["wrong_rows_percent"]),
                ]
            )
    header = ["case", "contestant", "ms [quartiles]", "GFLOP/s", "of peak", "times as long as ours", "wrong rows, %"]
    checked = (
        f"Wrong rows: of the rows compared with the float64 oracle ({min(r['checked_rows'] for r in records)} or more)."
    )
    return _markdown(header, rows, 2) + f"\n\n{checked} " + _conditions(records)


def _peaks(cases: dict[str, Record]) -> str:
    from benchmarks.peak import LABELS, merge

    best = merge(*(r["peaks"] for r in cases.values()))
    rows = [[LABELS[name], f"{rate / 1e9:.0f}"] for name, rate in best.items()]
    return _markdown(["peak, all threads", "G/s"], rows)


def _train(cases: dict[str, Record]) -> str:
    rows = []
    for r in _ordered(cases):
        for kind, title in (("ema", "EMA"), ("learn", "learned, Adam")):
            ours, peer = r["results"].get(f"vqkernels-{kind}"), r["results"].get(f"vqtorch-{kind}")
            if ours is None or peer is None:
                continue
            ratio = r["speedup"][f"vqtorch-{kind}"]
            rows.append(
                [
                    r["title"],
                    r["size"],
                    title,
                    _milliseconds(ours["ms"]["median"]),
                    _milliseconds(peer["ms"]["median"]),
                    f"{_times(ratio['median'])} [{_times(ratio['q25'])}, {_times(ratio['q75'])}]",
                ]
            )
    header = [
        "training step",
        "N x K x D",
        "codebook",
        "vqkernels, ms",
        "vector-quantize-pytorch, ms",
        "ratio [quartiles]",
    ]
    note = "Forward, backward with a gradient from the decoder, codebook update; straight-through, the same settings. "
    return _markdown(header, rows, 3) + "\n\n" + note + _conditions(_ordered(cases))


def _memory(cases: dict[str, Record]) -> str:
    rows = []
    for r in _ordered(cases):
        for entry in r["results"].values():
            found = f"{entry['mib']:.1f}" if "mib" in entry else f"not run: {entry['not_run']}"
            rows.append(
                [
                    f"{r['title']} ({r['size']})",
                    {"search": "search", "train": "training step"}[entry["op"]],
                    entry["title"],
                    found,
                ]
            )
    header = ["case", "operation", "contestant", "peak memory added, MiB"]
    note = "By how much one call raises the resident set of a process that already holds inputs and parameters. "
    return _markdown(header, rows, 3) + "\n\n" + note + _conditions(_ordered(cases))


def _patched(cases: dict[str, Record]) -> str:
    rows = []
    for r in cases.values():
        ratio, memory = r["speedup"], r["memory_mib"]
        rows.append(
            [
                r["title"],
                {"encode": "encode", "train": "training step"}[r["work"]],
                r["size"] + (f", {r['levels']} levels" if r["levels"] > 1 else ""),
                *(_milliseconds(r["ms"][who]["median"]) for who in ("original", "patched")),
                f"{_times(ratio['median'])} [{_times(ratio['q25'])}, {_times(ratio['q75'])}]",
                *(f"{memory[who]:.1f}" if who in memory else "-" for who in ("original", "patched")),
                _percent(r["differs_percent"]),
            ]
        )
    header = ["quantizer", "work", "N x K x D", "original, ms", "patched, ms", "ratio [quartiles]"]
    header += ["original, MiB", "patched, MiB", "codes that differ, %"]
    note = (
        "Milliseconds are medians, MiB the rise of the peak during one call. Codes that differ: from the original's, "
        "over all levels; the patched codes of the first level were the exact ones. "
    )
    return _markdown(header, rows, 3) + "\n\n" + note + _conditions(list(cases.values()))


def _residual(cases: dict[str, Record]) -> str:
    rows = []
    for r in cases.values():
        ratio = r["speedup"]
        rows.append(
            [
                r["title"],
                f"{r['size']}, {r['levels']} levels",
                *(_milliseconds(r["ms"][who]["median"]) for who in ("plain", "asked", "searched")),
                *(
                    f"{_times(ratio[who]['median'])} [{_times(ratio[who]['q25'])}, {_times(ratio[who]['q75'])}]"
                    for who in ("plain", "asked")
                ),
                _milliseconds(r["ms"]["read"]["median"]),
                f"{100 * r['read_share']['median']:.0f} %" if r["read_share"]["median"] > 0.05 else "-",
            ]
        )
    header = ["case", "N x K x D", "cdist loop, ms", "level by level, ms", "one search, ms", "to the loop", "to levels"]
    header += ["codes read once, ms", "of our time"]
    note = (
        "Milliseconds are medians of one call of `ResidualVectorQuantizer` in eval (the loop: `torch.cdist`, arg-min, "
        "gather), ratios medians [quartiles] over rounds. Reading the codes is a sum over all of them. "
    )
    return _markdown(header, rows, 2) + "\n\n" + note + _conditions(list(cases.values()))


def _scaling(cases: dict[str, Record]) -> str:
    letter = {"rows": "N", "codes": "K", "dim": "D"}
    rows = []
    for axis, r in cases.items():
        fixed = ", ".join(f"{letter[k]} = {v}" for k, v in r["fixed"].items())
        span = f"{r['values'][0]} .. {r['values'][-1]}"
        took = f"{_milliseconds(r['ms'][0]['median'])} .. {_milliseconds(r['ms'][-1]['median'])}"
        rows.append([letter[axis], span, fixed, took, f"{r['exponent']:.2f}"])
    header = ["grows", "from .. to", "fixed", "ms", "time ~ size^"]
    return _markdown(header, rows, 3) + "\n\n" + _conditions(list(cases.values()))


def _floors(cases: dict[str, Record]) -> str:
    rows = []
    for r in _ordered(cases):
        floors = r["floors_ms"]
        if not floors:
            continue
        limit = max(floors, key=lambda name: floors[name])
        took = r["results"]["vqkernels"]["ms"]["median"]
        cells = [_milliseconds(floors[k]) if k in floors else "-" for k in ("products", "maximum", "bytes")]
        rows.append([r["title"], r["size"], *cells, _milliseconds(took), limit, f"{100 * floors[limit] / took:.0f} %"])
    header = ["case", "N x K x D", "products", "maximum", "bytes", "measured", "binding floor", "reached"]
    return _markdown(header, rows, 2) + "\n\nMilliseconds. " + _conditions(_ordered(cases))


def _memory_short(cases: dict[str, Record]) -> str:
    record = cases["llamagen-256"]
    rows = []
    for entry in record["results"].values():
        found = f"{entry['mib']:.0f}" if "mib" in entry else f"not run: {entry['not_run']}"
        rows.append([{"search": "search", "train": "training step"}[entry["op"]], entry["title"], found])
    header = [f"{record['title']}, {record['size']}", "", "peak memory added, MiB"]
    return _markdown(header, rows, 2) + "\n\n" + _conditions([record])


def _wrong(record: Record) -> str:
    others = [
        f"{r['title']} {_percent(r['wrong_rows_percent'])} %" for name, r in record["results"].items() if name in PEERS
    ]
    return (
        f"How often others miss it, in the first training step of a VQGAN ({record['size']}, codes U(-1/K, 1/K), "
        f"{record['checked_rows']} rows compared with the float64 oracle): {', '.join(others)}; "
        f"vqkernels {_percent(record['results']['vqkernels']['wrong_rows_percent'])} %. "
    ) + _conditions([record])


def _bars(results: check.Results) -> str:
    text, _ = check.table(results)
    return f"```text\n{text}\n```"


def _replace(path: Path, name: str, text: str) -> bool:
    """Put ``text`` between ``<!-- results:name -->`` and ``<!-- /results:name -->``; False if they are not there."""
    if not path.exists():
        return False
    old = path.read_text()
    pattern = re.compile(rf"(<!-- results:{name} -->\n).*?(<!-- /results:{name} -->)", re.DOTALL)
    if not pattern.search(old):
        return False
    new = pattern.sub(lambda m: f"{m.group(1)}{text}\n{m.group(2)}", old)
    if new != old:
        path.write_text(new)
    return True


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--results", type=Path, help="folder of results files (default: the newest of benchmarks/results)"
    )
    parser.add_argument("--docs", type=Path, default=ROOT, help="root of the Markdown files (default: this repository)")
    options = parser.parse_args(arguments)
    folders = [p for p in RESULTS.glob("*") if any(p.glob("*.json")) and not (p / "gpu.json").exists()]
    folder = options.results or max(
        folders, key=lambda p: max(f.stat().st_mtime for f in p.glob("*.json")), default=None
    )
    if folder is None:
        print("no results yet: run `python -m benchmarks.run --all` first", file=sys.stderr)
        return 1
    results = check.load(folder)
    sections = {"bars": _bars(results)}
    if cases := results.get("search"):
        sections |= {"search-short": _search_short(cases), "search": _search_long(cases), "peaks": _peaks(cases)}
        sections["floors"] = _floors(cases)
        if "vqgan-init" in cases:
            sections["wrong"] = _wrong(cases["vqgan-init"])
    if cases := results.get("train"):
        sections["train"] = _train(cases)
    if cases := results.get("memory"):
        sections["memory"] = _memory(cases)
        if "llamagen-256" in cases:
            sections["memory-short"] = _memory_short(cases)
    if cases := results.get("scaling"):
        sections["scaling"] = _scaling(cases)
    if cases := results.get("patched"):
        sections["patched"] = _patched(cases)
    if cases := results.get("residual"):
        sections["residual"] = _residual(cases)
    from benchmarks import charts, gpu_report

    images = charts.draw(results, options.docs / IMAGES.relative_to(ROOT))
    if (gpu := gpu_report.newest()) is not None:
        sections |= gpu_report.sections(gpu_report.load(gpu))
    for document in (
        "README.md",
        "benchmarks/README.md",
        "benchmarks/NOTES.md",
        "docs/gpu.md",
        "docs/drop-in.md",
        "docs/drop-in-models.md",
        "docs/quantizers.md",
    ):
        path = options.docs / document
        for image in images:
            kind = image.stem.removeprefix("bench-")
            link = os.path.relpath(image, path.parent).replace(os.sep, "/")
            sections[f"chart-{kind}"] = f"![{charts.ALT[kind]}]({link})"
        written = [name for name, text in sections.items() if _replace(path, name, text)]
        print(f"{document}: {', '.join(written) or 'no markers'}")
    print(f"charts: {', '.join(i.name for i in images) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
