"""What a softmax over the codes is for: entropies, sampled codes, IBQ's gradient to all codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.quantizers import close
from vqkernels import VectorQuantizer, _softmax
from vqkernels.nn import assignment_entropies
from vqkernels.nn.propagation import propagate

K, D = 16, 8


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_entropies_are_those_of_the_whole_matrix(metric: str, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_softmax, "BLOCK_ELEMENTS", 7 * 33)  # several blocks, the last one short
    x = torch.randn(heads, 40, 5, dtype=torch.float64, requires_grad=True)
    codes = torch.randn(heads, 33, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(heads, 40) > 0.2
    dot = x @ (F.normalize(codes, dim=-1) if metric == "cosine" else codes).transpose(1, 2)
    score = -torch.cdist(x, codes).square() if metric == "l2" else dot
    p = (score / 0.7).softmax(-1)
    sample = torch.stack([torch.special.entr(p[h][mask[h]]).sum(-1).mean() for h in range(heads)]).mean()
    batch = torch.stack([torch.special.entr(p[h][mask[h]].mean(0)).sum() for h in range(heads)]).mean()
    got = assignment_entropies(x, codes, metric=metric, temperature=0.7, mask=mask)
    close(got[0], sample, rtol=1e-10)
    close(got[1], batch, rtol=1e-10)
    grads = torch.autograd.grad(got[0] - 0.4 * got[1], (x, codes))
    for a, b in zip(grads, torch.autograd.grad(sample - 0.4 * batch, (x, codes)), strict=True):
        close(a, b, rtol=1e-8, atol=1e-12)

    def function(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        return assignment_entropies(x, codes, metric=metric, temperature=0.7)

    small = x[:, :6].detach().requires_grad_(), codes[:, :9].detach().requires_grad_()
    assert torch.autograd.gradcheck(function, small)


def test_entropy_loss_is_that_of_llamagen() -> None:
    """Re-stated: affinity is minus the squared distance of unit vectors over 0.01, twice the cosine plus a constant."""
    vq = VectorQuantizer(
        K, D, metric="cosine", sample_entropy_weight=0.3, batch_entropy_weight=0.3, entropy_temperature=0.005,
        init="normal", channel_dim=-1,
    )  # fmt: skip
    z = torch.randn(50, D, requires_grad=True)
    out = vq(z)
    rows, codes = F.normalize(z, dim=-1), F.normalize(vq.codebook, dim=-1)
    affinity = -(2 - 2 * rows @ codes.T) / 0.01
    p, log_p = affinity.softmax(-1), (affinity + 1e-5).log_softmax(-1)
    average = p.mean(0)
    entropy = -(p * log_p).sum(-1).mean() + (average * (average + 1e-5).log()).sum()
    terms = out.loss - out.codebook_loss - 0.25 * out.commitment_loss
    close(terms, 0.3 * entropy, rtol=1e-3, atol=1e-4)
    (got,) = torch.autograd.grad(terms, z, retain_graph=True)
    (want,) = torch.autograd.grad(0.3 * entropy, z)
    close(got, want, rtol=1e-2, atol=1e-4)
    assert vq.eval()(z).loss < out.loss + 10
    cold = VectorQuantizer(K, D, batch_entropy_weight=1.0, entropy_temperature=1e-4, init="normal")
    bad = torch.randn(20, D)
    bad[3] = float("inf")
    loss = cold(bad).loss
    loss.backward()
    assert torch.isfinite(cold.codebook.grad[cold(bad[:3]).indices]).all()
    assert vq(torch.randn(0, D)).loss == 0


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
    drawn = []
    for autocast in (False, True):  # which must not round the scores
        torch.manual_seed(2)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            drawn.append(vq.train()(z.expand(20000, 3)).indices)
    assert torch.equal(*drawn)
    bad = torch.full((4, 3), float("nan"))
    counts = vq.train().code_counts.clone()
    vq(bad)
    assert torch.equal(vq.code_counts, counts)


def softly(z: Tensor, codes: Tensor, metric: str, temperature: float) -> tuple[Tensor, Tensor]:
    """IBQ's formula, N x K: the values, and the indices."""
    score = {
        "l2": lambda: -(z.unsqueeze(-2) - codes.unsqueeze(-3)).square().sum(-1),
        "cosine": lambda: z @ F.normalize(codes, dim=-1).mT,
        "dot": lambda: z @ codes.mT,
    }[metric]()
    soft = (score / temperature).softmax(-1)
    indices = score.argmax(-1)
    hard = F.one_hot(indices, codes.shape[-2]).to(soft)
    return (hard - soft.detach() + soft) @ codes, indices


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize("block", [2**20, 3 * 7])
def test_softmax_gradient_is_that_of_ibq(metric: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_softmax, "BLOCK_ELEMENTS", block)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    codes = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    want, indices = softly(x.flatten(1, 2), codes, metric, 0.7)
    got = propagate(x, codes, indices.view(2, 3, 5), metric, 0.7)
    close(got.flatten(1, 2), want, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, (x, codes), g.view(2, 3, 5, 4)), torch.autograd.grad(want, (x, codes), g), strict=True
    ):
        close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{}, {"metric": "cosine", "normalize": False}, {"heads": 2}, {"decay": 0.9}], ids=str
)
def test_softmax_gradient_of_a_quantizer_moves_all_codes(options: dict[str, Any]) -> None:
    heads, metric = options.get("heads", 1), options.get("metric", "dot")
    options = {"metric": "dot", "gradient": "softmax", "softmax_temperature": 0.5, "init": "normal"} | options
    vq = VectorQuantizer(K, D, channel_dim=-1, **options)
    codes = vq.codebook.detach().clone().requires_grad_()
    z = torch.randn(2, 11, heads * D)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    out = vq(a)
    rows = b.unflatten(-1, (heads, D)).movedim(-2, 0).flatten(1, 2)
    want, indices = softly(rows, codes.view(heads, K, D), metric, 0.5)
    want = want.view(heads, 2, 11, D).movedim(0, -2).flatten(-2)
    assert torch.equal(out.indices.reshape(-1, heads).T, indices)
    close(out.quantized, want)
    out.quantized.sin().sum().backward()
    want.sin().sum().backward()
    close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    if "decay" not in options:
        close(vq.codebook.grad.view(codes.shape), codes.grad, rtol=1e-4, atol=1e-5)
        assert (vq.codebook.grad != 0).any(-1).all()
    with torch.no_grad():
        assert torch.equal(vq.eval()(z).indices, vq(z).indices)


