"""``residual_nearest`` on a GPU: the CPU's bits by the one launch and by every screen, captured, over and over.

Skipped without a CUDA device; tests/gpu_free runs the same kernels on the host and in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from gpu_checks import Place
from torch import Tensor

from vqkernels import _cuda, _cuda_residual, dispatch, ops
from vqkernels._cuda_nearest import DIRECT, SM80, SM90, Device, Plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
# H, B, S, D and K of each level.
SHAPES = (
    (1, 1, 1, 256, (2048,) * 32),
    (1, 16, 1, 256, (2048,) * 8),
    (1, 4, 16, 128, (1024,) * 8),
    (2, 3, 21, 5, (7, 1, 300)),
    (1, 1, 100, 300, (65, 64, 257)),
    (3, 1, 63, 8, (1030,) * 9),
)


@pytest.fixture(params=["native", "direct", "sm80", "sm90", "triton"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Each backend, and of the CUDA library every way that this GPU has, whatever the plan would choose."""
    name = str(request.param)
    backend = "triton" if name == "triton" else "native"
    (found,) = (b for b in dispatch.BACKENDS if b.name == backend)
    if (reason := found.probe("cuda")) is not None:
        pytest.skip(reason)
    if name == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is Hopper's")
    screen = {"direct": DIRECT, "sm80": SM80, "sm90": SM90}.get(name)
    if screen is not None:

        def plan(heads: int, rows: int, sizes: Sequence[int], dim: int, device: Device) -> Plan:
            return Plan(screen, 2, max(rows, 1), 128)

        monkeypatch.setattr(_cuda_residual, "plan", plan)
    return Place(backend, "cuda")


def case(shape: tuple[int, int, int, int, tuple[int, ...]], seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    h, b, s, d, sizes = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(h, b, d, s, generator=generator).transpose(2, 3)
    codebooks = [torch.randn(h, k, d, generator=generator) * 0.8**q for q, k in enumerate(sizes)]
    for codes in codebooks[1::2]:  # every second level has each code twice
        half = codes.shape[1] // 2
        codes[:, half : 2 * half] = codes[:, :half].clone()
    return x, codebooks


def check(x: Tensor, codebooks: list[Tensor], place: Place, channel_first: bool = False) -> None:
    found = ops.residual_nearest(x.cuda(), [codes.cuda() for codes in codebooks], channel_first, place.backend)
    expected = ops.residual_nearest(x, codebooks, channel_first, "reference")
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.cpu().nan_to_num(1e30), b.nan_to_num(1e30))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[:4]}-{len(shape[4])}x{shape[4][0]}")
def test_bits_of_the_reference(shape: tuple[int, int, int, int, tuple[int, ...]], place: Place) -> None:
    for channel_first in (False, True):
        check(*case(shape), place, channel_first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_rows_and_codes(dtype: torch.dtype, place: Place) -> None:
    x, codebooks = case((1, 2, 20, 12, (40, 50)))
    check(x.to(dtype), [codebooks[0].to(dtype), codebooks[1]], place)


def test_rows_that_nothing_can_win(place: Place) -> None:
    x, codebooks = case((1, 1, 40, 6, (40, 40, 40)))
    x[0, 0, 2, 3], x[0, 0, 5, 0], codebooks[1][0, 4, 2] = float("nan"), float("inf"), float("nan")
    check(x, codebooks, place)


def test_a_barrier_holds_for_many_launches(place: Place) -> None:
    """One that is wrong now and then would be wrong in one of so many."""
    x, codebooks = case((1, 16, 1, 64, (512,) * 16))
    x, codebooks = x.cuda(), [codes.cuda() for codes in codebooks]
    first = ops.residual_nearest(x, codebooks, False, place.backend)
    expected = ops.residual_nearest(x.cpu(), [codes.cpu() for codes in codebooks], False, "reference")
    assert first[0].cpu().equal(expected[0])
    for _ in range(200):
        assert ops.residual_nearest(x, codebooks, False, place.backend)[0].equal(first[0])


def test_a_captured_call_follows_its_arguments(place: Place) -> None:
    x, codebooks = case(SHAPES[1])
    static, given = x.cuda(), [codes.cuda() for codes in codebooks]
    replay, results = place.captured(lambda: list(ops.residual_nearest(static, given, False, place.backend)))
    for seed in (1, 2):
        new, _ = case(SHAPES[1], seed)
        static.copy_(new)
        replay()
        place.wait()
        expected = ops.residual_nearest(new, codebooks, False, "reference")
        assert all(a.cpu().equal(b) for a, b in zip(results, expected, strict=True))


def test_two_streams_at_once(place: Place) -> None:
    """Cooperative launches of two streams wait for each other's multiprocessors, not for each other's blocks."""
    cases = [case((1, 8, 1, 64, (700,) * 8), seed) for seed in range(2)]
    there = [(x.cuda(), [codes.cuda() for codes in codebooks]) for x, codebooks in cases]
    found = []
    for _ in range(10):
        for context, (x, codebooks) in zip(place.streams(2), there, strict=True):
            with context:
                found.append(ops.residual_nearest(x, codebooks, False, place.backend)[0])
    place.wait()
    expected = [ops.residual_nearest(x, codebooks, False, "reference")[0] for x, codebooks in cases]
    for i, indices in enumerate(found):
        assert indices.cpu().equal(expected[i % 2])


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_memory_is_that_of_rows_and_codes(backend: str) -> None:
    (found,) = (b for b in dispatch.BACKENDS if b.name == backend)
    if (reason := found.probe("cuda")) is not None:
        pytest.skip(reason)
    n, k, d, levels = 20000, 3000, 16, 8
    place = Place(backend, "cuda")
    x, codebooks = torch.randn(1, 1, n, d, device="cuda"), [torch.randn(1, k, d, device="cuda") for _ in range(levels)]
    peak = place.peak(lambda: ops.residual_nearest(x, codebooks, False, backend))
    held = 4 * (n * d * 2 + levels * (k * d + 3 * n))
    assert peak <= 8 * held + 2**21, f"{peak} bytes beside {held}; N x K floats are {4 * n * k}"


def test_a_gpu_has_room_for_the_one_launch() -> None:
    if (reason := _cuda.unavailable()) is not None:
        pytest.skip(reason)
    x, codebooks = case((1, 1024, 1, 8, (64, 64)))
    assert "one launch" in _cuda_residual.describe(x.cuda(), codebooks)
    check(x, codebooks, Place("native", "cuda"))
