"""Everything that a GPU has to say about this package, in one command: ``python -m benchmarks.gpu --help``.

`make gpu` builds and calls it. Each step is a process with a time budget; what it finds is written to
``benchmarks/results/<device>/`` in at most seven small files, to be carried back from a machine without network.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import gpu_record
from benchmarks.environment import RESULTS, ROOT, commit, now, write_json
from benchmarks.gpu_blocks import CRASHED

__all__ = ["STEPS", "Outcome", "Step", "main", "run_steps"]

PYTHON = [sys.executable]
# What runs on the device although it was written for the CPU: tests/conftest.py moves the tensors of every op there.
TESTS = ("tests/gpu", "tests/ops", "tests/test_functional.py", "tests/test_nn.py", "tests/test_nn_codebook.py",
         "tests/test_nn_state.py")  # fmt: skip
NOT_ON_PATH = "compute-sanitizer is not on the PATH (it comes with the CUDA toolkit): NOTHING WAS CHECKED FOR RACES"
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


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: what ``--steps`` takes.
        seconds: its budget.
        command: its arguments after the options are known; a string is the reason why there is nothing to run.
        about: for ``--help`` and the summary.
    """

    name: str
    seconds: float
    command: Callable[[argparse.Namespace, float], list[str] | str]
    about: str


@dataclass
class Outcome:
    """What became of a step: ``ok``, ``FAILED``, ``OUT OF TIME`` or ``skipped``."""

    step: str
    status: str
    seconds: float
    note: str


def _selftest(options: argparse.Namespace, seconds: float) -> list[str] | str:
    if options.device != "cuda":
        return "a CPU has no tensor cores to ask"
    return [*PYTHON, "-m", "vqkernels", "info", "--self-test"]


def _blocks(options: argparse.Namespace, seconds: float) -> list[str] | str:
    if options.device != "cuda":
        return "a CPU has no tensor cores to take apart"
    return [*PYTHON, "-m", "benchmarks.gpu_blocks"]


def _ruled_out(outcome: Outcome) -> str | None:
    """What VQKERNELS_CUDA_SCREEN must be after "blocks": a screen that hangs or crashes would end every step."""
    if outcome.status == "OUT OF TIME":
        return "mma"  # mma.sync has no barriers that could wait for ever
    if CRASHED not in outcome.note:
        return None  # one that is wrong is left out by the library's own self-test
    return "float64" if f"mma.sync {CRASHED}" in outcome.note else "mma"


def _tests(options: argparse.Namespace, seconds: float) -> list[str]:
    command = [*PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow or gpu", *TESTS]
    if options.quick:
        return [*command, "-k", "ties"]
    try:
        import xdist  # noqa: F401
    except ImportError:
        return command
    # Most of the time goes into compiling kernels on the CPU.
    return [*command, "-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]


def _sanitizer(tool: str) -> Callable[[argparse.Namespace, float], list[str] | str]:
    def command(options: argparse.Namespace, seconds: float) -> list[str] | str:
        smoke = [*PYTHON, "-m", "benchmarks.gpu_smoke", "--device", options.device]
        if options.device != "cuda":
            return smoke  # a rehearsal of the program that compute-sanitizer would watch
        near = [Path(p).parent for p in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc") if p]
        program = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, near)]))
        if program is None:
            return NOT_ON_PATH
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
    Step("tests", 160, _tests, "the suite on the device"),
    Step("memcheck", 55, _sanitizer("memcheck"), "compute-sanitizer: accesses"),
    Step("racecheck", 50, _sanitizer("racecheck"), "compute-sanitizer: races in shared memory"),
    Step("tune", 90, _tune, "launch configurations for this device"),
    Step("bench", 290, _stage("bench"), "speed and memory against other libraries"),
    Step("report", 30, _stage("report"), "tables, targets, a chart"),
)  # fmt: skip
# One call each: the budgets of a part and the build fit into it.
PARTS = {
    "prove": ("info", "blocks", "selftest", "smoke", "tests", "memcheck", "racecheck"),
    "measure": ("tune", "bench", "report"),
}