@pytest.mark.parametrize("options", [{"gradient": "softmax"}, {"sample_entropy_weight": 0.1}], ids=str)
def test_backward_under_autocast_is_float32(options: dict[str, Any]) -> None:
    vq, z = VectorQuantizer(K, D, init="normal", **options), torch.randn(30, D, requires_grad=True)
    out = vq(z)
    loss = out.loss + out.quantized.square().sum()
    (want,) = torch.autograd.grad(loss, z, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (got,) = torch.autograd.grad(loss, z)
    assert torch.equal(got, want)


def test_softmax_gradient_of_rows_that_do_not_count() -> None:
    vq = VectorQuantizer(K, D, metric="dot", gradient="softmax", init="normal", channel_dim=-1)
    z = torch.randn(4, D, requires_grad=True)
    vq(z, mask=torch.tensor([True, False, True, False])).quantized.square().sum().backward()
    assert (z.grad != 0).all(-1).tolist() == [True, False, True, False]
    bad = torch.randn(4, D)
    bad[1] = float("nan")
    vq.codebook.grad = None
    vq(bad.requires_grad_()).quantized.square().sum().backward()
    assert torch.isfinite(vq.codebook.grad).all()
    assert bad.grad[1].tolist() == [0.0] * D


def test_second_order_gradients_raise() -> None:
    x, codes = torch.randn(1, 1, 3, 2, requires_grad=True), torch.randn(1, 4, 2)
    values = propagate(x, codes, torch.zeros(1, 1, 3).long(), "dot")
    for result in (values.square().sum(), assignment_entropies(x, codes)[0]):
        (once,) = torch.autograd.grad(result, x, create_graph=True)
        with pytest.raises(RuntimeError, match="second-order gradients of a quantizer are not implemented"):
            once.sum().backward()
