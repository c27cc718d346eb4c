"""Options of VectorQuantizer beyond the core: projections, lengths, weights, legacy, affine, regularisers, sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.quantizers import same_state, state
from vqkernels import VectorQuantizer
from vqkernels.nn import IndexRemap, orthogonality
from vqkernels.nn.estimators import estimate, rotate_back

K, D = 16, 8


def close(a: Tensor, b: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


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
    with pytest.raises(ValueError, match="weights has shape"):
        plain(z, weights=torch.ones(19))
    assert out.loss > 0


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


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_sampled_codes_follow_the_softmax_of_the_scores(metric: str) -> None:
    vq = VectorQuantizer(5, 3, metric=metric, sample_temperature=0.8, init="normal", normalize=False)
    z = torch.randn(1, 3)
    out = vq(z.expand(20000, 3))
    codes = vq.codebook.detach()
    score = {
        "l2": -(z - codes).square().sum(-1),
        "cosine": z @ F.normalize(codes, dim=-1).T,
        "dot": z @ codes.T,
    }[metric].flatten()
    want = (score / 0.8).softmax(-1)
    got = torch.bincount(out.indices, minlength=5) / 20000
    close(got, want, rtol=0, atol=0.015)
    close(out.quantized, codes[out.indices])
    close(out.commitment_loss, F.mse_loss(z.expand(20000, 3), codes[out.indices]))
    assert (vq.eval()(z).indices == score.argmax()).all()
    bad = torch.full((4, 3), float("nan"))
    counts = vq.train().code_counts.clone()
    vq(bad)
    assert torch.equal(vq.code_counts, counts)


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
