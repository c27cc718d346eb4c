"""csrc/cuda as nvcc compiled it, executed from its PTX without a GPU: of hosted_*.py what reaches every kernel.

`make emulate ROUNDS=3` sets ``VQKERNELS_EMULATE`` to 3, and then all of hosted_*.py runs so often, each time in other
orders of execution.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import pytest
import torch
from cuda_host import FILES, build_ptx, run_hosted

from vqkernels import _cuda, _native
from vqkernels._cuda_nearest import SM80, SM90

ROUNDS = int(os.environ.get("VQKERNELS_EMULATE", "0"))
# Races, and accesses outside of the tensors that a call was given, are errors.
PLUGIN = ("-p", "cuda_on_ptx")
# Kernels that are a trap but for sm_90a.
HOPPER = ("screen90", "products90")
# For pytest's -k, all that can run. A descriptor without meaning gives wrong sums in C++ and on a GPU, an error here.
ALL = {
    "80": {"hosted_selftest": "sm80"},
    "90a": {"hosted_selftest": "not diagnosis_names_the_block"},
}
# And what reaches every kernel, each width and number of panels: a few small tests of all, of the screens on odd sizes,
# more tiles than a ring of buffers holds, rows that no screen decides and layouts alone.
SCREENS = (
    "every_row or (chunks_of_rows and 100-1) or biases_alone or nan_and_infinity or too_many_candidates or "
    "bits_of_the_reference or multiplies"
)
OTHERS = "long_rows or 99_kilobytes or gathers or survives or bits_of_the_cpu"
CHOSEN = {"80": f"({SCREENS} or {OTHERS}) and not sm90", "90a": f"({SCREENS}) and sm90"}

# Runs pytest, then says which kernels were launched how often.
REPORTING = """
import ctypes, sys, pytest
status = pytest.main(sys.argv[1:])
from vqkernels import _cuda
kernels = _cuda.lib().vqk_cuda_ptx_kernels
kernels.restype = ctypes.c_char_p
print("launched", kernels().decode().replace("\\n", "\\nlaunched "))
sys.exit(status)
"""


def launches(arch: str, selected: str, *files: Path) -> list[tuple[int, int, str]]:
    """Of every kernel: how often tests launched it, how often of these so that it might overlap, its name."""
    out = run_hosted(build_ptx(arch), *PLUGIN, *files, "-k", selected, run=("-c", REPORTING))
    found = re.findall(r"^launched (\d+) (\d+) (\w+)$", out, flags=re.M)
    return [(int(count), int(overlapping), name) for count, overlapping, name in found]


@pytest.mark.slow
@pytest.mark.parametrize("arch", CHOSEN)
def test_every_kernel_runs_as_it_was_compiled(arch: str) -> None:
    found = launches(arch, CHOSEN[arch], *FILES)
    launched = {name: count for count, _, name in found}
    hopper = {name for name in launched if any(part in name for part in HOPPER)}
    assert (len(launched), len(hopper)) >= (50, 10)
    expected = hopper if arch == "90a" else launched.keys() - hopper
    assert not [name for name in expected if launched[name] == 0]
    # From sm_90 on, kernels may start before the one in front has ended; not those whose blocks wait for each other.
    overlapping = {name for count, overlapping, name in found if 0 < overlapping == count}
    together = {name for name in launched if "search_few" in name}
    assert overlapping == ({name for name in launched if launched[name]} - together if arch == "90a" else set())


@pytest.mark.slow
def test_overlapping_launches_can_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQKERNELS_CUDA_OVERLAP", "0")
    found = launches("90a", "gathers", FILES[0].with_name("hosted_ops.py"))
    assert any(count for count, _, _ in found)
    assert not any(overlapping for _, overlapping, _ in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "path", "number"),
    [(arch, path, number) for arch in ALL for path in FILES for number in range(ROUNDS)],
    ids=lambda value: getattr(value, "stem", value),
)
def test_emulated(arch: str, path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQKERNELS_HOST_ROUND", str(number))
    selected = ALL[arch].get(path.stem, "not sm90" if arch == "80" else "test")
    assert " passed" in run_hosted(build_ptx(arch), *PLUGIN, path, "-k", selected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "screen", "panels", "offset", "limit", "named"),
    [
        ("80", SM90, 1, 0, 227, r"products90\S*, line \d+ .*trap"),
        ("90a", SM90, 4, 0, 99, r"products90\S* a block has 101376 bytes of shared memory at most"),
        ("90a", SM80, 8, 0, 99, None),
        (
            "90a",
            SM90,
            1,
            8,
            227,
            r"products90\S*, line \d+ .*cp.async.bulk.*block \(0,0,0\), thread \(0,0,0\): .*align",
        ),
    ],
)
def test_what_a_gpu_faults_at_is_an_error(
    arch: str, screen: int, panels: int, offset: int, limit: int, named: str | None
) -> None:
    library = ctypes.CDLL(str(build_ptx(arch)))
    product = library.vqk_cuda_nearest_products
    product.restype, arguments = _cuda.SIGNATURES["vqk_cuda_nearest_products"]
    product.argtypes = _native.addresses(arguments)
    library.vqk_last_error.restype = ctypes.c_char_p
    library.vqk_cuda_host_shared(ctypes.c_uint64(limit * 1024))
    rows, codes = (torch.zeros(128 * panels * 128 + extra, dtype=torch.uint8) for extra in (16, 1024))
    sums, late = torch.full((128, 128), float("nan")), torch.zeros(1, dtype=torch.int32)
    places = (rows.data_ptr() + offset, codes.data_ptr(), sums.data_ptr(), None, late.data_ptr())
    status = product(screen, 64, panels, *places, 0, 0, 0, None)
    if named is None:
        assert (status, sums.any()) == (0, False)
    else:
        assert status != 0
        assert re.search(named, library.vqk_last_error().decode()), library.vqk_last_error()
