"""The public functions against a plain float64 re-implementation that leaves everything to autograd."""

from __future__ import annotations

import pytest
import torch
from on_device import needs_cpu
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

import vqkernels
from vqkernels import VQOutput, codebook_sum, lookup, nearest, vector_quantize
from vqkernels.functional import lookup_rows

METRICS = ["l2", "cosine", "dot"]
GRADIENTS = ["straight_through", "rotation", "none"]


def plain_indices(z: Tensor, codebook: Tensor, metric: str) -> Tensor:
    z, codebook = z.detach().double(), codebook.detach().double()
    if metric == "l2":
        return (z[..., None, :] - codebook).square().sum(-1).argmin(-1)
    scale = codebook.norm(dim=-1) if metric == "cosine" else 1.0
    return (z @ codebook.T / scale).argmax(-1)


def plain_rotation(z: Tensor, e: Tensor) -> Tensor:
    """Fifty et al. 2024, algorithm 1: rotate and scale z onto e, with the map itself held constant."""
    length_z, length_e = z.norm(dim=-1, keepdim=True).clamp(min=1e-6), e.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    unit_z, unit_e = (z / length_z).detach(), (e / length_e).detach()
    w = unit_z + unit_e
    w = (w / w.norm(dim=-1, keepdim=True).clamp(min=1e-6)).detach()
    rotated = z - 2 * (z * w).sum(-1, keepdim=True) * w + 2 * (z * unit_z).sum(-1, keepdim=True) * unit_e
    return rotated * (length_e / length_z).detach()


def plain_quantize(
    z: Tensor, codebook: Tensor, metric: str, beta: float, gradient: str, mask: Tensor | None
) -> VQOutput:
    """One head; z (..., D)."""
    indices = plain_indices(z, codebook, metric)
    e = codebook[indices]
    valid = torch.ones(z.shape[:-1], dtype=torch.bool) if mask is None else mask
    elements = max(1, int(valid.sum()) * z.shape[-1])
    keep = valid[..., None]
    codebook_loss = torch.where(keep, (e - z.detach()).square(), 0.0).sum() / elements
    commitment_loss = torch.where(keep, (z - e.detach()).square(), 0.0).sum() / elements
    if gradient == "straight_through":
        quantized = z + (e - z).detach()
    elif gradient == "rotation":
        quantized = plain_rotation(z, e)
    else:
        quantized = e.detach()
    return VQOutput(
        torch.where(keep, quantized, 0.0),
        torch.where(valid, indices, -1),
        codebook_loss + beta * commitment_loss,
        codebook_loss,
        commitment_loss,
    )


@pytest.fixture(autouse=True)
def _backend(backend: str) -> object:
    """Every test of this file runs on every backend."""
    with vqkernels.use_backend(backend):
        yield


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_match_plain_autograd(
    metric: str, gradient: str, masked: bool, dtype: torch.dtype
) -> None:
    z = torch.randn(3, 7, 5, 6, dtype=dtype)
    codebook = torch.randn(11, 6, dtype=dtype)
    mask = torch.rand(3, 7, 5) > 0.3 if masked else None
    upstream = torch.randn(3, 7, 5, 6, dtype=torch.float64)

    def run(fn: object, kind: torch.dtype) -> tuple[VQOutput, list[Tensor]]:
        a, c = z.to(kind).requires_grad_(), codebook.to(kind).requires_grad_()
        out = fn(a, c, metric=metric, beta=0.7, gradient=gradient, mask=mask)  # type: ignore[operator]
        total = 1.3 * out.loss + 0.4 * out.codebook_loss + 0.9 * out.commitment_loss
        if gradient != "none":
            total = total + (out.quantized * upstream.to(kind)).sum()
        return out, list(torch.autograd.grad(total, (a, c)))

    got, got_grads = run(vector_quantize, dtype)
    want, want_grads = run(plain_quantize, torch.float64)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    assert torch.equal(got.indices, want.indices)
    assert got.quantized.dtype == dtype
    for name in ("quantized", "loss", "codebook_loss", "commitment_loss"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name).detach(), **tolerance, msg=name)
    for g, w in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(g.double(), w, **tolerance)


