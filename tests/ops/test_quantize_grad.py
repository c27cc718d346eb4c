"""quantize_grad: the three estimators against autograd in float64, in every layout and mix of dtypes."""

from __future__ import annotations

import pytest
import torch
from on_device import needs_cpu
from torch import Tensor

from vqkernels.ops import quantize_grad
from vqkernels.ops.quantize_grad import GRADIENTS

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("rows", "channel_first", "heads_last", "sliced")
C = 0.37
# Roundings of the arithmetic, then the one of the result.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def make_rows(layout: str, h: int, b: int, s: int, d: int, dtype: torch.dtype) -> Tensor:
    """(H, B, S, D) in a layout that a model may hand over."""
    if layout == "rows":
        return torch.randn(h, b, s, d).to(dtype)
    if layout == "channel_first":
        return torch.randn(h, b, d, s).to(dtype).transpose(2, 3)
    if layout == "heads_last":
        return torch.randn(b, s, h, d).to(dtype).permute(2, 0, 1, 3)
    return torch.randn(h, b, 2 * s, d + 3).to(dtype)[:, :, ::2, 1 : d + 1]


def rotated(z: Tensor, e: Tensor) -> Tensor:
    """Fifty et al. 2024, eq. 4: lam * (I - 2 w w^T + 2 e^ z^^T) z with all but the last z held constant; (N, D)."""
    z0, e0 = z.detach(), e.detach()
    z_norm, e_norm = z0.norm(dim=1).clamp(min=1e-6), e0.norm(dim=1).clamp(min=1e-6)
    z_unit, e_unit = z0 / z_norm[:, None], e0 / e_norm[:, None]
    w = z_unit + e_unit
    w = w / w.norm(dim=1, keepdim=True).clamp(min=1e-6)
    eye = torch.eye(z.shape[1], dtype=z.dtype)
    rotation = eye - 2 * w[:, :, None] * w[:, None, :] + 2 * e_unit[:, :, None] * z_unit[:, None, :]
    return (e_norm / z_norm)[:, None] * torch.einsum("nij,nj->ni", rotation, z)


def oracle(grad: Tensor, z: Tensor, codebook: Tensor, indices: Tensor, gradient: str) -> Tensor:
    """d/dz of <grad, estimator(z)> + C/2 |z - e|^2 by autograd in float64, then zeros where there is no code."""
    head = torch.arange(z.shape[0]).view(-1, 1, 1)
    d = z.shape[-1]
    e = codebook.double()[head, indices.clamp(min=0)].reshape(-1, d)
    rows = z.double().reshape(-1, d).clone().requires_grad_()
    out = {"straight_through": rows, "none": e, "rotation": rotated(rows, e)}[gradient]
    loss = (grad.double().reshape(-1, d) * out).sum() + C / 2 * (rows - e).square().sum()
    (dz,) = torch.autograd.grad(loss, rows)
    return dz.reshape(z.shape) * (indices >= 0)[..., None]


def check(
    grad: Tensor, z: Tensor, codebook: Tensor, indices: Tensor, gradient: str, channel_first: bool, backend: str
) -> None:
    """Against the oracle; the scale is that of the largest term, as terms cancel."""
    c = torch.tensor(C, dtype=torch.float64)
    out = quantize_grad(grad, z, codebook, indices, c, gradient, channel_first, backend)
    assert out.dtype == z.dtype
    assert out.is_contiguous()
    expected = oracle(grad, z, codebook, indices, gradient)
    expected = expected.transpose(2, 3) if channel_first else expected
    assert out.shape == expected.shape
    scale = expected.abs().amax(3 if not channel_first else 2, keepdim=True).clamp(min=1.0)
    assert ((out.double() - expected).abs() <= TOLERANCE[z.dtype] * scale).all()


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_autograd(
    backend: str, gradient: str, channel_first: bool, layout: str, dtype: torch.dtype
) -> None:
    for h, b, s, d, k in ((1, 1, 1, 1, 1), (2, 3, 63, 5, 7), (1, 2, 257, 33, 3), (3, 100, 1, 17, 63)):
        z = make_rows(layout, h, b, s, d, dtype)
        check(
            make_rows(layout, h, b, s, d, dtype),
            z,
            torch.randn(h, k, d),
            torch.randint(-1, k, (h, b, s)),
            gradient,
            channel_first,
            backend,
        )


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("codebook_dtype", DTYPES)
def test_dtypes_and_layouts_mix(
    backend: str, gradient: str, grad_dtype: torch.dtype, codebook_dtype: torch.dtype
) -> None:
    indices = torch.randint(-1, 7, (2, 3, 40))
    codebook = torch.randn(20, 7, 2).to(codebook_dtype).permute(2, 1, 0)
    for dtype in DTYPES:
        for layouts in (("rows", "channel_first"), ("channel_first", "rows"), ("channel_first", "channel_first")):
            grad = make_rows(layouts[0], 2, 3, 40, 20, grad_dtype)
            check(grad, make_rows(layouts[1], 2, 3, 40, 20, dtype), codebook, indices, gradient, True, backend)


