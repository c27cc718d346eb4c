"""Multi-scale quantization: against a re-statement of VAR's contract, and by its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vqkernels
from tests.quantizers import same_state, state
from vqkernels.nn import MultiScaleVectorQuantizer

K, C, SIZES = 40, 6, (1, 2, 3, 5, 8)


def close(a: Tensor, b: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


class VarQuantizer(nn.Module):
    """The contract of VAR's VectorQuantizer2, re-stated: what it computes, its keys, without its distributed calls."""

    def __init__(self, shared: int, znorm: bool, ratio: float = 0.5) -> None:
        super().__init__()
        self.embedding, self.znorm, self.ratio = nn.Embedding(K, C), znorm, ratio
        count = len(SIZES) if shared == 0 else shared
        convolutions = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1) for _ in range(count))
        self.quant_resi: nn.Module = nn.Module()
        if shared == 0:
            self.quant_resi = convolutions
        elif shared == 1:
            self.quant_resi.qresi = convolutions[0]
        else:
            self.quant_resi.qresi_ls = convolutions
        edge = 1 / 3 / count if count == 4 else 1 / 2 / count
        ticks = np.linspace(edge, 1 - edge, count)
        self.pick = [convolutions[int(np.argmin(np.abs(ticks - s / (len(SIZES) - 1))))] for s in range(len(SIZES))]

    def phi(self, h: Tensor, scale: int) -> Tensor:
        return h * (1 - self.ratio) + self.pick[scale](h) * self.ratio

    def up(self, index: Tensor, scale: int) -> Tensor:
        h = self.embedding(index).permute(0, 3, 1, 2)
        return self.phi(h if scale == len(SIZES) - 1 else F.interpolate(h, size=SIZES[-1], mode="bicubic"), scale)

    def forward(self, f: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        rest, f_hat, loss, found = f.detach().clone(), torch.zeros_like(f), 0.0, []
        for scale, size in enumerate(SIZES):
            z = rest if scale == len(SIZES) - 1 else F.interpolate(rest, size=(size, size), mode="area")
            rows = z.permute(0, 2, 3, 1).reshape(-1, C)
            if self.znorm:
                index = (F.normalize(rows, dim=-1) @ F.normalize(self.embedding.weight.data.T, dim=0)).argmax(1)
            else:
                distance = rows.square().sum(1, keepdim=True) + self.embedding.weight.data.square().sum(1)
                index = distance.addmm(rows, self.embedding.weight.data.T, alpha=-2).argmin(1)
            index = index.view(f.shape[0], size, size)
            h = self.up(index, scale)
            f_hat, rest = f_hat + h, rest - h.detach()
            loss = loss + 0.25 * F.mse_loss(f_hat.detach(), f) + F.mse_loss(f_hat, f.detach())
            found.append(index)
        return (f_hat.detach() - f.detach()) + f, found, loss / len(SIZES)

    def var_input(self, indices: list[Tensor]) -> Tensor:
        f_hat, parts = 0.0, []
        for scale in range(len(SIZES) - 1):
            f_hat = f_hat + self.up(indices[scale], scale)
            down = F.interpolate(f_hat, size=(SIZES[scale + 1],) * 2, mode="area")
            parts.append(down.flatten(2).transpose(1, 2))
        return torch.cat(parts, 1)


@pytest.mark.parametrize("znorm", [False, True])
@pytest.mark.parametrize("shared", [0, 1, 3, 4])
def test_trains_and_teaches_as_var_does(shared: int, znorm: bool) -> None:
    theirs = VarQuantizer(shared, znorm)
    ours = MultiScaleVectorQuantizer(K, C, SIZES, phi_shared=shared, metric="cosine" if znorm else "l2")
    ours.load_state_dict(theirs.state_dict() | {"ema_vocab_hit_SV": torch.zeros(len(SIZES), K)})
    f = torch.randn(3, C, 8, 8, requires_grad=True)
    g = f.detach().clone().requires_grad_()
    want, indices, loss = theirs(f)
    out = ours(g)
    for a, b in zip(out.indices, indices, strict=True):
        assert torch.equal(a, b)
    close(out.quantized, want)
    close(out.loss, loss)
    (want.sin().sum() + loss).backward()
    (out.quantized.sin().sum() + out.loss).backward()
    close(g.grad, f.grad)
    close(ours.codebook.grad, theirs.embedding.weight.grad)
    for a, b in zip(ours.quant_resi.parameters(), theirs.quant_resi.parameters(), strict=True):
        close(a.grad, b.grad, atol=1e-5)
    close(ours.next_scale_inputs(out.indices), theirs.var_input(indices))


def test_owners_of_convolutions_are_those_of_published_models() -> None:
    vq = MultiScaleVectorQuantizer(8, 2, [1, 2, 3, 4, 5, 6, 8, 10, 13, 16])
    ticks = np.linspace(1 / 3 / 4, 1 - 1 / 3 / 4, 4)
    assert vq.quant_resi.owners == [int(np.argmin(np.abs(ticks - s / 9))) for s in range(10)]
    assert len(vq.quant_resi.qresi_ls) == 4


@pytest.mark.parametrize("sizes", [SIZES, [(1, 2), (3, 8), (6, 8)], [5], [4, 4]], ids=str)
def test_indices_decode_to_the_output(sizes: Any) -> None:
    vq = MultiScaleVectorQuantizer(K, C, sizes, init="normal")
    f = torch.randn(2, C, *vq.sizes[-1])
    out = vq(f)
    assert [tuple(i.shape[1:]) for i in out.indices] == list(vq.sizes)
    close(vq.indices_to_f(out.indices), out.quantized)
    for a, b in zip(vq.f_to_indices(f), out.indices, strict=True):
        assert torch.equal(a, b)
    maps = vq.cumulative_f([i.flatten(1) for i in out.indices])
    assert len(maps) == len(vq.sizes)
    for scale, f_hat in enumerate(maps):
        close(out.codebook_loss[scale], F.mse_loss(f_hat, f))
    if len(vq.sizes) > 1:
        inputs = vq.next_scale_inputs(out.indices)
        assert torch.equal(inputs, vq.next_scale_inputs(out.indices[:-1]))
        last = vq.sizes[-1][0] * vq.sizes[-1][1]
        assert inputs.shape[1] == sum(h * w for h, w in vq.sizes[1:])
        close(inputs[:, -last:], maps[-2].flatten(2).transpose(1, 2))


def test_each_scale_is_the_exact_nearest_code_of_the_averaged_residual() -> None:
    vq = MultiScaleVectorQuantizer(K, C, SIZES, init="normal")
    f = torch.randn(2, C, 8, 8)
    indices, rest = vq.f_to_indices(f), f
    for scale, size in enumerate(SIZES):
        pooled = F.adaptive_avg_pool2d(rest, size).movedim(1, -1)
        assert torch.equal(indices[scale], vqkernels.nearest(pooled, vq.codebook)[0])
        rest = f - vq.indices_to_f(indices[: scale + 1]).detach()


def test_gradients_in_float64() -> None:
    vq = MultiScaleVectorQuantizer(K, 3, [1, 2, 4], init="normal").double().eval()
    f = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    indices = vq.f_to_indices(f)
    codebook = vq.codebook.detach().clone().requires_grad_()

    def decode(codes: Tensor) -> Tensor:
        return torch.func.functional_call(vq, {"codebook": codes}, (f,)).codebook_loss

    assert torch.autograd.gradcheck(decode, (codebook,), eps=1e-7, atol=1e-5)
    assert torch.equal(vq(f).indices[2], indices[2])


def test_usage_counts_each_scale_in_training_only() -> None:
    vq = MultiScaleVectorQuantizer(K, C, SIZES, init="normal")
    f = torch.randn(3, C, 8, 8)
    out = vq(f)
    assert vq.code_counts.sum(1).tolist() == [3 * s * s for s in SIZES]
    assert vq.usage() == pytest.approx([i.unique().numel() / K for i in out.indices])
    assert all(1 <= p <= K for p in vq.perplexity())
    before = state(vq)
    vq.eval()(f)
    assert same_state(state(vq), before)
    vq.reset_usage()
    assert vq.usage() == [0.0] * len(SIZES)


def test_training_brings_the_loss_down() -> None:
    vq = MultiScaleVectorQuantizer(K, C, [1, 2, 4], init="normal")
    f = torch.randn(16, C, 4, 4)
    optimizer = torch.optim.Adam(vq.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = vq(f).codebook_loss[-1]
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_half_precision_and_no_rows() -> None:
    vq = MultiScaleVectorQuantizer(K, C, SIZES, init="normal").eval()
    f = torch.randn(2, C, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vq(f)
    want = vq(f)
    assert all(torch.equal(a, b) for a, b in zip(out.indices, want.indices, strict=True))
    assert torch.equal(out.quantized, want.quantized)
    half = vq(f.bfloat16())
    assert half.quantized.dtype == torch.bfloat16
    empty = vq(torch.randn(0, C, 8, 8))
    assert empty.quantized.shape == (0, C, 8, 8)
    assert empty.loss == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiScaleVectorQuantizer(4, 2, []), "sizes is empty"),
        (lambda: MultiScaleVectorQuantizer(4, 2, [3, 2]), "sizes has (3, 3)"),
        (lambda: MultiScaleVectorQuantizer(4, 2, [2], metric="dot"), "metric is 'dot'"),
        (lambda: MultiScaleVectorQuantizer(4, 2, [2], phi_shared=-1), "phi_shared is -1"),
        (lambda: MultiScaleVectorQuantizer(4, 2, [2])(torch.zeros(1, 2, 3, 3)), "f has shape (1, 2, 3, 3)"),
        (lambda: MultiScaleVectorQuantizer(4, 2, [2]).next_scale_inputs([]), "indices has 0 scales"),
        (
            lambda: MultiScaleVectorQuantizer(4, 2, [2]).indices_to_f([torch.zeros(1, 3, dtype=torch.long)]),
            "indices[0] has shape (1, 3)",
        ),
    ],
)
def test_bad_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
