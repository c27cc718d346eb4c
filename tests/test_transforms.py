"""``torch.func`` through the public functions: grad, vjp, jvp, vmap and their mixtures, against plain torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_functional import GRADIENTS, METRICS, plain_quantize
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, grad_and_value, jacrev, jvp, vjp, vmap

import vqkernels
from vqkernels import codebook_sum, lookup, nearest, vector_quantize
from vqkernels.functional import lookup_rows

Z, CODES = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
MASK = torch.tensor([[True, False, True, True, True]] * 2 + [[False] * 5])
UPSTREAM = torch.randn(3, 5, 4, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _backend(backend: str) -> object:
    with vqkernels.use_backend(backend):
        yield


@pytest.fixture(autouse=True)
def _no_slow_path() -> object:
    """torch warns where an op has no rule for vmap and is called once per sample."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop.*")
        warnings.filterwarnings("error", message=".*autograd kernel was not registered.*")
        yield


def total(out: Any, gradient: str = "straight_through", upstream: Tensor = UPSTREAM) -> Tensor:
    value = 1.3 * out.loss + 0.4 * out.codebook_loss + 0.9 * out.commitment_loss
    return value if gradient == "none" else value + (out.quantized * upstream[: len(out.quantized)]).sum()


def objective(run: Callable[..., Any], metric: str, gradient: str, mask: Tensor | None) -> Callable[..., Tensor]:
    if run is vector_quantize:
        return lambda z, c: total(run(z, c, metric=metric, beta=0.7, gradient=gradient, mask=mask), gradient)
    return lambda z, c: total(run(z, c, metric, 0.7, gradient, mask), gradient)


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("metric", METRICS)
def test_reverse_mode_equals_plain_torch(metric: str, gradient: str, masked: bool) -> None:
    mask = MASK if masked else None
    ours, plain = (objective(f, metric, gradient, mask) for f in (vector_quantize, plain_quantize))
    close(grad(ours, (0, 1))(Z, CODES), grad(plain, (0, 1))(Z, CODES))
    close(grad_and_value(ours)(Z, CODES), grad_and_value(plain)(Z, CODES))
    (value, pull), (expected, plain_pull) = vjp(ours, Z, CODES), vjp(plain, Z, CODES)
    close(value, expected)
    close(pull(torch.tensor(2.0).double()), plain_pull(torch.tensor(2.0).double()))
    leaves = [Z.clone().requires_grad_(), CODES.clone().requires_grad_()]
    close(grad(ours, (0, 1))(Z, CODES), torch.autograd.grad(ours(*leaves), leaves))


