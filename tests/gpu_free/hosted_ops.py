"""``lookup``, ``codebook_sum``, ``ema_update``, ``quantize_grad``, ``quantize_output`` of csrc/cuda, in several orders.

Run by test_cuda_host.py, and by `make asan` with a library that ASan and UBSan watch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_host import SEEDS, launches, set_seed
from gpu_data import KINDS, case, laid_out
from torch import Tensor

import vqkernels
from vqkernels import _cuda, ops

# H, B, S, D and K: around tiles of 32 x 32, lanes of 8 and 16, and blocks of 256
SIZES = ((1, 1, 1, 1, 1), (2, 3, 7, 5, 9), (1, 2, 33, 130, 3), (3, 1, 40, 16, 300), (1, 70, 1, 47, 31))


@pytest.fixture(autouse=True)
def _order(request: pytest.FixtureRequest) -> None:
    """One order per test, so that all of them are met."""
    assert _cuda.hosted(), "VQKERNELS_CUDA_LIBRARY must name libvqk_cuda_host.so"
    set_seed(SEEDS[zlib.crc32(request.node.name.encode()) % len(SEEDS)])


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls an op of the native backend on the kernels of csrc/cpu."""

    def call(op: Callable[..., Any], *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(_cuda, "serves", lambda tensor: False)
            return op(*args, "native")

    return call


def same(found: Any, expected: Any) -> bool:
    """The same bits, dtypes and strides."""
    pairs = zip(*((t,) if isinstance(t, Tensor) else t for t in (found, expected)), strict=True)
    return all(a.dtype == b.dtype and a.stride() == b.stride() and a.equal(b) for a, b in pairs)


@pytest.mark.parametrize(("dtype", "layout"), KINDS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_lookup_gathers_and_converts(sizes: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    _, codes, indices = case(sizes, dtype, layout)
    for channel_first in (False, True):
        for out in (None, torch.float32, torch.bfloat16):
            expected = ops.lookup(codes, indices, channel_first, out, "reference")
            assert same(ops.lookup(codes, indices, channel_first, out, "native"), expected)


@pytest.mark.parametrize(("dtype", "layout"), KINDS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_codebook_sum_has_the_bits_of_the_cpu_and_the_reference(
    sizes: tuple[int, ...], dtype: torch.dtype, layout: str, on_cpu: Callable[..., Any]
) -> None:
    x, codes, indices = case(sizes, dtype, layout)
    found = ops.codebook_sum(x, indices, codes.shape[1], "native")
    assert same(found, ops.codebook_sum(x, indices, codes.shape[1], "reference"))
    assert same(found, on_cpu(ops.codebook_sum, x, indices, codes.shape[1]))


# Around chunks of 256 rows, blocks of 2048 keys, and one to three passes of the sort; each in one order.
@pytest.mark.parametrize(
    ("n", "k", "d", "share", "seed"),
    [
        (1, 1, 1, 1.0, SEEDS[1]),
        (255, 3, 2, 0.0, SEEDS[2]),
        (256, 1, 2, 1.0, SEEDS[1]),
        (257, 2, 5, 0.9, SEEDS[1]),
        (2049, 300, 3, 0.9, SEEDS[1]),
        (2500, 1000, 1, 0.9, SEEDS[2]),
        (4100, 5, 2, 0.3, SEEDS[1]),
        (40, 66000, 2, 0.5, SEEDS[2]),
    ],
)
def test_codebook_sum_survives_a_code_that_owns_most_rows(n: int, k: int, d: int, share: float, seed: int) -> None:
    set_seed(seed)
    indices = torch.randint(-1, k, (1, 1, n))
    indices[:, :, : int(share * n)] = k - 1
    indices = indices[:, :, torch.randperm(n)]
    for dtype in (torch.float32, torch.float64) if n < 300 else (torch.float32,):
        x = torch.randn(1, 1, n, d, dtype=dtype)
        assert same(ops.codebook_sum(x, indices, k, "native"), ops.codebook_sum(x, indices, k, "reference"))


def test_codebook_sum_without_rows_is_zero() -> None:
    for sums, counts in (
        ops.codebook_sum(torch.randn(2, 0, 3, 5), torch.zeros(2, 0, 3, dtype=torch.int64), 7, "native"),
        ops.codebook_sum(torch.randn(2, 2, 3, 5), torch.full((2, 2, 3), -1), 7, "native"),
    ):
        assert sums.shape == (2, 7, 5)
        assert not sums.any()
        assert not counts.any()


@pytest.mark.parametrize("wrong", [-2, 4, 2**40, -(2**63), 2**63 - 1])
def test_indices_out_of_range_are_no_codes(wrong: int) -> None:
    # A check would wait for the device; what must not happen is an access out of bounds.
    x, codes, indices = torch.randn(1, 1, 6, 8), torch.randn(1, 4, 8), torch.tensor([[[0, 3, -1, 2, wrong, 1]]])
    expected = torch.where(indices == wrong, -1, indices)
    one = torch.ones(())
    assert same(
        ops.lookup(codes, indices, False, None, "native"), ops.lookup(codes, expected, False, None, "reference")
    )
    assert same(ops.codebook_sum(x, indices, 4, "native"), ops.codebook_sum(x, expected, 4, "reference"))
    found = ops.quantize_grad(x, x, codes, indices, one, "straight_through", False, "native")
    assert same(found, ops.quantize_grad(x, x, codes, expected, one, "straight_through", False, "reference"))
    for distance in (None, torch.rand(1, 1, 6)):
        found, expected_output = (
            ops.quantize_output(x, codes, i, distance, True, False, "native") for i in (indices, expected)
        )
        assert same(found, expected_output)


@pytest.mark.parametrize(("dtype", "layout"), KINDS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients_have_the_bits_of_the_cpu(
    sizes: tuple[int, ...], dtype: torch.dtype, layout: str, on_cpu: Callable[..., Any]
) -> None:
    z, codes, indices = case(sizes, dtype, layout)
    grad = laid_out(torch.randn(z.shape), "rows" if layout == "channel_first" else layout)
    for gradient in ("straight_through", "rotation", "none"):
        for channel_first in (False, True):
            args = (grad, z, codes, indices, torch.tensor(0.7), gradient, channel_first)
            assert same(ops.quantize_grad(*args, "native"), on_cpu(ops.quantize_grad, *args)), (gradient, channel_first)


def compare_outputs(found: Any, expected: Any) -> None:
    """Values and weight to the bit; losses are added up in another order."""
    assert same((found[0], found[3]), (expected[0], expected[3]))
    rel = 1e-13 if found[1].dtype == torch.float64 else 2e-7
    torch.testing.assert_close(found[1:3], expected[1:3], rtol=rel, atol=0)
    assert found[1].equal(found[2])


@pytest.mark.parametrize(("dtype", "layout"), KINDS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_output_gathers_and_measures(
    sizes: tuple[int, ...], dtype: torch.dtype, layout: str, on_cpu: Callable[..., Any]
) -> None:
    z, codes, indices = case(sizes, dtype, layout)
    for given in (codes, codes.float()):
        for distance in (None, torch.rand(indices.shape)):
            for channel_first in (False, True):
                args = (z, given, indices, distance, True, channel_first)
                found = ops.quantize_output(*args, "native")
                compare_outputs(found, on_cpu(ops.quantize_output, *args))
                set_seed(SEEDS[1])
                assert same(ops.quantize_output(*args, "native"), found)


@pytest.mark.parametrize("n", [1, 32, 33, 64])
def test_output_of_one_tile_is_one_launch(n: int) -> None:
    z, codes, indices = torch.randn(1, 1, n, 8), torch.randn(1, 5, 8), torch.randint(5, (1, 1, n))
    for distance in (None, torch.rand(1, 1, n)):
        before = launches()
        ops.quantize_output(z, codes, indices, distance, False, False, "native")
        assert launches() - before == (1 if n <= 32 else 2)


def test_output_of_more_tiles_than_blocks(on_cpu: Callable[..., Any]) -> None:
    n = 32 * 1024 + 1307
    z, codes, indices = torch.randn(1, 1, n, 8), torch.randn(1, 7, 8), torch.randint(-1, 7, (1, 1, n))
    args = (z, codes, indices, torch.rand(1, 1, n), True, False)
    expected = on_cpu(ops.quantize_output, *args)
    for seed in SEEDS[1:3]:
        set_seed(seed)
        compare_outputs(ops.quantize_output(*args, "native"), expected)


def test_output_without_rows_is_no_loss() -> None:
    for sizes in ((1, 0, 3, 5), (2, 3, 4, 0)):
        indices = torch.zeros(sizes[:3], dtype=torch.int64)
        for distance in (None, torch.zeros(sizes[:3])):
            found = ops.quantize_output(
                torch.randn(sizes), torch.randn(2, 7, sizes[3])[: sizes[0]], indices, distance, True, False, "native"
            )
            assert found[0].shape == sizes
            assert [t.item() for t in found[1:]] == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("h", "k", "d"), [(1, 1, 1), (2, 33, 7), (1, 5000, 2), (3, 9, 40)])
def test_moving_averages_have_the_bits_of_the_cpu(
    h: int, k: int, d: int, normalize: bool, on_cpu: Callable[..., Any]
) -> None:
    # Integers and their halves add up exactly in any order, so that even the total has the CPU's bits.
    size, counts = torch.randint(0, 50, (2, h, k)).float()
    average, sums, codebook = torch.randn(3, h, k, d)
    found, expected = ([t.clone() for t in (size, average, codebook)] for _ in range(2))
    for _ in range(2):
        ops.ema_update(*found, counts, sums, 0.5, 1e-5, normalize, "native")
        on_cpu(ops.ema_update, *expected, counts, sums, 0.5, 1e-5, normalize)
    assert same(found, expected)


def test_moving_averages_keep_codes_that_nothing_is_known_about() -> None:
    state = [torch.zeros(1, 3), torch.zeros(1, 3, 2), torch.randn(1, 3, 2)]
    before = state[2].clone()
    ops.ema_update(*state, torch.zeros(1, 3), torch.zeros(1, 3, 2), 0.9, 0.0, True, "native")
    assert state[2].equal(before)


def test_a_training_step_runs_on_the_hosted_kernels() -> None:
    results = []
    for backend in ("native", "reference"):
        torch.manual_seed(1)
        vq = vqkernels.VectorQuantizer(16, 8, decay=0.9, gradient="rotation")
        z = torch.randn(2, 8, 5, 3, requires_grad=True)
        with vqkernels.use_backend(backend):
            out = vq(z)
            (out.quantized.square().sum() + out.loss).backward()
        results.append([z.grad, *vq.state_dict().values()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
