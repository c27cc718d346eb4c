"""Every op and the whole training step on a GPU, on both backends: tests/gpu_free/gpu_checks.py says what is checked.

Skipped without a CUDA device; there, hosted_checks.py and interpreted_checks.py run the same checks on CPU tensors.
"""

from __future__ import annotations

from typing import Any

import gpu_checks
import pytest
import torch
from gpu_checks import CHECKS, STEPS, Place, without_cuda

import vqkernels
from vqkernels import dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture(params=["native", "triton"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Each backend that a GPU has."""
    (backend,) = (b for b in dispatch.BACKENDS if b.name == request.param)
    if (reason := backend.probe("cuda")) is not None:
        pytest.skip(reason)
    if backend.name == "native" and without_cuda(request.node):
        pytest.skip("no kernel of csrc/cuda")
    # By environment, because autograd runs backward passes of CUDA tensors in a thread of its own.
    monkeypatch.setenv("VQKERNELS_BACKEND", backend.name)
    return Place(backend.name, "cuda")


@pytest.mark.parametrize("op", dispatch.OPS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_op(check: Any, op: str, place: Place) -> None:
    check(place, op)


@pytest.mark.parametrize("kind", STEPS)
def test_a_captured_training_step_is_the_eager_one(kind: str, place: Place) -> None:
    gpu_checks.check_a_captured_training_step_is_the_eager_one(place, STEPS[kind])


@pytest.mark.parametrize("kind", STEPS)
def test_training_follows_the_cpu_and_repeats_itself(kind: str, place: Place) -> None:
    gpu_checks.check_training_follows_the_cpu(place, STEPS[kind])


@pytest.mark.parametrize("kind", STEPS)
def test_a_training_step_takes_no_matrix_of_rows_and_codes(kind: str, place: Place) -> None:
    gpu_checks.check_a_training_step_takes_no_matrix(place, STEPS[kind])


@pytest.mark.parametrize("op", dispatch.OPS)
def test_both_backends_give_the_same_indices_and_sums(op: str, place: Place) -> None:
    if place.backend != "native" or (reason := dispatch.BACKENDS[1].probe("cuda")) is not None:
        pytest.skip("compared once" if place.backend != "native" else str(reason))
    for seed in range(6):
        arguments = gpu_checks.given(op, place, seed)
        found, other = (gpu_checks.run(op, arguments, backend) for backend in ("native", "triton"))
        if op in gpu_checks.EXACT:
            assert gpu_checks.same(found, other)
        torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", dispatch.OPS)
def test_tensors_of_a_device_that_is_not_current_are_worked_on_there(op: str, place: Place) -> None:
    for own, current in ((1, 0), (0, 1)):
        there = Place(place.backend, f"cuda:{own}")
        arguments = gpu_checks.given(op, there)
        with torch.cuda.device(current):
            found = gpu_checks.run(op, arguments, place.backend)
            assert torch.cuda.current_device() == current
        torch.cuda.synchronize(own)
        assert all(t.device == torch.device("cuda", own) for t in found)
        expected = gpu_checks.run(op, gpu_checks.given(op, Place("reference")), "reference")
        torch.testing.assert_close([t.cpu() for t in found], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_a_compiled_training_step_agrees_with_the_cpu(gradient: str, place: Place) -> None:
    def step(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        out = vqkernels.vector_quantize(z, codebook, gradient=gradient)
        return out.quantized.square().sum() + out.loss

    z, codebook = torch.randn(100, 12), torch.randn(40, 12)
    results = []
    for device, function in (("cpu", step), ("cuda", step), ("cuda", torch.compile(step, fullgraph=True))):
        a, b = (t.to(device).requires_grad_() for t in (z, codebook))
        with vqkernels.use_backend("reference" if device == "cpu" else place.backend):
            loss = function(a, b)
            loss.backward()
        results.append([t.detach().cpu() for t in (loss, a.grad, b.grad)])
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-5, atol=1e-5)


def test_asking_for_a_backend_gets_it(place: Place) -> None:
    x, codes = torch.randn(5, 3, device="cuda"), torch.randn(7, 3, device="cuda")
    assert vqkernels.explain("nearest", x, codes).splitlines()[0] == f"nearest on cuda: {place.backend}"