def test_each_output_passes_its_gradient_to_the_right_side_only() -> None:
    z, codebook = torch.randn(9, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    out = vector_quantize(z, codebook)

    def grads(y: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(y, (z, codebook), retain_graph=True, materialize_grads=True)

    dz, de = grads(out.codebook_loss)
    assert not dz.any()
    assert de.any()
    dz, de = grads(out.commitment_loss)
    assert dz.any()
    assert not de.any()
    dz, de = grads(out.quantized.sum())
    assert torch.equal(dz, torch.ones_like(z))
    assert not de.any()
    assert not out.indices.requires_grad


def test_gradient_none_returns_a_constant() -> None:
    z = torch.randn(9, 4, requires_grad=True)
    out = vector_quantize(z, torch.randn(5, 4), gradient="none")
    assert not out.quantized.requires_grad
    assert out.loss.requires_grad


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(1, 3), (2, 5, 3), (3, 2, 2, 3)])
def test_gradcheck(metric: str, shape: tuple[int, ...]) -> None:
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    indices = nearest(z, codebook, metric=metric)[0]

    # What the numbers are a derivative of: straight through, quantized is z up to a constant; the losses' detached
    # sides are constants.
    def loss_of_z(z: Tensor) -> Tensor:
        return vector_quantize(z, codebook.detach(), metric=metric, gradient="none").commitment_loss

    def loss_of_codebook(codebook: Tensor) -> Tensor:
        return vector_quantize(z.detach(), codebook, metric=metric, gradient="none").codebook_loss

    assert gradcheck(loss_of_z, (z,))
    assert gradcheck(loss_of_codebook, (codebook,))
    assert gradcheck(lambda c: lookup(c, indices), (codebook,))


def test_heads_equal_separate_codebooks() -> None:
    z, codebook = torch.randn(3, 2, 5, 4, requires_grad=True), torch.randn(3, 7, 4, requires_grad=True)
    mask = torch.rand(2, 5) > 0.4
    out = vector_quantize(z, codebook, mask=mask)
    (out.loss + out.quantized.square().sum()).backward()
    losses = []
    for h in range(3):
        a, c = z.detach()[h].requires_grad_(), codebook.detach()[h].requires_grad_()
        one = vector_quantize(a, c, mask=mask)
        losses.append(one.loss)
        (one.loss / 3 + one.quantized.square().sum()).backward()
        assert torch.equal(out.indices[h], one.indices)
        assert torch.equal(out.quantized[h], one.quantized)
        torch.testing.assert_close(z.grad[h], a.grad)
        torch.testing.assert_close(codebook.grad[h], c.grad)
    torch.testing.assert_close(out.loss, torch.stack(losses).mean())


def test_channel_first_maps_are_read_and_written_in_place() -> None:
    z = torch.randn(2, 6, 5, 7, requires_grad=True)
    codebook = torch.randn(9, 6)
    out = vector_quantize(z.movedim(1, -1), codebook)
    quantized = out.quantized.movedim(-1, 1)
    assert quantized.is_contiguous()
    assert quantized._base is not None
    assert torch.equal(quantized, codebook[out.indices].movedim(-1, 1))
    (out.loss + quantized.sum()).backward()
    assert z.grad is not None
    assert z.grad.is_contiguous()
    rows = z.detach().movedim(1, -1).contiguous().requires_grad_()
    same = vector_quantize(rows, codebook)
    (same.loss + same.quantized.sum()).backward()
    assert torch.equal(same.indices, out.indices)
    assert same.quantized.is_contiguous()
    assert torch.equal(rows.grad, z.grad.movedim(1, -1))


