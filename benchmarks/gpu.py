"""Everything that a GPU has to say about this package, in one command: ``python -m benchmarks.gpu --help``.

`make gpu` builds and calls it. Each step is a process with a time budget; what it finds is written to
``benchmarks/results/<device>/`` in at most seven small files, to be carried back from a machine without network.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import gpu_record
from benchmarks.environment import RESULTS, commit, now, write_json
from benchmarks.gpu_steps import UNCHECKED, Outcome, Step, run_steps, say, summary

__all__ = ["STEPS", "main"]

PYTHON = [sys.executable]
# What runs on the device although it was written for the CPU: tests/conftest.py moves the tensors of every op there.
TESTS = ("tests/gpu", "tests/ops", "tests/test_functional.py", "tests/test_nn.py", "tests/test_nn_codebook.py",
         "tests/test_nn_state.py")  # fmt: skip
# A package that one file of tests misses there is no reason to run none.
OTHERS_GO_ON = ["--continue-on-collection-errors"]
NOT_FOUND = f"there is no compute-sanitizer on the PATH, in CUDA_HOME or in /usr/local/cuda: {UNCHECKED}"
# What it says on machines that let no tool near the GPU, whatever the program does.
REFUSED = "Device not supported"
EXAMPLES = """\
two calls, each below nine minutes with the build (on a machine that ends a call after ten):
  make gpu ARGS="--steps prove"                                   is it right? build, self-test, suite, sanitizer
  make gpu ARGS="--steps measure"                                 how fast is it? tuner, benchmarks, report
other examples:
  python -m benchmarks.gpu                                        all steps, as far as the time goes
  python -m benchmarks.gpu --steps info smoke                     one or the other
  python -m benchmarks.gpu --output "$OUT"                        results somewhere else; give it to both calls

Later calls add to the results of earlier ones while device, versions, commit and kernels are the same. Exit status 1 if
a step failed, ran out of time, or nothing ran. Once blocks, selftest, smoke and tests are green, tuned.json carries a
record; copied to vqkernels/tuned/<device>.json it lets backend="auto" choose these kernels on that kind of GPU.
"""


def _selftest(options: argparse.Namespace, seconds: float) -> list[str] | str:
    if options.device != "cuda":
        return "a CPU has no tensor cores to ask"
    return [*PYTHON, "-m", "vqkernels", "info", "--self-test"]


def _blocks(options: argparse.Namespace, seconds: float) -> list[str] | str:
    if options.device != "cuda":
        return "a CPU has no tensor cores to take apart"
    return [*PYTHON, "-m", "benchmarks.gpu_blocks"]


def _tests(options: argparse.Namespace, seconds: float) -> list[str]:
    until = f"{time.time() + seconds:.0f}"
    suite = ["-p", "benchmarks.gpu_suite", "--suite-until", until, "-o", "faulthandler_timeout=60"]
    pytest = [*PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *OTHERS_GO_ON, *suite]
    command = [*pytest, "-m", "not slow or gpu", *TESTS]
    if options.quick:
        return [*command, "-k", "ties"]
    try:
        import xdist  # noqa: F401
    except ImportError:
        return command
    # Most of the time goes into compiling kernels and into the oracle, both on the CPU, in one thread each.
    workers = str(max(1, min(12, len(os.sched_getaffinity(0)) * 3 // 4)))
    return ["env", f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '1')}", *command, "-n", workers,
            "--dist", "worksteal"]  # fmt: skip


def _toolkit() -> list[str]:
    """Where the tools of CUDA lie, in order."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parents[1]))
    folders = [
        Path(home, part) for home in [*homes, "/usr/local/cuda"] if home for part in ("bin", "compute-sanitizer")
    ]
    return [*os.environ.get("PATH", "").split(os.pathsep), *map(str, folders)]


def _sanitizer(tool: str) -> Callable[[argparse.Namespace, float], list[str] | str]:
    def command(options: argparse.Namespace, seconds: float) -> list[str] | str:
        smoke = [*PYTHON, "-m", "benchmarks.gpu_smoke", "--device", options.device]
        if options.device != "cuda":
            return smoke  # a rehearsal of the program that compute-sanitizer would watch
        program = shutil.which("compute-sanitizer", path=os.pathsep.join(_toolkit()))
        if program is None:
            return NOT_FOUND
        # Without torch's caching allocator an access beyond a tensor is one beyond an allocation.
        apart = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"] if tool == "memcheck" else []
        return [*apart, program, "--tool", tool, "--error-exitcode", "9", *smoke]

    return command


