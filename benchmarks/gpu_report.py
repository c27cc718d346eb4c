"""Results of a GPU -> tables and a chart, and how they stand against the targets of this project.

Called by ``gpu`` after a run and by ``report`` for the documents. Reads ``results/<device>/gpu.json``, nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS

__all__ = ["chart", "newest", "sections", "targets"]

Record = dict[str, Any]
# Stage, case, milliseconds at most (of the best of ours), or times as fast as a peer at least.
TARGETS: tuple[tuple[str, str, str, float], ...] = (
    ("search", "vqgan", "ms", 1.6),
    ("search", "llamagen", "ms", 0.2),
    ("search", "ibq", "ms", 25.0),
    ("search", "var", "ms", 0.2),
    ("residual", "encodec-8", "ms", 0.25),
    ("update", "vqgan", "ms", 0.15),
    *(("train", case, "vqtorch-ema", 10.0) for case in ("vqgan", "llamagen", "encodec", "cifar")),
    *(("search", case, "flash-kmeans", 1.0) for case in ("vqgan", "ibq", "encodec", "mimi", "var")),
)


def newest() -> Path | None:
    """The folder of results with the youngest ``gpu.json``."""
    found = list(RESULTS.glob("*/gpu.json")) if RESULTS.exists() else []
    return max(found, key=lambda p: p.stat().st_mtime).parent if found else None


def load(folder: Path) -> Record:
    """The results of one device."""
    data: Record = json.loads((folder / "gpu.json").read_text())
    return data


def _ours(record: Record) -> str | None:
    """The fastest of ours."""
    names = [n for n in record["results"] if n.startswith("vqkernels")]
    return min(names, key=lambda n: record["results"][n]["ms"]["median"], default=None)


def targets(data: Record) -> list[tuple[str, str, str]]:
    """What was aimed at, what was measured, the verdict."""
    rows = []
    for stage, case, kind, limit in TARGETS:
        record = data["stages"].get(stage, {}).get(case)
        sign = f"<= {limit:g} ms" if kind == "ms" else f">= {limit:g}x {kind}"
        what = f"{stage} {case} {sign}"
        name = None if record is None else _ours(record)
        if record is None or name is None or (kind != "ms" and kind not in record["results"]):
            rows.append((what, "-", "not measured"))
            continue
        took = record["results"][name]["ms"]["median"]
        value = took if kind == "ms" else record["results"][kind]["ms"]["median"] / took
        good = value <= limit if kind == "ms" else value >= limit
        rows.append((what, f"{value:.3g} ({name})", "ok" if good else "MISSED"))
    return rows


def _markdown(header: list[str], rows: list[list[str]], left: int) -> str:
    rule = ["---" if i < left else "--:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def _conditions(data: Record) -> str:
    e = data["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in e["versions"].items() if v != "not installed")
    p = {k: v / 1e12 for k, v in data["peaks"].items()}
    return (
        f"{e['device']['name']} ({versions}; commit {e['commit']}, {e['date']}). In the same run: fp16 product "
        f"{p['fp16']:.0f}, TF32 {p['tf32']:.0f}, fp32 {p['fp32']:.0f} TFLOP/s, copy {p['bytes']:.2f} TB/s. Device time "
        "with a cold L2, medians of rounds in which contestants take turns."
    )


def sections(data: Record) -> dict[str, str]:
    """Marker -> Markdown."""
    stages, found = data["stages"], {}
    if records := stages.get("search"):
        rows = []
        for r in records.values():
            for i, (name, result) in enumerate(r["results"].items()):
                ms, ratio = result["ms"], r["speedup"].get(name)
                rows.append([
                    f"{r['title']} ({r['size']}, {r['metric']}, {r['dtype']})" if i == 0 else "", result["title"],
                    f"{ms['median']:.3f} [{ms['q25']:.3f}, {ms['q75']:.3f}]", f"{result['tflops']:.0f}",
                    f"{100 * result['share_of_floor']:.0f} %", "" if ratio is None else f"{ratio['median']:.2f}x",
                    f"{result['wrong_rows_percent']:.2g}",
                ])  # fmt: skip
            rows += [["", name, f"not run: {why}", "", "", "", ""] for name, why in r["skipped"].items()]
        header = ["case", "contestant", "ms [quartiles]", "TFLOP/s", "of the floor", "times ours", "wrong rows, %"]
        found["gpu-search"] = _markdown(header, rows, 2) + "\n\n" + _conditions(data)
    if records := stages.get("few"):
        rows = [
            [str(r["rows"]), result["title"], f"{result['device_us']:.0f}", f"{result['eager_us']:.0f}",
             f"{result['graph_us']:.0f}" if "graph_us" in result else "-"]
            for r in records.values() for result in r["results"].values()
        ]  # fmt: skip
        header = ["rows", "contestant", "device, us", "eager call, us", "graph launch, us"]
        found["gpu-few"] = _markdown(header, rows, 2) + "\n\n2048 codes of 256 dims. " + _conditions(data)
    if records := stages.get("residual"):
        rows = []
        for r in records.values():
            for i, (name, result) in enumerate(r["results"].items()):
                ratio, few = r["speedup"].get(name), "eager_us" in result
                rows.append([
                    f"{r['title']} ({r['size']})" if i == 0 else "", result["title"],
                    f"{result['ms']['median']:.3f}", "" if ratio is None else f"{ratio['median']:.2f}x",
                    f"{result['eager_us']:.0f}" if few else "",
                    f"{result['graph_us']:.0f}" if "graph_us" in result else "", f"{result['wrong_rows_percent']:.2g}",
                ])  # fmt: skip
            rows += [["", name, f"not run: {why}", "", "", "", ""] for name, why in r["skipped"].items()]
        header = ["case", "contestant", "ms", "times ours", "eager call, us", "graph launch, us", "wrong rows, %"]
        found["gpu-residual"] = _markdown(header, rows, 2) + "\n\n" + _conditions(data)
    for stage in ("update", "train"):
        if records := stages.get(stage):
            rows = []
            for r in records.values():
                for i, (name, result) in enumerate(r["results"].items()):
                    ratio = r["speedup"].get(name)
                    rows.append([
                        f"{r['title']} ({r['size']})" if i == 0 else "", result["title"],
                        f"{result['ms']['median']:.3f}", "" if ratio is None else f"{ratio['median']:.2f}x",
                    ])  # fmt: skip
                rows += [["", name, f"not run: {why}", ""] for name, why in r["skipped"].items()]
            found[f"gpu-{stage}"] = (
                _markdown(["case", "contestant", "ms", "times ours"], rows, 2) + "\n\n" + _conditions(data)
            )
    if records := stages.get("memory"):
        rows = [
            [f"{r['title']} ({r['size']})", e["op"], e["title"], f"{e['mib']:.1f}" if "mib" in e else e["not_run"]]
            for r in records.values() for e in r["results"].values()
        ]  # fmt: skip
        found["gpu-memory"] = _markdown(["case", "operation", "contestant", "peak added, MiB"], rows, 3)
    found["gpu-targets"] = _markdown(["target", "measured", ""], [list(row) for row in targets(data)], 1)
    return found


def chart(data: Record, path: Path) -> bool:
    """Bars of the searches over torch.cdist + argmin; False without matplotlib or results."""
    records = [r for r in data["stages"].get("search", {}).values() if "cdist" in r["results"] and _ours(r)]
    try:
        import matplotlib
    except ImportError:
        return False
    if not records:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from benchmarks.charts import DARK, INK, OURS, PEER, _bars

    def over(r: Record, name: str | None) -> float | None:
        if name not in r["results"]:
            return None
        return float(r["results"]["cdist"]["ms"]["median"] / r["results"][name]["ms"]["median"])

    figure, axes = plt.subplots(figsize=(8, 0.7 * len(records) + 1.2), layout="constrained")
    groups = [
        ("vqkernels (exact)", OURS, [over(r, _ours(r)) for r in records]),
        ("flash-kmeans, TF32", DARK, [over(r, "flash-kmeans") for r in records]),
        ("addmm + argmin, TF32", PEER, [over(r, "addmm-tf32") for r in records]),
    ]
    _bars(axes, [f"{r['title']}\n{r['size']}" for r in records], groups, "x")
    axes.set_xscale("log")
    axes.axvline(1, color=INK, linewidth=0.8, zorder=3)
    axes.set_xlabel("times as fast as torch.cdist + argmin (log scale)")
    e = data["environment"]
    axes.set_title(f"Nearest-code search, {e['device']['name']}", loc="left", weight="bold", fontsize=12)
    figure.text(0, -0.02, f"torch {e['versions']['torch']}; commit {e['commit']}, {e['date']}", fontsize=7.5, va="top")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, bbox_inches="tight", dpi=160)
    plt.close(figure)
    return True
