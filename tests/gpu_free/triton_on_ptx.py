"""A device for Triton that is no GPU: what its compiler makes for one runs on the PTX machine, on CPU tensors.

A pytest plugin, loaded by test_ptx_triton.py in processes where ``VQKERNELS_TEST_PTX`` names the GPU (sm_80 or sm_90).
Triton's interpreter runs the kernels' Python. Here arguments are specialised, and layouts, shared memory, tensor-core
instructions and reductions across warps are the compiler's, as in a launch on that GPU.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ptx_machine
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend

from vqkernels import _triton
from vqkernels._triton import soft_scores

ROOT = Path(__file__).resolve().parents[2]
# Bytes of shared memory that a block may have.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}

# Kernels that ran, each with the kinds of its tensors.
executed: dict[str, set[str]] = {}


class Launcher:
    """Launches one compiled kernel; Triton makes one for each and calls it as it calls its own."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.kernel, self.kinds, self.metadata = source.fn.__name__, tuple(source.signature.values()), metadata
        # Triton has no memory for these unless it is told to, and the package does not tell it.
        assert metadata.global_scratch_size == metadata.profile_scratch_size == 0
        assert metadata.num_ctas == 1
        assert not metadata.launch_pdl

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: Any, packed: Any, launch: Any, enter: Any, leave: Any,
        *arguments: Any,
    ) -> None:  # fmt: skip
        given = [(kind, a) for kind, a in zip(self.kinds, arguments, strict=True) if kind != "constexpr"]
        assert all(a.device.type == "cpu" for kind, a in given if kind.startswith("*"))
        # Behind the arguments, pointers to the memory that was not asked for: as many as Triton's version has.
        nothing = len(function.module.parameters(function.name)) - len(given)
        assert 0 <= nothing <= 2
        if x * y * z > 0:
            function.module.launch(
                function.name, (x, y, z), 32 * self.metadata.num_warps, *(a for _, a in given), *[0] * nothing,
                shared=self.metadata.shared, cooperative=self.metadata.launch_cooperative_grid,
                memory=[a for kind, a in given if kind.startswith("*")],
            )  # fmt: skip
            executed.setdefault(self.kernel, set()).update(kind for kind, _ in given if kind.startswith("*"))


class Driver(DriverBase):  # type: ignore[misc]
    """What Triton asks of a device. Its binaries are the PTX itself."""

    launcher_cls = Launcher

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.utils = name, SimpleNamespace(
            get_device_properties=self.properties, load_binary=self.load, unload_module=lambda module: None
        )  # fmt: skip
        CUDABackend.make_cubin = lambda self, source, metadata, options, capability: source.encode()

    @classmethod
    def is_active(cls) -> bool:
        return True

    def properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[self.name], "multiprocessor_count": 1, "warpSize": 32}

    def load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        module = ptx_machine.Module(binary.decode())
        return module, SimpleNamespace(module=module, name=name), 0, 0, 1024

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.name.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    # A driver must have these; Triton asks them for launchers in C and for autotuning.
    def map_python_to_cpp_type(self, kind: str) -> str:
        raise NotImplementedError(f"no launcher in C is made here, none needs the type of {kind}")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is timed on the PTX machine")


def pytest_configure(config: pytest.Config) -> None:
    """From here on the Triton backend accepts CPU tensors."""
    # Answers stay right where the tensor cores are wrong: then every row is compared in float64.
    config.addinivalue_line("filterwarnings", "error:vqkernels. the tensor cores of:RuntimeWarning")
    assert not _triton.interpreted()
    ptx_machine.set_races(True)
    # What Triton keeps here has no cubin in it: it must not meet what it keeps elsewhere.
    os.environ["TRITON_CACHE_DIR"] = str(ROOT / "build" / "triton_on_ptx")
    driver = Driver(os.environ["VQKERNELS_TEST_PTX"])
    triton.runtime.driver.set_active(driver)
    soft_scores.capability = lambda device: driver.get_current_target().arch // 10
    unavailable = _triton.unavailable
    _triton.unavailable = lambda device: None if device == "cpu" else unavailable(device)


@pytest.fixture(autouse=True)
def _order(request: pytest.FixtureRequest) -> None:
    """Every test has an order of execution of its own, the same in every run."""
    ptx_machine.set_seed(zlib.crc32(request.node.name.encode()) % len(ptx_machine.SEEDS))


def pytest_sessionfinish() -> None:
    """What ran, for test_ptx_triton.py."""
    if path := os.environ.get("VQKERNELS_TEST_PTX_EXECUTED"):
        Path(path).write_text(json.dumps({kernel: sorted(kinds) for kernel, kinds in sorted(executed.items())}))