def _tune(options: argparse.Namespace, seconds: float) -> list[str] | str:
    if options.device != "cuda":
        return "nothing to tune on a CPU"
    limit = str(max(5.0, 0.8 * seconds - 10))
    return [*PYTHON, "-m", "vqkernels", "tune", "--output", str(options.output / "tuned"), "--seconds", limit]


def _stage(name: str) -> Callable[[argparse.Namespace, float], list[str] | str]:
    def command(options: argparse.Namespace, seconds: float) -> list[str] | str:
        quick = ["--quick"] if options.quick else []
        inner = ["--inner", name, "--device", options.device, "--output", str(options.output)]
        return [*PYTHON, "-m", "benchmarks.gpu", *inner, "--seconds", f"{0.8 * seconds:.0f}", *quick]

    return command


# What `make gpu` may take before the first step, and one call in all, seconds.
BUILD, CALL = 120.0, 530.0
STEPS = (
    Step("info", 15, lambda o, s: [*PYTHON, "-m", "vqkernels", "info"], "what runs where"),
    Step("blocks", 25, _blocks, "the CUDA screens' copies, products and sums, one by one"),
    Step("selftest", 60, _selftest, "do the tensor cores add as the bound assumes?"),
    Step("smoke", 45, lambda o, s: [*PYTHON, "-m", "benchmarks.gpu_smoke", "--device", o.device],
         "every op and backend on small cases against the CPU"),
    Step("tests", 160, _tests, "the suite on the device", elastic=True),
    Step("memcheck", 55, _sanitizer("memcheck"), "compute-sanitizer: accesses", elastic=True, cannot=REFUSED),
    Step("racecheck", 50, _sanitizer("racecheck"), "compute-sanitizer: races in shared memory", elastic=True,
         cannot=REFUSED),
    Step("tune", 90, _tune, "launch configurations for this device"),
    Step("bench", 290, _stage("bench"), "speed and memory against other libraries", elastic=True),
    Step("report", 30, _stage("report"), "tables, targets, a chart"),
)  # fmt: skip
# One call each: the budgets of a part and the build fit into it.
PARTS = {
    "prove": ("info", "blocks", "selftest", "smoke", "tests", "memcheck", "racecheck"),
    "measure": ("tune", "bench", "report"),
}


def describe(device: str) -> dict[str, Any]:
    """What numbers depend on."""
    import importlib.metadata
    import platform

    import torch

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    packages = ("triton", "numpy", "vector-quantize-pytorch", "flash-kmeans", "flashlib")
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        facts = {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gb": round(p.total_memory / 1e9, 1),
                 "processors": p.multi_processor_count, "cuda": torch.version.cuda}  # fmt: skip
    else:
        facts = {"name": f"{platform.machine()} CPU (a rehearsal)"}
    versions = {"python": platform.python_version(), "torch": torch.__version__, **{p: version(p) for p in packages}}
    return {"device": facts, "versions": versions, "commit": commit(), "date": now(), "sources": _sources(device)}


def _stamp(options: argparse.Namespace) -> dict[str, Any]:
    return {**describe(options.device), "quick": options.quick}


def _sources(device: str) -> dict[str, str]:
    try:
        return gpu_record.sources(device)
    except ImportError:  # `make gpu` asks for a device before it builds
        return {}


def _bench(options: argparse.Namespace) -> int:
    """The measurements, saved after each."""
    import torch

    from benchmarks import gpu_timing
    from benchmarks.gpu_stages import STAGES, Bench

    device = torch.device(options.device)
    peaks = gpu_timing.peaks(device, options.quick)
    print("peaks: " + ", ".join(f"{k} {v / 1e12:.3g} T/s" for k, v in peaks.items()))
    data: dict[str, Any] = {"environment": _stamp(options), "peaks": peaks, "stages": {}}
    bench = Bench(device, peaks, options.seconds, options.quick)
    for stage, measure in STAGES.items():
        for record in measure(bench):
            data["stages"].setdefault(stage, {})[record["case"]] = record
            data["failed"] = bench.failed
            write_json(options.output / "gpu.json", data)
            print(f"{stage} {record['case']} ({bench.left():.0f} s left)")
            for name, r in record["results"].items():
                took = r.get("ms", {}).get("median")
                facts = f"{took:.4f} ms" if took is not None else _facts(r)
                share = f", {100 * r['share_of_floor']:.0f} % of the floor" if "share_of_floor" in r else ""
                print(f"    {name:<22} {facts}{share}", flush=True)
            for name, why in record.get("skipped", {}).items():
                print(f"    {name}: not run: {why}")
    for line in bench.failed:
        print(f"WRONG: {line}")
    return 1 if bench.failed else 0


