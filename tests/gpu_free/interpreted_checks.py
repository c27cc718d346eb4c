"""What tests/gpu checks on a GPU, on CPU tensors by Triton's kernels.

Run by test_triton_interpreter.py in Triton's interpreter, and by test_ptx_triton.py as compiled.
"""

from __future__ import annotations

from types import ModuleType

import pytest
from checks_on_cpu import *  # noqa: F403 (the tests)
from gpu_checks import Place

from vqkernels import _triton


@pytest.fixture
def place() -> Place:
    return Place("triton")


@pytest.fixture
def kernels() -> ModuleType:
    return _triton