@pytest.mark.parametrize("n", [0, 1, 63, 257])
def test_any_number_of_rows(n: int) -> None:
    z, codebook = torch.randn(n, 3, requires_grad=True), torch.randn(100, 3, requires_grad=True)
    out = vector_quantize(z, codebook)
    want = plain_quantize(z, codebook, "l2", 0.25, "straight_through", None)
    assert torch.equal(out.indices, want.indices)
    torch.testing.assert_close(out.loss, want.loss)
    out.loss.backward()
    assert z.grad.shape == (n, 3)
    assert codebook.grad.isfinite().all()
    if n == 0:
        assert out.loss.item() == 0.0
        assert not codebook.grad.any()


def test_one_row_without_leading_dims() -> None:
    out = vector_quantize(torch.tensor([0.5, 0.0]), torch.eye(2))
    assert out.indices.shape == ()
    assert out.quantized.tolist() == [1.0, 0.0]
    # (0.5^2 + 0) / 2 dims = 0.125, times 1 + 0.25
    assert out.loss.item() == 0.15625


def test_masked_rows_give_nothing_even_if_they_are_nan() -> None:
    z = torch.randn(6, 4)
    mask = torch.tensor([True, False, True, True, False, True])
    z[~mask] = float("nan")
    z.requires_grad_()
    codebook = torch.randn(5, 4, requires_grad=True)
    out = vector_quantize(z, codebook, mask=mask, gradient="rotation")
    alone = vector_quantize(z[mask].detach(), codebook.detach())
    assert out.indices.tolist()[1] == -1
    assert torch.equal(out.indices[mask], alone.indices)
    assert not out.quantized[~mask].any()
    torch.testing.assert_close(out.loss, alone.loss)
    (out.loss + out.quantized.sum()).backward()
    assert not z.grad[~mask].any()
    assert codebook.grad.isfinite().all()
    everything_masked = vector_quantize(z.detach(), codebook, mask=torch.zeros(6, dtype=torch.bool))
    assert everything_masked.loss.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
