"""What tests/gpu checks on a GPU, on CPU tensors by csrc/cuda on the host.

Run by test_cuda_host.py, and by `make asan` with a library that ASan and UBSan watch.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from checks_on_cpu import *  # noqa: F403 (the tests)
from cuda_host import ROOT, SEEDS, set_seed
from gpu_checks import Place

from vqkernels import _cuda


@pytest.fixture
def place() -> Place:
    set_seed(SEEDS[1])
    return Place("native")


@pytest.fixture
def kernels() -> ModuleType:
    return _cuda


def test_the_cases_of_the_sanitizer_agree(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import gpu_smoke

    assert gpu_smoke.run(torch.device("cpu"), place.backend, most_rows=100) > 80