def run_steps(steps: list[Step], options: argparse.Namespace, log: Any, total: float) -> list[Outcome]:
    """Run the steps in order; one that fails does not stop the others, one that is cut off says so.

    Args:
        steps: what to run.
        options: handed to their commands.
        log: an open file; everything goes there and to the terminal.
        total: seconds for all of them together; a step gets its own budget or what is left of that.
    """
    begin = time.monotonic()
    outcomes = []
    environment = os.environ | {"VQKERNELS_TEST_DEVICE": options.device, "PYTHONUNBUFFERED": "1"}
    if (options.output / "tuned").is_dir() or any(s.name == "tune" for s in steps):
        environment["VQKERNELS_TUNED"] = str(options.output / "tuned")
    for step in steps:
        left = min(step.seconds, total - (time.monotonic() - begin))
        if step.name == "report":  # seconds, and without it the rest is hard to read
            left = step.seconds
        command = step.command(options, left) if left > 1 else "no time left"
        if isinstance(command, str):
            status = "OUT OF TIME" if left <= 1 else "skipped"
            _say(log, f"\n=== {step.name}: {status}: {command}")
            outcomes.append(Outcome(step.name, status, 0.0, command))
            continue
        _say(log, f"\n=== {step.name}: {step.about} (at most {left:.0f} s)")
        start = time.monotonic()
        status, note = _run(command, environment, left, log)
        outcomes.append(Outcome(step.name, status, time.monotonic() - start, note))
        if step.name == "blocks" and (best := _ruled_out(outcomes[-1])) is not None:
            environment["VQKERNELS_CUDA_SCREEN"] = best
            _say(log, f"!!! {note}: every step from here on runs with VQKERNELS_CUDA_SCREEN={best}")
    return outcomes


def _run(command: list[str], environment: dict[str, str], seconds: float, log: Any) -> tuple[str, str]:
    """One process and those that it starts; its last line is the note."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    import threading

    timer = threading.Timer(seconds, lambda: os.killpg(process.pid, 9))
    timer.daemon = True
    timer.start()
    last = ""
    assert process.stdout is not None
    for line in process.stdout:
        _say(log, line.rstrip("\n"))
        last = line.strip() or last
    code = process.wait()
    out_of_time = not timer.is_alive() and code == -9
    timer.cancel()
    if out_of_time:
        return "OUT OF TIME", f"killed after {seconds:.0f} s"
    return ("ok", last) if code == 0 else ("FAILED", f"exit status {code}: {last}")


def _say(log: Any, text: str) -> None:
    print(text, flush=True)
    log.write(text + "\n")
    log.flush()


def _summary(outcomes: list[Outcome]) -> str:
    lines = [f"  {o.step:<10} {o.status:<12} {o.seconds:6.0f} s  {o.note[:100]}" for o in outcomes]
    loud = [f"  !!! {o.step}: {o.note}" for o in outcomes if o.note == NOT_ON_PATH]
    return "\n".join(["", "summary", *lines, *loud])


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
    parser.add_argument("--check", action="store_true", help="say whether there is a device, and do nothing else")
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
    options = _parse(arguments)
    if options.inner:
        return {"bench": _bench, "report": _report}[options.inner](options)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no CUDA device here, so nothing was tested on one", file=sys.stderr)
        return 1
    if options.check:
        return 0
    from vqkernels import tuned

    stamp = _stamp(options)
    options.output = (options.output or RESULTS / tuned.slug(stamp["device"]["name"])).resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    steps = [s for s in STEPS if s.name in options.steps and s.name not in options.skip]
    seconds = _left(options.seconds)
    if len(steps) == 1 and steps[0].seconds < seconds:  # one step alone may take all the time there is
        steps = [replace(steps[0], seconds=seconds)]
    before, why = gpu_record.carried(options.output, stamp, {s.name for s in steps})
    # What earlier calls said stays readable.
    with (options.output / "log.txt").open("a" if before else "w") as log:
        _say(log, f"{stamp['device']['name']}; {stamp['versions']}; commit {stamp['commit']}; {stamp['date']}")
        if why:
            _say(log, why)
        outcomes = run_steps(steps, options, log, seconds)
        _say(log, _summary(outcomes))
        order = [s.name for s in STEPS]
        found = sorted([*before, *map(asdict, outcomes)], key=lambda o: order.index(o["step"]))
        if before:
            _say(log, "from earlier calls: " + ", ".join(f"{o['step']} {o['status']}" for o in before))
        _say(log, gpu_record.verdict(options.output, stamp, found, options.device))
        write_json(options.output / "run.json", {**stamp, "steps": found})
    bad = any(o.status in ("FAILED", "OUT OF TIME") for o in outcomes)
    return 1 if bad or all(o.status == "skipped" for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