def test_half_precision_rows_meet_a_float32_codebook(dtype: torch.dtype, metric: str) -> None:
    z = torch.randn(50, 8).to(dtype).requires_grad_()
    codebook = torch.randn(20, 8, requires_grad=True)
    out = vector_quantize(z, codebook, metric=metric)
    want = plain_quantize(z.detach().float(), codebook, metric, 0.25, "none", None)
    assert torch.equal(out.indices, want.indices)
    assert out.quantized.dtype == dtype
    assert out.loss.dtype == torch.float32
    # The codes themselves enter the loss, not what is left of them in the output's dtype.
    torch.testing.assert_close(out.loss, want.loss, rtol=2e-6, atol=0.0)
    out.loss.backward()
    assert z.grad.dtype == dtype
    assert codebook.grad.dtype == torch.float32
    torch.testing.assert_close(codebook.grad, torch.autograd.grad(want.loss, codebook)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    z, codebook = torch.randn(40, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)

    def step() -> list[Tensor]:
        out = vector_quantize(z, codebook, metric="cosine")
        return [*out, *torch.autograd.grad(out.loss, (z, codebook))]

    plain = step()
    with torch.autocast("cpu", dtype=dtype):
        cast = step()
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_second_order_gradients_raise_instead_of_being_wrong() -> None:
    z, codebook = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    out = vector_quantize(z, codebook)
    (dz,) = torch.autograd.grad(out.loss + out.quantized.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order gradients"):
        dz.sum().backward()


def test_results_may_be_written_into() -> None:
    """As a decoder does that begins with an in-place operation."""
    found = []
    for write in (False, True):
        torch.manual_seed(3)
        z, codes = torch.randn(2, 3, 7, requires_grad=True), torch.randn(4, 3, requires_grad=True)
        rows = z.movedim(1, -1)
        for values in (
            vector_quantize(rows, codes).quantized,
            lookup_rows(codes[None], rows[None, ..., 0].long(), True),
        ):
            (values.relu_() if write else values.relu()).sum().backward(retain_graph=True)
        found.append((z.grad, codes.grad))
    assert found[0][1].any()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_lookup_gathers_and_sums_its_gradient() -> None:
    codebook = torch.arange(12.0).view(4, 3).requires_grad_()
    indices = torch.tensor([[1, 1], [3, -1]])
    values = lookup(codebook, indices)
    assert values.tolist() == [[[3.0, 4.0, 5.0], [3.0, 4.0, 5.0]], [[9.0, 10.0, 11.0], [0.0, 0.0, 0.0]]]
    values.sum().backward()
    assert codebook.grad.tolist() == [[0.0] * 3, [2.0] * 3, [0.0] * 3, [1.0] * 3]
    heads = torch.randn(2, 4, 3)
    assert torch.equal(lookup(heads, torch.tensor([[0], [2]])), torch.stack([heads[0, :1], heads[1, 2:3]]))
    assert torch.equal(lookup(heads[0], torch.tensor([2], dtype=torch.int32)), heads[0, 2:3])


def test_codebook_sum_literal() -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    indices = torch.tensor([[0, 2], [2, 0]])
    mask = torch.tensor([[True, True], [True, False]])
    sums, counts = codebook_sum(x, indices, 4, mask=mask)
    assert sums.tolist() == [[1.0, 2.0], [0.0, 0.0], [8.0, 10.0], [0.0, 0.0]]
    assert counts.tolist() == [1.0, 0.0, 2.0, 0.0]
    sums, counts = codebook_sum(x, indices, 4)
    assert sums.tolist() == [[8.0, 10.0], [0.0, 0.0], [8.0, 10.0], [0.0, 0.0]]


X, C = torch.zeros(5, 3), torch.zeros(4, 3)
NESTED = torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged)
BAD = {
    "dims of the codebook": (lambda: nearest(X, X[0]), ValueError, r"codebook has shape \(3,\); expected \(K, D\)"),
    "empty codebook": (lambda: nearest(X, C[:0]), ValueError, r"codebook is empty: its shape is \(0, 3\)"),
    "D": (lambda: nearest(X[:, :2], C), ValueError, r"x has shape \(5, 2\); expected \(\.\.\., 3\)"),
    "0-d": (lambda: nearest(torch.zeros(()), C), ValueError, r"x has shape \(\)"),
    "heads": (lambda: nearest(X[None], torch.zeros(2, 4, 3)), ValueError, "1 heads.*has 2 heads"),
    "heads missing": (lambda: nearest(X[0], torch.zeros(2, 4, 3)), ValueError, r"expected \(H, \.\.\., 3\)"),
    "integer rows": (lambda: nearest(X.long(), C), TypeError, "x has dtype torch.int64; expected float32"),
    "integer codebook": (lambda: nearest(X, C.int()), TypeError, "codebook has dtype torch.int32"),
    "complex rows": (lambda: vector_quantize(X.cfloat(), C), TypeError, "z has dtype torch.complex64"),
    "sparse rows": (lambda: nearest(X.to_sparse(), C), TypeError, "x is a sparse_coo tensor; expected a dense one"),
    "nested rows": (lambda: vector_quantize(NESTED, C), TypeError, "z is a nested tensor; expected a dense one"),
    "sparse indices": (lambda: lookup(C, X.long().to_sparse()), TypeError, "indices is a sparse_coo tensor"),
    "metric array": (lambda: nearest(X, C, metric=X.numpy()), ValueError, "metric is array"),
    "no tensor": (lambda: nearest([1.0], C), TypeError, "x is a list; expected a torch.Tensor"),
    "devices": (lambda: nearest(X.to("meta"), C), ValueError, "x is on meta, codebook on cpu"),
    "metric": (lambda: nearest(X, C, metric="l1"), ValueError, "metric is 'l1'; expected one of 'l2', 'cosine', 'dot'"),
    "precision": (lambda: nearest(X, C, precision="half"), ValueError, "precision is 'half'"),
    "backend": (lambda: nearest(X, C, backend="gpu"), ValueError, "backend is 'gpu'"),
    "gradient": (lambda: vector_quantize(X, C, gradient="ste"), ValueError, "gradient is 'ste'"),
    "negative beta": (lambda: vector_quantize(X, C, beta=-0.1), ValueError, "beta is -0.1"),
    "beta nan": (lambda: vector_quantize(X, C, beta=float("nan")), ValueError, "beta is nan"),
    "beta inf": (lambda: vector_quantize(X, C, beta=float("inf")), ValueError, "beta is inf"),
    "beta text": (lambda: vector_quantize(X, C, beta="1"), TypeError, "beta is '1'"),
    "mask dtype": (lambda: vector_quantize(X, C, mask=torch.ones(5)), TypeError, "mask has dtype torch.float32"),
    "mask shape": (
        lambda: vector_quantize(X, C, mask=torch.ones(4, dtype=torch.bool)),
        ValueError,
        r"mask has shape \(4,\); expected \(5,\)",
    ),
    "float indices": (lambda: lookup(C, torch.zeros(2)), TypeError, "indices has dtype torch.float32"),
    "index too large": (lambda: lookup(C, torch.tensor([4])), (RuntimeError, ValueError, IndexError), "4"),
    "index too small": (lambda: lookup(C, torch.tensor([-2])), (RuntimeError, ValueError, IndexError), "-2"),
    "lookup heads": (lambda: lookup(C[None], torch.zeros(2, 1).long()), ValueError, "H = 1 heads"),
    "sum shape": (lambda: codebook_sum(X, torch.zeros(4).long(), 4), ValueError, r"indices has shape \(4,\)"),
    "sum codes": (lambda: codebook_sum(X, torch.zeros(5).long(), 0), ValueError, "num_codes is 0"),
    "sum codes float": (lambda: codebook_sum(X, torch.zeros(5).long(), 2.0), TypeError, "num_codes is 2.0"),
    "sum range": (lambda: codebook_sum(X, torch.full((5,), 9), 4), (RuntimeError, ValueError, IndexError), "9"),
    "explain": (lambda: vqkernels.explain("nearst", X, C), ValueError, "op is 'nearst'"),
}


OUT_OF_RANGE = {"index too large", "index too small", "sum range"}


@pytest.mark.parametrize("case", [pytest.param(c, marks=needs_cpu) if c in OUT_OF_RANGE else c for c in BAD])
def test_bad_input_is_named(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_explain_takes_the_public_arguments(backend: str) -> None:
    text = vqkernels.explain("nearest", torch.zeros(2, 3, 4), torch.zeros(5, 4), metric="dot")
    assert text.splitlines()[0] == f"nearest on cpu: {backend}"
    assert text == vqkernels.explain("nearest", x=torch.zeros(2, 3, 4), codebook=torch.zeros(5, 4), metric="dot")
    assert "lookup on cpu" in vqkernels.explain("lookup", torch.zeros(5, 4), torch.zeros(2, 3).long())
    assert "codebook_sum on cpu" in vqkernels.explain("codebook_sum", torch.zeros(2, 4), torch.zeros(2).long(), 5)


def test_loss_of_the_search_equals_a_second_pass() -> None:
    """The l2 losses come from the scores: no digits may be lost, however close the codes are."""
    codebook = torch.empty(500, 16).uniform_(-1 / 500, 1 / 500)
    z = codebook[torch.randint(500, (3000,))] + 1e-5 * torch.randn(3000, 16) + 3
    out = vector_quantize(z, codebook)
    want = F.mse_loss(codebook[out.indices].double(), z.double())
    torch.testing.assert_close(out.codebook_loss.double(), want, rtol=3e-7, atol=0.0)