def test_a_jacobian_has_every_row() -> None:
    def several(run: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda z, c: torch.stack([run(z, c), run(2 * z, c), run(z, c - 1)])

    ours, plain = (objective(f, "l2", "rotation", MASK) for f in (vector_quantize, plain_quantize))
    close(jacrev(several(ours), (0, 1))(Z, CODES), jacrev(several(plain), (0, 1))(Z, CODES))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_forward_mode_equals_plain_torch(gradient: str, masked: bool) -> None:
    mask = MASK if masked else None
    ours, plain = (objective(f, "l2", gradient, mask) for f in (vector_quantize, plain_quantize))
    dz, dc = torch.randn_like(Z), torch.randn_like(CODES)
    want = jvp(plain, (Z, CODES), (dz, dc))
    close(jvp(ours, (Z, CODES), (dz, dc)), want)
    for point, tangent, other in ((lambda z: ours(z, CODES), dz, Z), (lambda c: ours(Z, c), dc, CODES)):
        alone = jvp(point, (other,), (tangent,))[1]
        close(alone, torch.autograd.grad(point(leaf := other.clone().requires_grad_()), leaf)[0].mul(tangent).sum())
    with forward_ad.dual_level():
        out = ours(forward_ad.make_dual(Z, dz), forward_ad.make_dual(CODES, dc))
        close(forward_ad.unpack_dual(out).tangent, want[1])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_per_sample_are_those_of_each_sample(gradient: str, masked: bool) -> None:
    def one(z: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
        return objective(vector_quantize, "l2", gradient, mask if masked else None)(z[None], codes)

    both = grad(one, (0, 1))
    own = torch.stack([CODES, 1 - CODES, 2 * CODES])
    for codes, dim in ((CODES, None), (own, 0)):
        got = vmap(both, (0, dim, 0))(Z, codes, MASK[:, None])
        each = [both(z, codes if dim is None else codes[i], MASK[i, None]) for i, z in enumerate(Z)]
        close(got, tuple(torch.stack(parts) for parts in zip(*each, strict=True)))
    # The other way round: one gradient of what is computed per sample.
    mean = grad(lambda codes: vmap(one, (0, None, 0))(Z, codes, MASK[:, None]).sum())(CODES)
    close(mean, grad(lambda codes: torch.stack([one(Z[i], codes, MASK[i, None]) for i in range(3)]).sum())(CODES))


def test_lookup_search_and_sums_under_the_transforms() -> None:
    indices = torch.tensor([[0, 6, -1], [2, 2, 3]])
    weight = torch.randn(2, 3, 4, dtype=torch.float64)
    leaf = CODES.clone().requires_grad_()
    (want,) = torch.autograd.grad((lookup(leaf, indices) * weight).sum(), leaf)
    close(grad(lambda c: (lookup(c, indices) * weight).sum())(CODES), want)
    value, tangent = jvp(lambda c: lookup(c, indices), (CODES,), (2 * CODES,))
    close((value, tangent), (lookup(CODES, indices), 2 * lookup(CODES, indices)))
    assert torch.equal(vmap(lambda i: lookup(CODES, i))(indices), lookup(CODES, indices))
    found = vmap(lambda z: nearest(z, CODES))(Z)
    assert all(torch.equal(a, b) for a, b in zip(found, nearest(Z, CODES), strict=True))
    sums, counts = vmap(lambda z, i: codebook_sum(z, i, 7))(Z[:2, :3], indices)
    for i in range(2):
        close((sums[i], counts[i]), codebook_sum(Z[i, :3], indices[i], 7))
    residual = vmap(lambda z: vqkernels.residual_nearest(z, [CODES, CODES / 3]))(Z)
    assert torch.equal(residual.indices, vqkernels.residual_nearest(Z, [CODES, CODES / 3]).indices)
    # Neither is differentiable, and both say so by a gradient of zero, not by an error.
    assert not grad(lambda z: nearest(z, CODES)[1].sum())(Z).any()
    assert not grad(lambda z: vmap(lambda z: codebook_sum(z, indices[0], 7)[0])(z).sum())(Z[:, :3]).any()


@pytest.mark.parametrize(
    "twice",
    [
        lambda f: grad(lambda z: grad(f)(z).square().sum()),
        lambda f: lambda z: jvp(grad(f), (z,), (2 * z,))[1],
        lambda f: grad(lambda z: jvp(f, (z,), (2 * z,))[1]),
        lambda f: vmap(grad(lambda z: grad(f)(z).square().sum())),
    ],
    ids=["reverse reverse", "forward reverse", "reverse forward", "per sample"],
)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_second_order_equals_plain_torch(twice: Any, gradient: str) -> None:
    ours, plain = (objective(f, "l2", gradient, None) for f in (vector_quantize, plain_quantize))
    close(twice(lambda z: ours(z, CODES).sin())(Z), twice(lambda z: plain(z, CODES).sin())(Z))
    close(
        twice(lambda z: ours(UPSTREAM, z.reshape(-1, 4)).sin())(Z),
        twice(lambda z: plain(UPSTREAM, z.reshape(-1, 4)).sin())(Z),
    )


def test_a_step_without_transforms_takes_the_fast_form() -> None:
    out = vector_quantize(Z.clone().requires_grad_(), CODES)
    assert type(out.codebook_loss.grad_fn).__name__ == "_QuantizeBackward"
    values = lookup_rows(CODES[None].clone().requires_grad_(), torch.tensor([[[1]]]), False)
    assert type(values.grad_fn).__name__ == "_LookupBackward"


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_compiled_gradients_of_torch_func_are_not_zeros(gradient: str) -> None:
    """Dynamo (torch 2.13) inlines the forward of a Function there and differentiates that, which gives zeros."""
    f = objective(vector_quantize, "l2", gradient, MASK)
    torch._dynamo.reset()
    close(torch.compile(grad(f, (0, 1)), backend="eager", fullgraph=True)(Z, CODES), grad(f, (0, 1))(Z, CODES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_dtypes_are_those_of_a_plain_call(dtype: torch.dtype) -> None:
    codes = CODES.float()

    def run(z: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        out = vector_quantize(z, codes, mask=MASK)
        return (out.quantized, out.loss), out.indices

    for z in (Z.to(dtype), Z.to(dtype).transpose(0, 2).contiguous().transpose(0, 2)):
        want = vector_quantize(z, codes, mask=MASK)
        got, pull, indices = vjp(run, z, has_aux=True)
        assert torch.equal(indices, want.indices)
        for a, b in zip(got, (want.quantized, want.loss), strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0.0)
        assert pull(got)[0].dtype == dtype


def test_a_row_that_is_not_finite_gets_a_code_and_spoils_no_other() -> None:
    z = Z.clone()
    z[0, 0, 0], z[1, 1, 1] = torch.nan, torch.inf

    def quantized(z: Tensor) -> Tensor:
        return vector_quantize(z, CODES, gradient="rotation").quantized

    found, pull = vjp(quantized, z)
    assert torch.equal(found, quantized(z))
    kept = z.isfinite().all(-1)
    close(pull(UPSTREAM)[0][kept], vjp(quantized, Z)[1](UPSTREAM)[0][kept])


def test_a_batch_of_gradients() -> None:
    """As the Jacobian of a vectorised ``torch.autograd.functional`` asks for."""
    z, codes = Z.clone().requires_grad_(), CODES.clone().requires_grad_()
    out = vector_quantize(z, codes)
    weights = torch.tensor([1.0, -2.0]).double()
    got = torch.autograd.grad(out.codebook_loss, codes, weights, is_grads_batched=True, retain_graph=True)[0]
    close(got, weights.view(2, 1, 1) * torch.autograd.grad(out.codebook_loss, codes)[0])