@pytest.mark.parametrize("layout", ["rows", "channel_first"])
def test_gradient_that_is_one_number_expanded(backend: str, layout: str) -> None:
    # What out.sum().backward() sends.
    grad = torch.tensor(2.0).expand(1, 2, 33, 9)
    indices = torch.randint(0, 4, (1, 2, 33))
    for gradient in GRADIENTS:
        check(
            grad, make_rows(layout, 1, 2, 33, 9, torch.float32), torch.randn(1, 4, 9), indices, gradient, False, backend
        )


def test_literal_straight_through(backend: str) -> None:
    z, codebook = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.tensor([[[0.0, 1.0]]])
    out = quantize_grad(
        torch.ones_like(z),
        z,
        codebook,
        torch.tensor([[[0, -1]]]),
        torch.tensor(0.5),
        "straight_through",
        False,
        backend,
    )
    assert out.tolist() == [[[[1.5, 1.5], [0.0, 0.0]]]]


def test_rotation_by_a_right_angle(backend: str) -> None:
    # z = (1, 0) turned and stretched onto e = (0, 2): the transpose takes g = (0, 1) back to (2, 0).
    z, codebook = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[0.0, 2.0]]])
    args = (torch.tensor([[[[0.0, 1.0]]]]), z, codebook, torch.tensor([[[0]]]), torch.tensor(0.0))
    torch.testing.assert_close(quantize_grad(*args, "rotation", False, backend), torch.tensor([[[[2.0, 0.0]]]]))


@pytest.mark.parametrize("scale", [0.0, 1e-9])
def test_rotation_of_a_vanishing_row_is_finite(backend: str, scale: float) -> None:
    z = torch.ones(1, 1, 2, 20) * scale
    out = quantize_grad(
        torch.randn(1, 1, 2, 20),
        z,
        torch.randn(1, 3, 20),
        torch.tensor([[[0, 2]]]),
        torch.tensor(C),
        "rotation",
        False,
        backend,
    )
    assert out.isfinite().all()
    assert out.abs().amax() > 0


def test_rotation_onto_the_opposite_code_is_finite(backend: str) -> None:
    z = torch.randn(1, 1, 3, 20)
    out = quantize_grad(
        torch.randn(1, 1, 3, 20), z, -z[:, 0], torch.tensor([[[0, 1, 2]]]), torch.tensor(C), "rotation", False, backend
    )
    assert out.isfinite().all()


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("layout", ["rows", "channel_first"])
def test_masked_rows_get_zero_even_from_nan(backend: str, gradient: str, layout: str) -> None:
    z, grad = make_rows(layout, 1, 1, 40, 5, torch.float32), make_rows(layout, 1, 1, 40, 5, torch.float32)
    z[0, 0, 3] = float("nan")
    grad[0, 0, 3] = float("inf")
    indices = torch.zeros(1, 1, 40, dtype=torch.int64)
    indices[0, 0, 3] = -1
    out = quantize_grad(grad, z, torch.randn(1, 1, 5), indices, torch.tensor(C), gradient, True, backend)
    assert out[0, 0, :, 3].tolist() == [0.0] * 5
    assert out.isfinite().all()


@pytest.mark.parametrize("channel_first", [False, True])
def test_no_rows(backend: str, channel_first: bool) -> None:
    z = torch.randn(2, 5, 0, 3)
    out = quantize_grad(
        z,
        z,
        torch.randn(2, 4, 3),
        torch.empty((2, 5, 0), dtype=torch.int64),
        torch.tensor(C),
        "rotation",
        channel_first,
        backend,
    )
    assert out.shape == ((2, 5, 3, 0) if channel_first else (2, 5, 0, 3))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_same_bits_for_any_number_of_threads(backend: str, gradient: str) -> None:
    results = []
    threads = torch.get_num_threads()
    for layout in ("rows", "channel_first"):
        grad, z = make_rows(layout, 2, 3, 1001, 19, torch.float32), make_rows(layout, 2, 3, 1001, 19, torch.float32)
        args = (grad, z, torch.randn(2, 9, 19), torch.randint(-1, 9, (2, 3, 1001)), torch.tensor(C))
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(quantize_grad(*args, gradient, layout == "channel_first", backend))
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[3], results[4])
    assert torch.equal(results[3], results[5])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_opcheck(backend: str, layout: str, gradient: str) -> None:
    z = make_rows(layout, 2, 3, 5, 4, torch.float32)
    for channel_first in (False, True):
        args = (make_rows("rows", 2, 3, 5, 4, torch.float16), z, torch.randn(2, 7, 4), torch.randint(-1, 7, (2, 3, 5)))
        torch.library.opcheck(
            torch.ops.vqkernels.quantize_grad.default, (*args, torch.tensor(C), gradient, channel_first, backend)
        )


@needs_cpu
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("wrong", [-2, 4, 2**40])
def test_index_out_of_range_is_named(backend: str, gradient: str, wrong: int) -> None:
    z, codebook, indices = torch.randn(1, 1, 3, 2), torch.randn(1, 4, 2), torch.tensor([[[0, wrong, 3]]])
    with pytest.raises(
        ValueError, match=rf"quantize_grad: indices contains {wrong}, expected -1 or a code in \[0, 4\)"
    ):
        quantize_grad(z, z, codebook, indices, torch.tensor(C), gradient, False, backend)
