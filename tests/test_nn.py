"""VectorQuantizer: layouts, losses, learning by gradient and by averages, autocast, checkpointing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quantizers import OPTIONS, D, K, batch, same_state, state
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import vqkernels
from vqkernels import VectorQuantizer


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("places", [(5,), (2, 7), (2, 3, 5), (2, 3, 2, 2)])
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_shapes_layouts_and_round_trip(options: dict[str, Any], places: tuple[int, ...], channel_dim: int) -> None:
    vq = VectorQuantizer(K, D, channel_dim=channel_dim, **options)
    z = batch(vq, *places, requires_grad=True)
    out = vq(z)
    (out.loss + out.quantized.square().sum()).backward()
    assert out.quantized.shape == z.shape
    assert out.indices.shape == (*places, vq.heads) if vq.heads > 1 else places
    assert z.grad.isfinite().all()
    vq.eval()
    out = vq(z)
    torch.testing.assert_close(vq.codes_to_output(out.indices), out.quantized, rtol=0.0, atol=1e-7)
    assert out.quantized.is_contiguous()
    # A row of indices says which code each place got.
    codes = F.normalize(vq.codebook, dim=-1) if vq.normalize else vq.codebook
    codes = codes.view(vq.heads, K, D)
    rows = out.quantized.movedim(channel_dim, -1).unflatten(-1, (vq.heads, D))
    indices = out.indices.view(*places, vq.heads)
    for h in range(vq.heads):
        torch.testing.assert_close(rows[..., h, :], codes[h][indices[..., h]], rtol=0.0, atol=1e-7)


def test_channels_last_memory_stays_channels_last() -> None:
    vq = VectorQuantizer(K, D)
    z = torch.randn(2, D, 3, 5).to(memory_format=torch.channels_last)
    assert vq(z).quantized.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_eval_and_frozen_modules_never_change(options: dict[str, Any]) -> None:
    vq = VectorQuantizer(K, D, **options)
    vq(batch(vq, 20))
    before = state(vq)
    vq.eval()
    vq(batch(vq, 20))
    vq.train()
    vq.freeze()
    out = vq(batch(vq, 20, requires_grad=True))
    out.loss.backward()
    assert same_state(before, state(vq))
    assert vq.codebook.grad is None
    vq.unfreeze()
    out = vq(batch(vq, 20, requires_grad=True))
    assert not same_state(before, state(vq))
    assert vq.codebook.requires_grad == (vq.decay is None)


def test_the_loss_holds_the_codebook_term_only_if_it_trains_the_codebook() -> None:
    z = torch.randn(30, D)
    by_gradient = VectorQuantizer(K, D, commitment_cost=0.5)
    by_average = VectorQuantizer(K, D, commitment_cost=0.5, decay=0.99)
    a, b = by_gradient(z), by_average(z)
    torch.testing.assert_close(a.loss, a.codebook_loss + 0.5 * a.commitment_loss)
    torch.testing.assert_close(b.loss, 0.5 * b.commitment_loss)
    mean = (z - by_gradient.codebook[a.indices]).square().mean()
    torch.testing.assert_close(a.commitment_loss, mean.detach())
    assert dict(by_average.named_parameters()) == {}


def test_ema_step_follows_the_formula() -> None:
    vq = VectorQuantizer(K, D, decay=0.9)
    z = torch.randn(50, D)
    before = {k: v.double() for k, v in state(vq).items()}
    out = vq(z)
    one_hot = F.one_hot(out.indices, K).double()
    size = 0.9 * before["cluster_size"] + 0.1 * one_hot.sum(0)
    average = 0.9 * before["embed_avg"] + 0.1 * one_hot.T @ z.double()
    smoothed = (size + 1e-5) / (size.sum() + K * 1e-5) * size.sum()
    torch.testing.assert_close(vq.cluster_size.double(), size, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(vq.embed_avg.double(), average, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vq.codebook.double(), average / smoothed[:, None], rtol=1e-5, atol=1e-6)
    # The output used the codes of before the update.
    assert torch.equal(out.quantized, before["codebook"].float()[out.indices])


@pytest.mark.parametrize("cosine", [False, True])
def test_ema_training_matches_vector_quantize_pytorch(cosine: bool) -> None:
    peer_module = pytest.importorskip("vector_quantize_pytorch")
    peer = peer_module.VectorQuantize(
        dim=D, codebook_size=K, decay=0.8, use_cosine_sim=cosine, commitment_weight=0.7, rotation_trick=False
    )
    vq = VectorQuantizer(K, D, decay=0.8, metric="cosine" if cosine else "l2", commitment_cost=0.7, channel_dim=-1)
    codes = torch.randn(1, K, D)
    codes = F.normalize(codes, dim=-1) if cosine else codes
    peer._codebook.embed.data.copy_(codes)
    peer._codebook.embed_avg.data.copy_(codes)
    vq.load_state_dict(peer.state_dict())
    for _ in range(5):
        z = torch.randn(2, 40, D)
        a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
        quantized, indices, loss = peer(a)
        out = vq(b)
        assert torch.equal(out.indices, indices)
        torch.testing.assert_close(out.quantized, quantized, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-6)
        (quantized.square().sum() + loss).backward()
        (out.quantized.square().sum() + out.loss).backward()
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vq.codebook, peer._codebook.embed[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vq.cluster_size, peer._codebook.cluster_size[0], rtol=1e-5, atol=1e-5)


def test_gradient_training_matches_taming_transformers() -> None:
    """The loss of CompVis/taming-transformers VectorQuantizer2 with legacy=False, written out."""
    vq = VectorQuantizer(K, D)
    codebook = vq.codebook.detach().clone().requires_grad_()
    z = torch.randn(2, D, 4, 5)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    flat = a.movedim(1, -1)
    z_q = codebook[torch.cdist(flat.reshape(-1, D), codebook).argmin(1)].view(flat.shape)
    loss = 0.25 * (z_q.detach() - flat).square().mean() + (z_q - flat.detach()).square().mean()
    quantized = (flat + (z_q - flat).detach()).movedim(-1, 1)
    (quantized.sin().sum() + loss).backward()
    out = vq(b)
    (out.quantized.sin().sum() + out.loss).backward()
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.quantized, quantized, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vq.codebook.grad, codebook.grad, rtol=1e-5, atol=1e-6)


def test_cosine_matches_llamagen() -> None:
    """LlamaGen's VectorQuantizer with l2_norm=True, written out: both sides normalised, losses between unit vectors."""
    vq = VectorQuantizer(K, D, metric="cosine")
    codebook = vq.codebook.detach().clone().requires_grad_()
    z = torch.randn(2, D, 4, 5)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    unit, codes = F.normalize(a.movedim(1, -1), dim=-1), F.normalize(codebook, dim=-1)
    z_q = codes[(unit @ codes.T).argmax(-1)]
    loss = 0.25 * (z_q.detach() - unit).square().mean() + (z_q - unit.detach()).square().mean()
    quantized = (unit + (z_q - unit).detach()).movedim(-1, 1)
    (quantized.sin().sum() + loss).backward()
    out = vq(b)
    (out.quantized.sin().sum() + out.loss).backward()
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.quantized, quantized, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vq.codebook.grad, codebook.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [OPTIONS["gradient"], OPTIONS["ema dead"], OPTIONS["cosine"]], ids=str)
def test_twenty_steps_give_the_same_bits_on_one_and_two_threads(options: dict[str, Any], backend: str) -> None:
    def train(threads: int) -> dict[str, Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(3)
            vq = VectorQuantizer(63, D, **options)
            encoder = torch.randn(12, D, requires_grad=True)
            optimizer = torch.optim.Adam([encoder, *vq.parameters()], lr=0.01)
            for _ in range(20):
                # A product whose sums have one order, so that only the quantizer could differ.
                z = (torch.randn(257, 12, 1) * encoder).unbind(1)
                out = vq(sum(z[1:], z[0]))
                optimizer.zero_grad()
                (out.loss + out.quantized.square().mean()).backward()
                encoder.grad = encoder.grad.clone().sign()  # sums of torch's own may depend on the threads
                optimizer.step()
            return state(vq)
        finally:
            torch.set_num_threads(before)

    with vqkernels.use_backend(backend):
        first, again, threaded = train(1), train(1), train(2)
    assert same_state(first, again)
    assert same_state(first, threaded)


@pytest.mark.parametrize("options", [OPTIONS["ema"], OPTIONS["heads ema dead"]], ids=str)
def test_accumulating_equals_the_joined_batch(options: dict[str, Any]) -> None:
    joined = VectorQuantizer(K, D, **(options | {"dead_code_ratio": 0.0}))
    parts = copy.deepcopy(joined)
    z = batch(joined, 12)
    for _ in range(3):
        joined(z)
        with parts.accumulating():
            before = parts.codebook.clone()
            for part in z.split(5):
                parts(part)
            assert torch.equal(parts.codebook, before)
    torch.testing.assert_close(parts.codebook, joined.codebook, rtol=1e-5, atol=1e-6)
    assert torch.equal(parts.code_counts, joined.code_counts)
    assert parts.steps.item() == 3


def test_accumulating_drops_what_an_exception_interrupts() -> None:
    vq = VectorQuantizer(K, D, decay=0.9)
    before = state(vq)

    def interrupted() -> None:
        with vq.accumulating():
            vq(batch(vq, 9))
            raise KeyError("interrupted")

    with pytest.raises(KeyError):
        interrupted()
    assert same_state(before, state(vq))
    with vq.accumulating(), pytest.raises(RuntimeError, match="cannot be nested"), vq.accumulating():
        pass


def test_rows_that_are_not_finite_never_enter_a_statistic() -> None:
    z = torch.randn(40, D)
    bad = z.clone()
    bad[3] = float("nan")
    bad[11, 0] = float("inf")
    keep = torch.ones(40, dtype=torch.bool)
    keep[[3, 11]] = False
    for options in (OPTIONS["ema dead"], OPTIONS["cosine ema"], OPTIONS["gradient dead"]):
        poisoned = VectorQuantizer(K, D, **options)
        masked = copy.deepcopy(poisoned)
        poisoned(bad)
        masked(z, mask=keep)
        assert same_state(state(poisoned), state(masked))


def test_masked_positions_count_nowhere() -> None:
    vq = VectorQuantizer(K, D, decay=0.9)
    alone = copy.deepcopy(vq)
    z = torch.randn(2, D, 6, requires_grad=True)
    mask = torch.rand(2, 6) > 0.5
    out = vq(z, mask=mask)
    single = alone(z.detach().movedim(1, -1)[mask])
    assert same_state(state(vq), state(alone))
    assert torch.equal(out.indices[mask], single.indices)
    assert (out.indices[~mask] == -1).all()
    torch.testing.assert_close(out.loss, single.loss)
    assert not out.quantized.movedim(1, -1)[~mask].any()
    assert not vq.codes_to_output(out.indices).movedim(1, -1)[~mask].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [OPTIONS["gradient"], OPTIONS["cosine ema"]], ids=str)
