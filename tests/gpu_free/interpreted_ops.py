"""``lookup``, ``codebook_sum``, ``quantize_grad`` and ``ema_update`` on Triton's kernels, against the reference.

Run by test_triton_interpreter.py in Triton's interpreter, where there are no bfloat16 results (it truncates, GPUs round
to nearest), and by test_ptx_triton.py as compiled.
"""

from __future__ import annotations

import gpu_data
import pytest
import torch
from gpu_data import LAYOUTS, case, laid_out
from torch import Tensor

import vqkernels
from vqkernels import _native, _triton, dispatch, ops

DTYPES = (torch.float32, torch.float64, torch.float16, *(() if _triton.interpreted() else (torch.bfloat16,)))
KINDS = tuple(kind for kind in gpu_data.KINDS if kind[0] in DTYPES)
# H, B, S, D and K
SIZES = ((1, 1, 1, 1, 1), (2, 3, 7, 5, 9), (1, 2, 33, 130, 3))


@pytest.mark.parametrize(("dtype", "layout"), KINDS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_lookup_gathers_and_converts(sizes: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    _, codes, indices = case(sizes, dtype, layout)
    for channel_first in (False, True):
        for out in (None, *(d for d in DTYPES if d != torch.float64)):
            found = ops.lookup(codes, indices, channel_first, out, "triton")
            expected = ops.lookup(codes, indices, channel_first, out, "reference")
            assert found.dtype == expected.dtype
            assert found.stride() == expected.stride()
            assert found.equal(expected)


@pytest.mark.parametrize(("dtype", "layout"), KINDS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_codebook_sum_equals_the_reference_to_the_bit(sizes: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    x, codes, indices = case(sizes, dtype, layout)
    sums, counts = ops.codebook_sum(x, indices, codes.shape[1], "triton")
    expected = ops.codebook_sum(x, indices, codes.shape[1], "reference")
    assert sums.dtype == expected[0].dtype
    assert sums.equal(expected[0])
    assert counts.equal(expected[1])


def test_codebook_sum_survives_collapse_and_codes_without_rows() -> None:
    n = 700
    x = torch.randn(1, 1, n, 3)
    indices = torch.where(torch.rand(1, 1, n) < 0.9, 4, torch.randint(-1, 40, (1, 1, n)))
    assert int((indices == 4).sum()) > 2 * 256
    for num_codes in (40, 130):
        found = ops.codebook_sum(x, indices, num_codes, "triton")
        expected = ops.codebook_sum(x, indices, num_codes, "reference")
        assert found[0].equal(expected[0])
        assert found[1].equal(expected[1])
    few = ops.codebook_sum(x[:, :, :9], indices[:, :, :9], 40, "triton")
    assert few[0].equal(ops.codebook_sum(x[:, :, :9], indices[:, :, :9], 40, "reference")[0])
    nothing = ops.codebook_sum(x, torch.full_like(indices, -1), 7, "triton")
    assert not nothing[0].any()
    assert not nothing[1].any()
    assert not ops.codebook_sum(x[:, :, :0], indices[:, :, :0], 7, "triton")[0].any()


@pytest.mark.parametrize(
    "sizes", [(256,), (257,), (255, 1), (256, 256), (1, 300, 255, 0, 512, 513), (0, 0, 600)], ids=str
)
def test_chunks_of_neighbouring_codes_do_not_meet(sizes: tuple[int, ...]) -> None:
    # Full chunks, broken ones and codes without rows beside each other, in two heads and around rows without a code.
    one = torch.cat([torch.full((n,), code) for code, n in enumerate((*sizes, 5))])
    one[-5:] = -1
    indices = torch.stack([one[torch.randperm(len(one))] for _ in range(2)])[:, None]
    x = torch.randn(2, 1, len(one), 2)
    found = ops.codebook_sum(x, indices, len(sizes), "triton")
    expected = ops.codebook_sum(x, indices, len(sizes), "reference")
    assert found[0].equal(expected[0])
    assert found[1].tolist() == [list(map(float, sizes))] * 2


def test_keys_beyond_16_bits_sort_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    from vqkernels.ops.codebook_sum import triton as backend

    sorted_as: list[torch.dtype] = []
    sort = Tensor.sort
    monkeypatch.setattr(Tensor, "sort", lambda self, **k: sorted_as.append(self.dtype) or sort(self, **k))

    class Skipped:  # a program per code: too many to execute on the host
        def __getitem__(self, grid: object) -> object:
            return lambda *args, **kwargs: None

    for num_codes in (2**15 - 1, 2**15):
        with monkeypatch.context() as patch:
            patch.setattr(backend, "_slot_owners", Skipped())
            patch.setattr(backend, "_chunk_sums", Skipped())
            backend.run(torch.ones(1, 1, 3, 1), torch.tensor([[[num_codes - 1, 0, -1]]]), num_codes)
    assert sorted_as == [torch.int16, torch.int32]


@pytest.mark.parametrize("gradient", ["straight_through", "rotation", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_quantize_grad_agrees_with_the_reference(sizes: tuple[int, ...], dtype: torch.dtype, gradient: str) -> None:
    for layout in LAYOUTS:
        z, codes, indices = case(sizes, dtype, layout)
        grad = laid_out(torch.randn(z.shape), layout)
        commitment = torch.tensor(0.3)
        for channel_first in (layout == "channel_first",) if layout != "rows" else (False, True):
            found = ops.quantize_grad(grad, z, codes, indices, commitment, gradient, channel_first, "triton")
            expected = ops.quantize_grad(grad, z, codes, indices, commitment, gradient, channel_first, "reference")
            assert found.stride() == expected.stride()
            close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
            torch.testing.assert_close(found, expected, rtol=close, atol=close)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [*SIZES, (1, 3, 400, 7, 4)], ids=str)
def test_quantize_output_agrees_with_the_reference(sizes: tuple[int, ...], dtype: torch.dtype, measured: bool) -> None:
    for layout in LAYOUTS if sizes[2] < 100 else LAYOUTS[:1]:
        z, codes, indices = case(sizes, dtype, layout)
        distance = torch.rand(indices.shape) if measured else None
        for channel_first in (layout == "channel_first",) if layout != "rows" else (False, True):
            given = (z, codes.float(), indices, distance, True, channel_first)
            found, again = (ops.quantize_output(*given, "triton") for _ in range(2))
            expected = ops.quantize_output(*given, "reference")
            assert found[0].equal(expected[0])
            assert found[0].stride() == expected[0].stride()
            assert found[3].equal(expected[3])
            torch.testing.assert_close(
                found[1:3], expected[1:3], rtol=1e-12 if dtype == torch.float64 else 2e-6, atol=0
            )
            assert all(a.equal(b) for a, b in zip(found, again, strict=True))
    nothing = ops.quantize_output(z, codes.float(), indices.clamp(max=-1), None, True, False, "triton")
    assert (nothing[1].item(), nothing[2].item(), nothing[3].item()) == (0.0, 0.0, 1.0)
    assert ops.quantize_output(z[:, :, :0], codes, indices[:, :, :0], None, True, False, "triton")[1].item() == 0.0


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("h", "k", "d"), [(1, 1, 1), (2, 9, 5), (1, 33, 130)])
def test_ema_update_agrees_with_the_reference(h: int, k: int, d: int, normalize: bool) -> None:
    state = [torch.rand(h, k) * 5, torch.randn(h, k, d), torch.randn(h, k, d)]
    counts, sums = torch.randint(0, 9, (h, k)).float(), torch.randn(h, k, d)
    copy = [t.clone() for t in state]
    ops.ema_update(*state, counts, sums, 0.9, 1e-5, normalize, "triton")
    ops.ema_update(*copy, counts, sums, 0.9, 1e-5, normalize, "reference")
    for found, expected in zip(state, copy, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    empty = [torch.zeros(h, k), torch.zeros(h, k, d), torch.randn(h, k, d)]
    kept = empty[2].clone()
    ops.ema_update(*empty, counts * 0, sums * 0, 0.9, 0.0, normalize, "triton")
    assert empty[2].equal(kept)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_quantizer_forward_and_backward(gradient: str) -> None:
    results = []
    for name in ("triton", "reference"):
        torch.manual_seed(3)
        z, codebook = torch.randn(2, 12, 6, requires_grad=True), torch.randn(20, 6, requires_grad=True)
        with vqkernels.use_backend(name):
            out = vqkernels.vector_quantize(z, codebook, gradient=gradient, mask=torch.rand(2, 12) < 0.8)
            (out.quantized.square().sum() + out.loss).backward()
        results.append((out.quantized, out.indices, out.loss, z.grad, codebook.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_module_trains_with_moving_averages() -> None:
    results = []
    for name in ("triton", "reference"):
        torch.manual_seed(4)
        vq = vqkernels.VectorQuantizer(16, 8, decay=0.9)
        with vqkernels.use_backend(name):
            for _ in range(2):
                out = vq(torch.randn(2, 8, 3, 5))
        results.append((out.indices, out.loss, vq.state_dict()))
    assert results[0][0].equal(results[1][0])
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=1e-5, atol=1e-5)


def test_index_out_of_range_is_an_error_on_cpu() -> None:
    x, codes = torch.randn(1, 1, 3, 2), torch.randn(1, 4, 2)
    for wrong in (4, -2):
        indices = torch.tensor([[[0, wrong, 1]]])
        with pytest.raises(ValueError, match=f"indices contains {wrong}"):
            ops.lookup(codes, indices, False, None, "triton")
        with pytest.raises(ValueError, match=f"indices contains {wrong}"):
            ops.codebook_sum(x, indices, 4, "triton")


def test_float64_search_is_unsupported_and_falls_back() -> None:
    x, codes = torch.randn(5, 3).double(), torch.randn(4, 3).double()
    with pytest.raises(dispatch.Unsupported, match=r"x is torch\.float64, not one of float32, float16, bfloat16"):
        vqkernels.nearest(x, codes, backend="triton")
    assert vqkernels.nearest(x, codes)[0].equal(vqkernels.nearest(x, codes, backend="reference")[0])


@pytest.mark.skipif(_native.unavailable() is not None, reason="no native library")
def test_automatic_choice_on_cpu_does_not_take_the_interpreter() -> None:
    text = vqkernels.explain("nearest", torch.randn(5, 3), torch.randn(4, 3))
    assert text.splitlines()[0] == "nearest on cpu: native"
    assert "triton     available" in text
