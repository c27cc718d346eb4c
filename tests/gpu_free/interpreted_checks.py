"""What tests/gpu checks on a GPU, on CPU tensors in Triton's interpreter: that proves the checks too.

Run by test_triton_interpreter.py in a process where ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gpu_checks
import pytest
from gpu_checks import CHECKS, STEPS, Place
from torch import Tensor

from vqkernels import _triton, dispatch

PLACE = Place("triton")


@pytest.fixture(autouse=True)
def _by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQKERNELS_BACKEND", PLACE.backend)


@pytest.mark.parametrize("op", dispatch.OPS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_op(check: Any, op: str) -> None:
    check(PLACE, op)


@pytest.mark.parametrize("kind", STEPS)
def test_training_step(kind: str) -> None:
    gpu_checks.check_a_captured_training_step_is_the_eager_one(PLACE, STEPS[kind])
    gpu_checks.check_training_follows_the_cpu(PLACE, STEPS[kind])
    gpu_checks.check_a_training_step_takes_no_matrix(PLACE, STEPS[kind])


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_op_makes_the_device_of_its_tensors_current(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Tensor] = []

    @contextmanager
    def on_device(tensor: Tensor) -> Iterator[None]:
        entered.append(tensor)
        yield

    monkeypatch.setattr(_triton, "on_device", on_device)
    arguments = gpu_checks.given(op, PLACE)
    gpu_checks.run(op, arguments, PLACE.backend)
    assert entered
    assert all(t.device.type == "cpu" and t.is_floating_point() for t in entered)


@pytest.mark.parametrize("op", dispatch.OPS)
def test_checks_can_fail(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = gpu_checks.run, []

    def worse(op: str, arguments: list[Any], backend: str) -> list[Tensor]:
        found = right(op, arguments, "reference")
        calls.append(backend)
        return [t + len(calls) for t in found] if backend == PLACE.backend else found

    monkeypatch.setattr(gpu_checks, "run", worse)
    for check in CHECKS[:4]:
        with pytest.raises(AssertionError):
            check(PLACE, op)
    monkeypatch.setattr(Place, "peak", lambda self, work: 2**40)
    with pytest.raises(AssertionError, match="given and returned"):
        CHECKS[4](PLACE, op)
    with pytest.raises(AssertionError, match="N x K floats"):
        gpu_checks.check_a_training_step_takes_no_matrix(PLACE, {})