def test_half_precision_models_keep_a_float32_codebook(dtype: torch.dtype, options: dict[str, Any]) -> None:
    vq = VectorQuantizer(K, D, **options)
    before = state(vq)
    vq.to(dtype)
    assert same_state(before, state(vq))
    twin = copy.deepcopy(vq)
    z = torch.randn(30, D).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        out = vq(z)
    want = twin(z.float())
    assert out.quantized.dtype == dtype
    assert out.loss.dtype == torch.float32
    assert torch.equal(out.indices, want.indices)
    assert torch.equal(out.quantized, want.quantized.to(dtype))
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-6, atol=0.0)
    assert same_state(state(vq), state(twin))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_float64_modules_train_and_come_back(options: dict[str, Any]) -> None:
    vq = VectorQuantizer(K, D, **options).double()
    for dtype in (torch.float64, torch.float32):
        vq(batch(vq, 20, dtype=dtype))
    assert vq.half().codebook.dtype == torch.float32
    vq(batch(vq, 20, dtype=torch.float16))


@pytest.mark.parametrize("options", [{}, {"heads": 2}, {"gradient": "softmax"}, {"input_dim": 6}], ids=str)
def test_an_output_may_be_written_into(options: dict[str, Any]) -> None:
    """As a decoder does that begins with an in-place operation."""
    vq = VectorQuantizer(K, D, init="normal", **options)
    z = torch.randn(2, options.get("input_dim", D * vq.heads), 5, requires_grad=True)
    (want,) = torch.autograd.grad(vq(z).quantized.relu().sum(), z)
    (got,) = torch.autograd.grad(vq(z).quantized.relu_().sum(), z)
    assert torch.equal(got, want)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(options: dict[str, Any], reentrant: bool) -> None:
    plain = VectorQuantizer(K, D, **options)
    twin = copy.deepcopy(plain)
    for step in range(3):
        torch.manual_seed(step)
        z = batch(plain, 40)
        grads = []
        for vq, wrap in ((plain, False), (twin, True)):
            a = z.clone().requires_grad_()

            def block(x: Tensor, vq: VectorQuantizer = vq) -> tuple[Tensor, Tensor]:
                out = vq(x * 2)
                return out.quantized.sin(), out.loss

            q, loss = checkpoint(block, a, use_reentrant=reentrant) if wrap else block(a)
            vq.zero_grad()
            (q.sum() + loss).backward()
            grads.append((a.grad, vq.codebook.grad))
        assert torch.equal(grads[0][0], grads[1][0])
        if plain.decay is None:
            assert torch.equal(grads[0][1], grads[1][1])
        assert same_state(state(plain), state(twin))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_two_forwards_before_one_backward(options: dict[str, Any]) -> None:
    """As a GAN or a siamese model does: in-place codebook updates must not break a graph that still waits."""
    vq = VectorQuantizer(K, D, **options)
    a, b = batch(vq, 20, requires_grad=True), batch(vq, 20, requires_grad=True)
    first, second = vq(a), vq(b)
    expected = copy.deepcopy(vq)
    (first.loss + second.loss).backward()
    assert a.grad.any()
    assert b.grad.any()
    assert expected.steps == 2
