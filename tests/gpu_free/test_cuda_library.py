"""What nvcc built: every kernel fits and spills nothing, sums are not fused, floats are not added atomically; and
where there is no GPU, the library's presence changes nothing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_host import ROOT, cuobjdump, installed, kernels

# Registers per thread that a kernel may take: 65536 per SM by its threads, from __launch_bounds__. By part of the name.
REGISTERS = {"nearest": 255}
OTHERS = 128


def test_every_kernel_is_built_for_every_architecture() -> None:
    sources = "".join(path.read_text() for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu*")))
    defined = set(
        re.findall(r"^(?:static )?__global__ void(?: __launch_bounds__\([^)]*\))?\s+(\w+)\(", sources, flags=re.M)
    )
    assert len(defined) >= 9
    built = {k.name for k in kernels()}
    for name in defined:
        assert any(f"{len(name)}{name}" in symbol for symbol in built), name
    assert {k.arch for k in kernels()} >= {"sm_80", "sm_90a"}


def test_no_kernel_spills_or_takes_too_many_registers() -> None:
    for kernel in kernels():
        limit = next((n for part, n in REGISTERS.items() if part in kernel.name), OTHERS)
        # Of the longest rows' search, two registers are saved once per block of rows, outside of its loops.
        allowed = 8 if "screen90ILi64ELi8E" in kernel.name else 0
        assert (kernel.stack <= allowed, kernel.local) == (True, 0), kernel
        assert kernel.registers <= limit, kernel


def test_sums_are_not_fused_and_floats_not_added_atomically() -> None:
    ptx = cuobjdump("-ptx", str(installed()))
    assert "add.rn.f64" in ptx
    assert "fma.rn.f64" not in ptx
    assert not re.search(r"\b(atom|red)\.\S*f(16|32|64)", ptx)


def test_library_needs_neither_torch_nor_a_cuda_runtime() -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf (binutils) is not installed")
    listing = subprocess.run([readelf, "-d", installed()], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[([^\]]+)\]", listing)
    assert needed
    assert not [name for name in needed if not re.match(r"(libc|libm|libpthread|libdl|librt|ld-linux[\w-]*)\.so", name)]


WITHOUT_GPU = """
import sys, torch, vqkernels
vqkernels.__path__[:] = [sys.argv[1], *vqkernels.__path__, sys.argv[1]]
from vqkernels import _cuda, ops
assert str(_cuda.path()).startswith(sys.argv[1])
indices, _ = vqkernels.nearest(torch.tensor([[0.9, 0.2], [0.0, 7.0]]), torch.eye(2))
assert indices.tolist() == [0, 1]
z = torch.randn(4, 2, requires_grad=True)
vqkernels.vector_quantize(z, torch.eye(2)).quantized.sum().backward()
assert "torch sees no CUDA device" in str(vqkernels.info()) or "without CUDA" in str(vqkernels.info())
assert "libvqk_cuda" not in open("/proc/self/maps").read()
"""


@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="needs Linux and a C compiler")
def test_cpu_only_machine_never_touches_the_library(tmp_path: Path) -> None:
    # One that ends the process when it is loaded.
    (tmp_path / "stub.c").write_text(
        "#include <stdlib.h>\n__attribute__((constructor)) static void f(void) { abort(); }"
    )
    (tmp_path / "lib").mkdir()
    library = tmp_path / "lib" / "libvqk_cuda13.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "stub.c"], check=True)
    command = [sys.executable, "-c", WITHOUT_GPU, str(tmp_path)]
    done = subprocess.run(
        command, env={"PATH": "/usr/bin", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