def _facts(result: dict[str, Any]) -> str:
    found = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in result.items() if k != "title"}
    return ", ".join(f"{k} {v}" for k, v in found.items())


def _report(options: argparse.Namespace) -> int:
    from benchmarks import gpu_report

    if not (options.output / "gpu.json").is_file():
        print("no gpu.json: nothing to report")
        return 1
    data = gpu_report.load(options.output)
    for what, measured, verdict in gpu_report.targets(data):
        print(f"  {what:<42} {measured:<28} {verdict}")
    drawn = gpu_report.chart(data, options.output / "chart.png")
    print("chart.png drawn" if drawn else "no chart: no matplotlib, or no searches against cdist")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = [step.name for step in STEPS]
    given = [*PARTS, *names]
    parser.add_argument(
        "--steps", nargs="+", choices=given, default=names, metavar="STEP", help=f"of {', '.join(given)}"
    )
    parser.add_argument("--skip", nargs="+", choices=names, default=[], metavar="STEP", help="leave these out")
    parser.add_argument(
        "--seconds", type=float, default=CALL, help="for all steps and the build before them (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="folder of the results (default: benchmarks/results/<device>)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a rehearsal without numbers")
    parser.add_argument("--quick", action="store_true", help="few tests, tiny benchmark sizes: does it run?")
    parser.add_argument(
        "--build", action="store_true", help="build into build/gpu if there is a device, and do nothing else"
    )
    parser.add_argument("--inner", choices=("bench", "report"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.steps = [name for step in options.steps for name in PARTS.get(step, (step,))]
    return options


def _left(seconds: float) -> float:
    """Of the seconds of a call what the build, which began at VQKERNELS_GPU_STARTED, has not used."""
    started = os.environ.get("VQKERNELS_GPU_STARTED")
    return seconds - (max(0.0, time.time() - float(started)) if started else 0.0)


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal of another encoding is no reason to stop
        sys.stdout.reconfigure(errors="replace")
    options = _parse(arguments)
    if options.inner:
        return {"bench": _bench, "report": _report}[options.inner](options)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no CUDA device here, so nothing was tested on one", file=sys.stderr)
        return 1
    from vqkernels import tuned

    if options.build:
        from benchmarks import gpu_build

        return gpu_build.build(options.device == "cuda")
    stamp = _stamp(options)
    options.output = (options.output or RESULTS / tuned.slug(stamp["device"]["name"])).resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    steps = [s for s in STEPS if s.name in options.steps and s.name not in options.skip]
    seconds = _left(options.seconds)
    if len(steps) == 1 and steps[0].seconds < seconds:  # one step alone may take all the time there is
        steps = [replace(steps[0], seconds=seconds)]
    before, why = gpu_record.carried(options.output, stamp, {s.name for s in steps})
    order = [s.name for s in STEPS]
    found: list[dict[str, Any]] = []

    def save(outcomes: list[Outcome]) -> None:  # after each step, for calls that are cut off from outside
        found[:] = sorted([*before, *map(asdict, outcomes)], key=lambda o: order.index(o["step"]))
        write_json(options.output / "run.json", {**stamp, "steps": found})

    # What earlier calls said stays readable.
    with (options.output / "log.txt").open("a" if before else "w", encoding="utf-8") as log:
        say(log, f"{stamp['device']['name']}; {stamp['versions']}; commit {stamp['commit']}; {stamp['date']}")
        if why:
            say(log, why)
        outcomes = run_steps(steps, options, log, seconds, save)
        say(log, summary(outcomes))
        if before:
            say(log, "from earlier calls: " + ", ".join(f"{o['step']} {o['status']}" for o in before))
        say(log, gpu_record.verdict(options.output, stamp, found, options.device))
    bad = any(o.status in ("FAILED", "OUT OF TIME") for o in outcomes)
    return 1 if bad or all(o.status == "skipped" for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
