"""Options of VectorQuantizer beyond the core: projections, lengths, weights, legacy, affine, regularisers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.quantizers import close, same_state, state
from vqkernels import VectorQuantizer
from vqkernels.nn import IndexRemap, orthogonality
from vqkernels.nn.estimators import estimate, rotate_back

K, D = 16, 8


def peers() -> Any:
    return pytest.importorskip("vector_quantize_pytorch")


@pytest.mark.parametrize("heads", [1, 2])
def test_projections_are_those_of_vector_quantize_pytorch(heads: int) -> None:
    theirs = peers().VectorQuantize(
        dim=12, codebook_dim=D, codebook_size=K, heads=heads, separate_codebook_per_head=heads > 1, decay=0.8
    )
    ours = VectorQuantizer(
        K, D, heads=heads, input_dim=12, decay=0.8, gradient="rotation", commitment_cost=1.0, channel_dim=-1
    )
    ours.load_state_dict(theirs.state_dict(), strict=False)
    for _ in range(3):
        x = torch.randn(2, 31, 12)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        want, indices, loss = theirs(a)
        out = ours(b)
        assert torch.equal(out.indices, indices)
        close(out.quantized, want)
        close(out.loss, loss)
        (want.sin().sum() + loss).backward()
        (out.quantized.sin().sum() + out.loss).backward()
        close(b.grad, a.grad, atol=1e-5)
    close(ours.codebook, theirs._codebook.embed.view_as(ours.codebook))
    close(ours.eval()(x).quantized, ours.codes_to_output(ours(x).indices))


def test_projected_feature_maps_and_masks() -> None:
    vq = VectorQuantizer(K, D, input_dim=5, init="normal")
    z = torch.randn(2, 5, 6, 7)
    mask = torch.rand(2, 6, 7) > 0.4
    out = vq(z, mask)
    assert out.quantized.shape == z.shape
    assert (out.quantized.movedim(1, -1)[~mask] == 0).all()
    close(vq.codes_to_output(out.indices), out.quantized)
    weight, bias = vq.project_in.weight, vq.project_in.bias
    inside = torch.einsum("bchw,dc->bdhw", z, weight) + bias[:, None, None]
    plain = VectorQuantizer(K, D)
    plain.load_state_dict({k: v for k, v in vq.state_dict().items() if "." not in k})
    assert torch.equal(plain(inside, mask).indices, out.indices)
    assert VectorQuantizer(K, D, input_dim=5, projection_bias=False).project_in.bias is None
    with pytest.raises(ValueError, match=r"expected \(B, 5, \.\.\.\)"):
        vq(torch.randn(2, D, 3))


def test_lens_are_a_mask() -> None:
    for options, shape in (({}, (3, D, 7)), ({"channel_dim": -1}, (3, 7, D)), ({"heads": 2}, (3, 2 * D, 7))):
        a, b = (VectorQuantizer(K, D, decay=0.9, init="normal", **options) for _ in range(2))
        b.load_state_dict(a.state_dict())
        z, lens = torch.randn(shape), torch.tensor([7, 3, 0])
        mask = torch.arange(7) < lens[:, None]
        first, second = a(z, mask), b(z, lens=lens)
        assert torch.equal(first.indices, second.indices)
        assert torch.equal(first.loss, second.loss)
        assert same_state(state(a), state(b))
    with pytest.raises(ValueError, match="mask and lens"):
        a(z, mask, lens=lens)
    with pytest.raises(ValueError, match="lens has shape"):
        VectorQuantizer(K, D)(torch.randn(2, D, 3, 3), lens=torch.tensor([1, 2]))


def test_legacy_puts_beta_on_the_codebook_loss_as_taming_and_diffusers_do() -> None:
    modeling = pytest.importorskip("diffusers.models.autoencoders.vae")
    for legacy in (True, False):
        theirs = modeling.VectorQuantizer(K, D, beta=0.25, legacy=legacy)
        torch.nn.init.normal_(theirs.embedding.weight)
        ours = VectorQuantizer(K, D, commitment_cost=0.25, legacy=legacy)
        ours.load_state_dict(theirs.state_dict(), strict=False)
        a = torch.randn(2, D, 4, 5, requires_grad=True)
        b = a.detach().clone().requires_grad_()
        want, loss, (_, _, indices) = theirs(a)
        out = ours(b)
        assert torch.equal(out.indices.flatten(), indices)
        close(out.loss, loss)
        close(out.quantized, want)
        loss.backward()
        out.loss.backward()
        close(b.grad, a.grad)
        close(ours.codebook.grad, theirs.embedding.weight.grad)
        close(out.codebook_loss, out.commitment_loss)


def test_row_weights_scale_what_a_row_contributes() -> None:
    plain, weighted, doubled = (VectorQuantizer(K, D, decay=0.9, init="normal") for _ in range(3))
    for other in (weighted, doubled):
        other.load_state_dict(plain.state_dict())
    z = torch.randn(20, D)
    out = plain(z)
    weighted(z, weights=torch.full((20,), 2.0))
    doubled(torch.cat([z, z]))
    close(weighted.cluster_size, doubled.cluster_size)
    close(weighted.embed_avg, doubled.embed_avg)
    close(weighted.codebook, doubled.codebook)
    assert torch.equal(weighted.code_counts, plain.code_counts)
    first = VectorQuantizer(K, D, decay=0.9)
    second = VectorQuantizer(K, D, decay=0.9)
    second.load_state_dict(first.state_dict())
    keep = torch.arange(20) < 11
    first(z, weights=keep.float())
    second(z[keep])
    close(first.codebook, second.codebook)
    assert out.loss > 0


def test_bad_weights_are_named_before_anything_changes() -> None:
    vq = VectorQuantizer(K, D, decay=0.9, init="kmeans", affine=True)
    before, z = state(vq), torch.randn(20, D)
    for options, message in (
        ({"weights": torch.ones(19)}, r"weights has shape \(19,\); expected \(20,\)"),
        ({"weights": torch.ones(20, device="meta")}, "weights is on meta, z on cpu"),
        ({"code_weights": torch.ones(K + 1)}, r"code_weights has shape \(17,\); expected \(16,\) or \(1, 16\)"),
        ({"code_weights": torch.ones(K, device="meta")}, "code_weights is on meta, the codebook on cpu"),
        ({"code_weights": [1.0] * K}, "code_weights is a list"),
        ({"lens": torch.ones(20)}, "lens has dtype torch.float32"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            vq(z, **options)
        assert same_state(state(vq), before)
        assert vq(z).indices.shape == (20,)  # still trains
        vq.load_state_dict(before)


def test_weights_pool_over_micro_batches_and_weights_of_codes_do_not() -> None:
    pooled, joined = (VectorQuantizer(K, D, decay=0.9, init="normal") for _ in range(2))
    joined.load_state_dict(pooled.state_dict())
    z, weights = torch.randn(20, D), torch.rand(20)
    weights[:12] = 1.0
    with pooled.accumulating():
        pooled(z[:12])
        pooled(z[12:], weights=weights[12:])
    joined(z, weights=weights)
    close(pooled.cluster_size, joined.cluster_size)
    close(pooled.codebook, joined.codebook)
    before = state(pooled)
    with pytest.raises(ValueError, match=r"code_weights is given inside accumulating\(\)"), pooled.accumulating():
        pooled(z, code_weights=torch.ones(K))
    assert same_state(state(pooled), before)


def test_a_batch_in_training_may_change_codes_that_a_regulariser_saw() -> None:
    vq = VectorQuantizer(64, D, dead_code_ratio=0.9, usage_decay=0.5, orthogonal_weight=0.1)
    codes = vq.codebook.detach().clone()
    first, second = vq(torch.randn(5, D)), vq(torch.randn(5, D))
    assert not torch.equal(vq.codebook, codes)
    close(first.loss - first.codebook_loss - 0.25 * first.commitment_loss, 0.1 * orthogonality(codes))
    (first.loss + second.loss).backward()
    assert vq.codebook.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_projection_of_float64_rows_runs_under_autocast(dtype: torch.dtype) -> None:
    vq = VectorQuantizer(K, D, input_dim=5).to(dtype)
    z = torch.randn(6, 5, dtype=torch.float64)
    expected = vq(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vq(z)
        vq(z.float())
    close(out.quantized, expected.quantized, *((0.05, 0.01) if dtype == torch.float32 else (0.0, 0.0)))


@pytest.mark.parametrize(
    "options",
    [
        {"input_dim": 8},
        {"normalize": True},
        {"metric": "cosine", "heads": 2, "embedding_dim": 4},
        {"gradient": "softmax"},
    ],
    ids=["projection", "unit", "cosine heads", "softmax"],
)
def test_nan_under_a_mask_reaches_no_gradient(options: dict[str, Any]) -> None:
    vq = VectorQuantizer(**({"num_embeddings": K, "embedding_dim": D, "init": "normal"} | options))
    mask = torch.rand(2, 6) > 0.4
    z = torch.randn(2, D, 6)
    found = []
    for filling in (0.0, float("nan")):
        a = torch.where(mask.unsqueeze(1), z, filling).requires_grad_()
        out = vq(a, mask)
        found.append(torch.autograd.grad((out.loss + out.quantized.square().sum()), [a, *vq.parameters()]))
    assert found[0][0].any()
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)


def test_code_weights_scale_the_step_of_a_code() -> None:
    options: dict[str, Any] = {"dim": D, "codebook_size": K, "decay": 0.8, "rotation_trick": False}
    theirs = peers().VectorQuantize(**options)
    ours = VectorQuantizer(K, D, decay=0.8, channel_dim=-1)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    w = torch.rand(K)
    x = torch.randn(2, 30, D)
    theirs(x, ema_update_weight=w)
    ours(x, code_weights=w)
    close(ours.cluster_size, theirs._codebook.cluster_size[0])
    close(ours.embed_avg, theirs._codebook.embed_avg[0])
    close(ours.codebook, theirs._codebook.embed[0])


@pytest.mark.parametrize("learnable", [False, True])
def test_affine_codes_are_those_of_vector_quantize_pytorch(learnable: bool) -> None:
    theirs = peers().VectorQuantize(
        dim=D, codebook_size=K, decay=0.8, affine_param=True, rotation_trick=False, ema_update=not learnable,
        learnable_codebook=learnable, commitment_weight=1.0,
    )  # fmt: skip
    ours = VectorQuantizer(K, D, decay=None if learnable else 0.8, affine=True, commitment_cost=1.0, channel_dim=-1)
    ours.load_state_dict(
        {k: v for k, v in theirs.state_dict().items() if "mean" not in k and "var" not in k}, strict=False
    )
    for _ in range(3):
        x = 3 * torch.randn(2, 40, D) + 1
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        want, indices, loss = theirs(a)
        out = ours(b)
        assert torch.equal(out.indices, indices)
        close(out.quantized, want, rtol=1e-4, atol=1e-5)
        close(out.commitment_loss, loss, rtol=1e-4)
    close(ours.affine.batch_mean, theirs._codebook.batch_mean, rtol=1e-4, atol=1e-5)
    close(ours.affine.codebook_variance, theirs._codebook.codebook_variance, rtol=1e-4)
    if learnable:
        (got,) = torch.autograd.grad(out.codebook_loss, ours.codebook)
        (wanted,) = torch.autograd.grad(loss, theirs._codebook.embed)
        close(got, wanted[0], rtol=1e-3, atol=1e-5)
    else:
        close(ours.embed_avg, theirs._codebook.embed_avg[0], rtol=1e-4, atol=1e-4)
    before = state(ours)
    evaluated = ours.eval()(x)
    assert same_state(state(ours), before)
    close(ours.codes_to_output(evaluated.indices), evaluated.quantized)


def test_affine_codes_follow_rows_far_from_zero() -> None:
    vq = VectorQuantizer(K, D, decay=0.9, affine=True, channel_dim=-1)
    z = torch.randn(4096, D) + 1000
    vq(z)
    assert vq.affine is not None
    close(vq.affine.batch_variance[0, 0], z.double().var(0, unbiased=False).float(), rtol=1e-3)


@pytest.mark.parametrize("heads", [1, 2])
def test_orthogonality_is_the_mean_squared_cosine(heads: int) -> None:
    codes = torch.randn(heads, 70, D, dtype=torch.float64, requires_grad=True)
    unit = F.normalize(codes, dim=-1)
    want = (unit @ unit.transpose(1, 2)).square().sum() / (heads * 70**2) - 1 / 70
    close(orthogonality(codes), want, rtol=1e-10, atol=0)
    assert torch.autograd.gradcheck(orthogonality, (codes[:, :9].detach().requires_grad_(),))
    vq = VectorQuantizer(K, D, heads=heads, orthogonal_weight=10.0, init="normal")
    out = vq(torch.randn(5, heads * D))
    close(out.loss - out.codebook_loss - 0.25 * out.commitment_loss, 10 * orthogonality(vq.codebook), atol=1e-5)


def test_estimators_return_the_values_exactly_with_their_gradient() -> None:
    z, e, g = (torch.randn(4, 5, 3, dtype=torch.float64) for _ in range(3))
    z.requires_grad_()
    for gradient, dim in (("straight_through", -1), ("rotation", -1), ("rotation", 1)):
        out = estimate(z, e, gradient, dim)
        assert torch.equal(out, e)
        (got,) = torch.autograd.grad(out, z, g)
        close(got, g if gradient == "straight_through" else rotate_back(g, z.detach(), e, dim))
    assert not estimate(z, e, "none").requires_grad
    # A rotation and a scaling, taken apart column by column: R^T R = lambda^2, and it takes z to e.
    v, w = torch.randn(2, 6, dtype=torch.float64)
    transposed = torch.stack([rotate_back(row, v, w) for row in torch.eye(6, dtype=torch.float64)], dim=1)
    close(transposed.T @ v, w, rtol=1e-10, atol=1e-10)
    close(transposed.T @ transposed, torch.eye(6, dtype=torch.float64) * (w.norm() / v.norm()) ** 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 0.9, "legacy": True}, "legacy is True and decay 0.9"),
        ({"decay": 0.9, "orthogonal_weight": 1.0}, "orthogonal_weight is 1.0 and decay 0.9"),
        ({"affine": True, "metric": "cosine"}, "affine is True with metric 'cosine'"),
        ({"input_dim": 0}, "input_dim is 0"),
        ({"sample_temperature": -1.0}, "sample_temperature is -1.0"),
        ({"softmax_temperature": 0.0}, "softmax_temperature is 0.0; expected a positive number"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        VectorQuantizer(K, D, **options)
    assert message in str(error.value)


def test_remapped_indices_are_those_of_taming() -> None:
    used = torch.randperm(50)[:20]
    indices = torch.randint(50, (30, 7))
    # taming's remap_to_used, re-stated: positions by comparison with every code in use.
    match = indices[..., None] == used
    for unknown, other in (("extra", 20), (4, 4)):
        remap = IndexRemap(used, 50, unknown=unknown)
        got = remap(indices)
        assert torch.equal(got, torch.where(match.any(-1), match.int().argmax(-1), other))
        assert torch.equal(remap.inverse(got)[match.any(-1)], indices[match.any(-1)])
        assert remap.size == 20 + (unknown == "extra")
    drawn = IndexRemap(used, 50)(indices)
    assert torch.equal(drawn[match.any(-1)], match.int().argmax(-1)[match.any(-1)])
    assert drawn[~match.any(-1)].unique().numel() > 10
    assert drawn.max() < 20
    for bad, options in (([1, 1], {}), ([-1, 2], {}), ([1, 9], {"num_embeddings": 9}), ([1, 2], {"unknown": 2})):
        with pytest.raises(ValueError):
            IndexRemap(torch.tensor(bad), **options)
