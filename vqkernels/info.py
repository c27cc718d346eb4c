"""What runs where: versions, the native library, instruction sets, and every op x backend with the reason.

Called by users (``vqkernels.info()``, ``python -m vqkernels info``) and the first thing to paste into an issue.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from vqkernels import _cuda, _native, _triton, dispatch, ops, tuned
from vqkernels._triton import selftest

__all__ = ["Info", "info", "self_test", "version"]

DEVICES = ("cpu", "cuda")
VARIABLES = ("VQKERNELS_BACKEND", "VQKERNELS_CACHE_MB", "VQKERNELS_ISA", "VQKERNELS_LIBRARY")


@dataclasses.dataclass(frozen=True)
class Info:
    """What :func:`info` found; ``str()`` is a table for people, :meth:`to_dict` is for JSON.

    Attributes:
        versions: vqkernels, python, torch, numpy, platform.
        native: ``path``, ``abi``, ``compiler`` of the loaded library, or ``reason`` why there is none.
        isa: ``used`` and ``available`` instruction sets, how the ``choice`` is made, or ``reason`` why there is none.
        threads: of torch's pool, which the native library borrows.
        cuda: name of the current ``device``, or the ``reason`` why there is none; file name of the CUDA ``library``
            (which is only loaded by a call on a CUDA tensor), or why there is none.
        triton: version and ``reason`` why there is none; the record that lets "auto" choose it on this device
            (``verified``), and what the self-test of the tensor cores found in this process (``self_test``).
        environment: the ``VQKERNELS_*`` variables that are set.
        backends: one entry per op, backend and device: ``reason`` is ``None`` where it runs.
    """

    versions: dict[str, str]
    native: dict[str, Any]
    isa: dict[str, Any]
    threads: int
    cuda: dict[str, Any]
    triton: dict[str, Any]
    environment: dict[str, str]
    backends: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        native, isa, cuda = self.native, self.isa, self.cuda
        if native["reason"] is None:
            library = f"{native['path']} (ABI {native['abi']}, {native['compiler']})"
            instructions = isa["reason"] or f"{isa['used']} ({isa['choice']}; runs here: {', '.join(isa['available'])})"
        else:
            library, instructions = f"none: {native['reason']}", "none"
        facts = [
            *self.versions.items(),
            ("native library", library),
            ("instruction set", instructions),
            ("threads", str(self.threads)),
            ("cuda", cuda["reason"] or cuda["device"]),
            ("cuda library", cuda["library"]),
            ("triton", _triton_line(self.triton)),
            *self.environment.items(),
        ]
        rows: list[tuple[str, ...]] = [("op", "backend", *DEVICES)]
        for op in dispatch.OPS:
            for backend in dispatch.BACKENDS:
                found = {
                    e["device"]: e["reason"] for e in self.backends if (e["op"], e["backend"]) == (op, backend.name)
                }
                rows.append((op, backend.name, *(found[device] or "yes" for device in DEVICES)))
        return "\n".join([*_columns(facts), "", *_columns(rows)])


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _triton_line(triton: dict[str, Any]) -> str:
    if triton["version"] is None:
        return str(triton["reason"])
    record, tests = triton["verified"], triton["self_test"]
    known = f"verified {record.get('date')} at {record.get('commit')}" if record else "not verified on this device"
    if failed := [t["configuration"] for t in tests if not t["holds"]]:
        found = f"SELF-TEST FAILED, float64 scan instead of the screen: {'; '.join(failed)}"
    elif tests:
        share = max(t["share"] for t in tests)
        found = f"self-test passed ({len(tests)} configurations, at most {share:.2f} of the bound)"
    else:
        found = "self-test not run in this process (--self-test)"
    return f"{triton['version']}; {known}; {found}"


def version() -> str:
    """The installed version of this package."""
    from importlib import metadata

    try:
        return metadata.version("vqkernels")
    except metadata.PackageNotFoundError:
        return "unknown (run from a folder, not installed)"


def _native_info() -> dict[str, Any]:
    if (reason := _native.unavailable()) is not None:
        return {"path": None, "abi": None, "compiler": None, "reason": reason}
    library = _native.lib()
    return {
        "path": str(library._name),
        "abi": int(library.vqk_abi_version()),
        "compiler": library.vqk_build_info().decode(),
        "reason": None,
    }


def _isa_info() -> dict[str, Any]:
    if (reason := _native.unavailable()) is not None:
        return {"used": None, "choice": None, "available": [], "reason": reason}
    available = _native.supported()
    forced = os.environ.get("VQKERNELS_ISA", "auto") not in ("", "auto")
    # Which one is fastest depends on the sizes: the table names the preferred one, explain() the one of a call.
    choice = "forced by VQKERNELS_ISA" if forced else "preferred, small codebooks may use another"
    try:
        return {"used": _native.ISAS[_native.isa()], "choice": choice, "available": available, "reason": None}
    except ValueError as e:
        return {"used": None, "choice": choice, "available": available, "reason": str(e)}


def _cuda_info() -> dict[str, Any]:
    try:
        library = _cuda.path().name
    except OSError as e:
        library = f"none: {e}"
    device = reason = None
    if torch.version.cuda is None and torch.version.hip is None:
        reason = "this torch is built without CUDA"
    elif not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    else:
        device = f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})"
    return {"device": device, "reason": reason, "library": library}


def _triton_info() -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = _triton.unavailable(device)
    try:
        from importlib import metadata

        found = metadata.version("triton")
    except metadata.PackageNotFoundError:
        found = None
    tests = [
        {"device": str(place), "configuration": str(probe), "holds": verdict.holds, "share": verdict.share}
        for (place, probe), verdict in selftest.verdicts().items()
    ]
    verified = tuned.verified(torch.cuda.get_device_name()) if device == "cuda" else None
    return {"version": found, "reason": reason, "verified": verified, "self_test": tests}


def self_test() -> None:
    """Search with every launch configuration, so that :func:`info` can say how this GPU's tensor cores add.

    Raises:
        ValueError: there are no Triton kernels for a device here.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (reason := _triton.unavailable(device)) is not None:
        raise ValueError(f"no self-test: {reason}")
    for dim in (4, 8, 64, 128, 256):  # one for each entry of tuned.HEURISTIC
        for rows in (3, 40, 200):  # and for each number of rows in a tile
            ops.nearest(torch.zeros(1, 1, rows, dim, device=device), torch.zeros(1, 2, dim, device=device), "l2",
                        "exact", "triton")  # fmt: skip


def info() -> Info:
    """Describe this installation: versions, native library, instruction sets, and what every op can run on.

    Returns:
        An :class:`Info`: print it, or take :meth:`Info.to_dict`.

    Example:
        >>> from vqkernels.info import info
        >>> {e["reason"] for e in info().backends if e["backend"] == "reference" and e["device"] == "cpu"}
        {None}
    """
    cuda = _cuda_info()
    unusable = {"cpu": None, "cuda": cuda["reason"]}
    backends = [
        {
            "op": op,
            "backend": backend.name,
            "device": device,
            "reason": unusable[device] or dispatch.missing(op, backend, device),
        }
        for op in dispatch.OPS
        for backend in dispatch.BACKENDS
        for device in DEVICES
    ]
    return Info(
        versions={
            "vqkernels": version(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": numpy.__version__,
            "platform": platform.platform(),
        },
        native=_native_info(),
        isa=_isa_info(),
        threads=torch.get_num_threads(),
        cuda=cuda,
        triton=_triton_info(),
        environment={name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
        backends=backends,
    )
