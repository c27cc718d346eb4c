"""Tests that what tests/gpu checks on a GPU holds on CPU tensors: csrc/cuda on the host, Triton in its interpreter.

Imported by hosted_checks.py and interpreted_checks.py, which say where. That proves the checks too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import gpu_checks
import pytest
from gpu_checks import CHECKS, STEPS, Place, without_cuda
from torch import Tensor

from vqkernels import dispatch

__all__ = [
    "_by_environment",
    "test_checks_can_fail",
    "test_every_op_makes_the_device_of_its_tensors_current",
    "test_op",
    "test_the_check_of_a_training_step_can_fail",
    "test_training_step",
]


@pytest.fixture(autouse=True)
def _by_environment(place: Place, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if place.backend == "native" and without_cuda(request.node):
        pytest.skip("no kernel of csrc/cuda")
    monkeypatch.setenv("VQKERNELS_BACKEND", place.backend)


@pytest.mark.parametrize("op", dispatch.OPS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_op(check: Any, op: str, place: Place) -> None:
    check(place, op)


@pytest.mark.parametrize("kind", STEPS)
def test_training_step(kind: str, place: Place) -> None:
    gpu_checks.check_a_captured_training_step_is_the_eager_one(place, STEPS[kind])
    gpu_checks.check_training_follows_the_cpu(place, STEPS[kind])
    gpu_checks.check_a_training_step_takes_no_matrix(place, STEPS[kind])


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_op_makes_the_device_of_its_tensors_current(
    op: str, place: Place, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[Tensor] = []

    @contextmanager
    def on_device(tensor: Tensor) -> Iterator[None]:
        entered.append(tensor)
        yield

    monkeypatch.setattr(kernels, "on_device", on_device)
    arguments = gpu_checks.given(op, place)
    gpu_checks.run(op, arguments, place.backend)
    assert entered
    assert all(t.device.type == "cpu" and t.is_floating_point() for t in entered)


@pytest.mark.parametrize("op", dispatch.OPS)
def test_checks_can_fail(op: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = gpu_checks.run, []

    def worse(op: str, arguments: list[Any], backend: str) -> list[Tensor]:
        found = right(op, arguments, "reference")
        calls.append(backend)
        return [t + len(calls) for t in found] if backend == place.backend else found

    monkeypatch.setattr(gpu_checks, "run", worse)
    for check in CHECKS[:4]:
        with pytest.raises(AssertionError):
            check(place, op)
    monkeypatch.setattr(Place, "peak", lambda self, work: 2**40)
    with pytest.raises(AssertionError, match="given and returned"):
        CHECKS[4](place, op)


def test_the_check_of_a_training_step_can_fail(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Place, "peak", lambda self, work: 2**40)
    with pytest.raises(AssertionError, match="N x K floats"):
        gpu_checks.check_a_training_step_takes_no_matrix(place, {})
