"""The charts of the results: speed-up of the search, training step, memory, scaling.

Called by ``report``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ALT", "draw", "kernels"]

Record = dict[str, Any]
ALT = {
    "search": "Speed-up of the nearest-code search over torch.cdist + argmin, per model",
    "train": "Speed-up of a training step over vector-quantize-pytorch, per model",
    "memory": "Peak memory that one call adds",
    "scaling": "Time against N, K and D",
}
OURS, PEER, DARK, INK = "#0b7a75", "#9bb7c4", "#5b7c8d", "#222222"


def draw(results: dict[str, dict[str, Record]], folder: Path) -> list[Path]:
    """Draw what there are results for.

    Returns:
        The files written.
    """
    try:
        import matplotlib
    except ImportError:
        print("no charts: matplotlib is not installed (pip install matplotlib)")
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.color": INK,
            "axes.labelcolor": INK,
            "figure.facecolor": "white",
            "savefig.dpi": 160,
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, plot in (("search", _search), ("train", _train), ("memory", _memory), ("scaling", _scaling)):
        if cases := results.get(kind):
            figure = plot(plt, cases)
            if figure is None:
                continue
            path = folder / f"bench-{kind}.png"
            figure.savefig(path, bbox_inches="tight", pad_inches=0.15)
            plt.close(figure)
            written.append(path)
    return written


def kernels(records: list[Record]) -> str:
    """Which of our kernels ran: the instruction set is chosen by shape."""
    names = {"amx": "AMX", "avx512bf16": "AVX512-BF16", "avx512": "AVX-512", "avx2": "AVX2"}
    ran = {r.get("isa", r["environment"]["native"].get("isa", "reference")) for r in records}
    return " and ".join(names.get(isa, isa) for isa in sorted(ran)) + " kernels"


def _caption(figure: Any, records: list[Record], more: str = "") -> None:
    stamp = records[0]["environment"]
    v = stamp["versions"]
    isa = kernels(records)
    lines = [
        f"{stamp['device']['cpu']}, {stamp['threads']} threads, {isa}; float32 in, exact indices.",
        f"torch {v['torch']}, faiss {v['faiss-cpu']}, vector-quantize-pytorch {v['vector-quantize-pytorch']}; "
        f"commit {stamp['commit']}, {stamp['date'].split()[0]}. {more}",
    ]
    below = -0.08 / figure.get_figheight()
    figure.text(0.0, below, "\n".join(lines), fontsize=7.5, color="#666666", va="top", ha="left")


def _bars(axes: Axes, labels: list[str], groups: list[tuple[str, str, list[float | None]]], unit: str) -> None:
    """Horizontal groups of bars with their values, first group on top."""
    height = 0.8 / len(groups)
    for g, (title, colour, values) in enumerate(groups):
        for i, value in enumerate(values):
            if value is None:
                continue
            y = i + (g - (len(groups) - 1) / 2) * height
            axes.barh(y, value, height * 0.92, color=colour, label=title if i == 0 else None, zorder=2)
            text = f"{value:.1f}{unit}" if value < 100 else f"{value:.0f}{unit}"
            weight = "bold" if colour == OURS else "normal"
            axes.annotate(
                text, (value, y), (3, 0), textcoords="offset points", va="center", fontsize=7.5, weight=weight
            )
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e6e6e6", zorder=0)


def _search(plt: Any, cases: dict[str, Record]) -> Any:
    from benchmarks.report import README_CASES

    records = [cases[name] for name in README_CASES if name in cases and cases[name].get("over_cdist")]
    if not records:
        return None
    figure, axes = plt.subplots(figsize=(8, 0.62 * len(records) + 0.9), layout="constrained")
    labels = [f"{r['title']}\n{r['size']}" for r in records]
    groups = [
        (title, colour, [r["over_cdist"].get(name, {}).get("median") for r in records])
        for name, title, colour in (
            ("vqkernels", "vqkernels (exact)", OURS),
            ("faiss", "faiss-cpu", DARK),
            ("compile", "torch.compile(addmm + argmin)", PEER),
        )
    ]
    _bars(axes, labels, groups, "x")
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1x", "2x", "5x", "10x", "20x", "50x", "100x"])
    values = [v for _, _, group in groups for v in group if v is not None]
    axes.set_xlim(0.8 * min([0.7, *values]), 1.5 * max(values))
    axes.set_ylim(len(records) - 0.45, -0.55)
    axes.axvline(1, color=INK, linewidth=0.8, zorder=3)
    axes.set_xlabel("times as fast as torch.cdist + argmin (log scale)")
    axes.tick_params(axis="y", labelsize=8.5)
    axes.set_title("Nearest-code search", loc="left", weight="bold", fontsize=12, pad=24)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8.5, borderaxespad=0.2)
    _caption(figure, records, "Medians of per-round ratios.")
    return figure


def _train(plt: Any, cases: dict[str, Record]) -> Any:
    records = [r for r in cases.values() if "vqtorch-ema" in r["speedup"]]
    if not records:
        return None
    figure, axes = plt.subplots(figsize=(8, 0.55 * len(records) + 1.1), layout="constrained")
    labels = [f"{r['title']}\n{r['size']}" for r in records]
    groups = [
        ("EMA codebook", OURS, [r["speedup"]["vqtorch-ema"]["median"] for r in records]),
        ("learned codebook (Adam)", PEER, [r["speedup"].get("vqtorch-learn", {}).get("median") for r in records]),
    ]
    _bars(axes, labels, groups, "x")
    axes.axvline(1, color=INK, linewidth=0.8, zorder=3)
    axes.margins(x=0.12)
    axes.set_xlabel("times as fast as vector-quantize-pytorch")
    axes.tick_params(axis="y", labelsize=8.5)
    axes.set_title("Training step: forward, backward, update", loc="left", weight="bold", fontsize=12, pad=24)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8.5, borderaxespad=0.2)
    axes.set_ylim(len(records) - 0.45, -0.55)
    _caption(figure, records, "Medians of per-round ratios.")
    return figure


def _memory(plt: Any, cases: dict[str, Record]) -> Any:
    records = list(cases.values())
    figure, panels = plt.subplots(
        len(records), 1, figsize=(8, 1.9 * len(records) + 0.4), squeeze=False, layout="constrained"
    )
    for axes, r in zip(panels[:, 0], records, strict=True):
        entries = list(r["results"].values())
        operation = {"search": "search", "train": "training step"}
        labels = [
            f"{operation[e['op']]}: {e['title'].replace('vector-quantize-pytorch', 'vq-pytorch')}" for e in entries
        ]
        measured = [e["mib"] for e in entries if "mib" in e]
        for i, e in enumerate(entries):
            if "mib" not in e:
                axes.annotate(
                    e["not_run"], (0.1, i), (3, 0), textcoords="offset points", va="center", fontsize=7, style="italic"
                )
                continue
            value = max(e["mib"], 0.1)
            axes.barh(i, value, 0.75, color=OURS if "vqkernels" in e["title"] else PEER, zorder=2)
            text = (
                f"{e['mib']:.1f} MiB"
                if e["mib"] < 100
                else f"{e['mib'] / 1024:.2f} GiB"
                if e["mib"] >= 1000
                else f"{e['mib']:.0f} MiB"
            )
            axes.annotate(text, (value, i), (3, 0), textcoords="offset points", va="center", fontsize=7.5)
        axes.set_yticks(range(len(labels)), labels, fontsize=7.5)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlim(0.1, 6 * max([*measured, 1.0]))
        axes.grid(axis="x", color="#e6e6e6", zorder=0)
        axes.set_title(f"{r['title']}, {r['size']}", loc="left", fontsize=9)
    panels[-1, 0].set_xlabel("peak memory that one call adds, MiB (log scale)")
    figure.suptitle("Memory", x=0.01, ha="left", weight="bold", fontsize=12)
    _caption(figure, records)
    return figure


def _scaling(plt: Any, cases: dict[str, Record]) -> Any:
    letter = {"rows": "N", "codes": "K", "dim": "D"}
    figure, panels = plt.subplots(
        1, len(cases), figsize=(3.1 * len(cases), 2.9), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (axis, r) in zip(panels[0], cases.items(), strict=True):
        values, took = r["values"], [m["median"] for m in r["ms"]]
        line = [took[-1] * v / values[-1] for v in values]
        axes.plot(values, line, color="#bbbbbb", linewidth=1.2, linestyle="--", label="linear")
        axes.errorbar(
            values,
            took,
            yerr=[[m["median"] - m["q25"] for m in r["ms"]], [m["q75"] - m["median"] for m in r["ms"]]],
            color=OURS,
            marker="o",
            markersize=4,
            linewidth=1.5,
            label="measured",
        )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(letter[axis])
        axes.grid(color="#eeeeee")
        fixed = ", ".join(f"{letter[k]} = {v}" for k, v in r["fixed"].items())
        axes.set_title(f"time ~ {letter[axis]}^{r['exponent']:.2f}\n{fixed}", fontsize=9)
    panels[0, 0].set_ylabel("milliseconds")
    panels[0, 0].legend(frameon=False, fontsize=8)
    _caption(figure, list(cases.values()))
    return figure
