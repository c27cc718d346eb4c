"""Residual, grouped, split and product quantizers: indices, gradients, dropout, statistics, layouts, errors."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import vqkernels
from tests.quantizers import same_state, state
from vqkernels.nn import (
    GroupedResidualVectorQuantizer,
    ProductQuantizer,
    ResidualVectorQuantizer,
    SplitResidualVectorQuantizer,
    VectorQuantizer,
)

K, D, Q = 16, 8, 3
OPTIONS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "ema": {"decay": 0.9},
    "ema dead kmeans": {"decay": 0.9, "dead_code_ratio": 0.5, "init": "kmeans"},
    "shared": {"decay": 0.9, "shared_codebook": True},
    "shared gradient": {"shared_codebook": True},
    "rotation": {"gradient": "rotation"},
    "per level": {"estimator": "per_level"},
    "chained": {"level_dim": 4},
    "dropout batch": {"decay": 0.9, "dropout": "batch"},
    "dropout sample": {"decay": 0.9, "dropout": "sample"},
    "projection": {"input_dim": 6},
    "cosine": {"metric": "cosine", "decay": 0.9},
}


def rvq(name: str = "gradient", levels: int = Q, **more: Any) -> ResidualVectorQuantizer:
    torch.manual_seed(1)
    options = {"init": "normal"} | OPTIONS[name] | more
    return ResidualVectorQuantizer(K, D, levels, **options)


def channels(vq: ResidualVectorQuantizer) -> int:
    return vq.project_in.in_features if vq.project_in is not None else D


def close(a: Tensor, b: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", OPTIONS)
def test_indices_decode_to_the_output_in_any_layout(name: str) -> None:
    for shape in ((3, channels(rvq(name)), 5, 7), (4, channels(rvq(name)))):
        vq = rvq(name)
        z = torch.randn(shape)
        vq(z)
        out = vq.eval()(z)
        assert out.indices.shape == (shape[0], *shape[2:], Q)
        assert out.quantized.shape == z.shape
        close(vq.codes_to_output(out.indices), out.quantized)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_level_is_the_exact_nearest_code_of_the_residual(name: str) -> None:
    if name == "chained":
        pytest.skip("levels live behind projections")
    vq = rvq(name).eval()
    if vq.level(0).init == "kmeans":
        vq.initialize(torch.randn(4, channels(vq), 40))
    z = torch.randn(2, channels(vq), 31)
    out = vq(z)
    residual = z if vq.project_in is None else vq.project_in(z)
    for i in range(Q):
        codes = vq.level(i).codebook.detach()
        rows = residual.detach().movedim(1, -1)
        want, _ = vqkernels.nearest(rows, codes, metric=vq.level(i).metric)
        assert torch.equal(out.indices[..., i], want)
        residual = residual - vq.level(i).codes_to_output(want)


def test_every_level_pulls_the_input_when_residuals_are_detached() -> None:
    """encodec#25: with the straight-through output subtracted, levels beyond the first give the input no gradient."""
    for estimator, reaches in (("sum", True), ("per_level", True), ("chained", False)):
        vq = rvq("gradient", estimator=estimator)
        z = torch.randn(2, D, 9, requires_grad=True)
        out = vq(z)
        grads = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in out.commitment_loss]
        assert grads[0].abs().sum() > 0
        assert [bool(g.abs().sum() > 0) for g in grads[1:]] == [reaches] * (Q - 1)


def test_gradients_of_the_losses_are_those_of_plain_torch() -> None:
    vq = rvq("gradient").double()
    z = torch.randn(2, D, 9, dtype=torch.float64, requires_grad=True)
    out = vq(z)
    codes = [level.codebook for level in vq.layers]
    got = torch.autograd.grad(out.loss + 0.3 * out.quantized.sin().sum(), [z, *codes])
    rows, total, loss = z.movedim(1, -1), 0.0, 0.0
    residual = rows
    for i, code in enumerate(codes):
        e = code[out.indices[..., i]]
        loss = loss + 0.25 * F.mse_loss(residual, e.detach()) + F.mse_loss(e, residual.detach())
        residual, total = residual - e.detach(), total + e.detach()
    quantized = rows + (total - rows).detach()
    want = torch.autograd.grad(loss + 0.3 * quantized.sin().sum(), [z, *codes])
    for a, b in zip(got, want, strict=True):
        close(a, b, rtol=1e-10, atol=1e-12)


def test_the_rotation_turns_the_input_onto_the_sum() -> None:
    """Fifty et al. 2024, sec. 4.2: the output's gradient is the transpose of the rotation and scaling of the input."""
    vq = rvq("rotation")
    z = torch.randn(5, D, requires_grad=True)
    out = vq(z)
    jacobian = torch.stack([torch.autograd.grad(out.quantized[:, d].sum(), z, retain_graph=True)[0] for d in range(D)])
    close((jacobian * z).sum(-1).T, out.quantized, rtol=1e-4, atol=1e-5)


def test_levels_of_different_sizes() -> None:
    vq = ResidualVectorQuantizer([3, 17, 100], D, init="normal")
    out = vq(torch.randn(20, D))
    assert out.indices.amax(0).lt(torch.tensor([3, 17, 100])).all()
    assert vq.bitrate(10.0) == pytest.approx(10 * torch.tensor([3, 17, 100]).log2().sum().item())
    assert rvq("gradient").bitrate(50.0, 2) == 400.0
    assert [rvq("gradient").levels_for(b, 50.0) for b in (0, 399, 400, 1e9)] == [1, 1, 2, 3]


def test_fewer_levels_decode_what_they_encode() -> None:
    vq = rvq("gradient").eval()
    z = torch.randn(4, D, 6)
    full, some = vq(z), vq(z, num_levels=2)
    assert torch.equal(some.indices[..., :2], full.indices[..., :2])
    assert (some.indices[..., 2] == -1).all()
    close(vq.codes_to_output(full.indices[..., :2]), some.quantized)
    close(vq.codes_to_output(some.indices), some.quantized)
    assert (vq.codes_to_output(torch.full((2, 5, Q), -1)) == 0).all()


@pytest.mark.parametrize("kind", ["batch", "sample"])
def test_dropped_levels_have_no_index_loss_or_statistics(kind: str) -> None:
    vq = rvq(f"dropout {kind}")
    before = [level.codebook.clone() for level in vq.layers]
    keep = torch.tensor(1) if kind == "batch" else torch.tensor([1, 3, 1, 2])
    z = torch.randn(4, D, 6)
    out = vq(z, keep=keep)
    kept = keep.expand(4)[:, None, None] > torch.arange(Q)
    assert torch.equal(out.indices >= 0, kept.expand(4, 6, Q))
    close(vq.codes_to_output(out.indices[:, :0].new_full((1, 1, Q), -1)), torch.zeros(1, D, 1))
    if kind == "batch":
        assert torch.equal(vq.level(1).codebook, before[1])
        assert out.commitment_loss[1:].tolist() == [0.0, 0.0]
    assert [int(level.code_counts.sum()) for level in vq.layers] == [6 * int(kept[..., i].sum()) for i in range(Q)]
    # By the codes of before the update: what was kept is what was output.
    total = sum(vqkernels.lookup(before[i], out.indices[..., i]).movedim(-1, 1) for i in range(Q))
    close(out.quantized, total)


def test_a_level_that_a_mask_leaves_nothing_is_unchanged_to_the_bit() -> None:
    for options in OPTIONS["ema"], {"dead_code_ratio": 0.5}, OPTIONS["ema dead kmeans"]:
        vq = VectorQuantizer(K, D, **options)
        vq.initialize(torch.randn(40, D))
        vq(torch.randn(20, D))
        before = state(vq)
        out = vq(torch.randn(20, D), torch.zeros(20, dtype=torch.bool))
        assert same_state(state(vq), before)
        assert out.loss == 0
        assert (out.indices == -1).all()


def test_dropout_is_uniform_reproducible_and_off_in_eval() -> None:
    vq = rvq("dropout batch")
    z = torch.randn(2, D, 3)
    kept = [int((vq(z).indices[0, 0] >= 0).sum()) for _ in range(300)]
    assert all(70 < kept.count(n) < 130 for n in (1, 2, 3))
    again = rvq("dropout batch")
    assert [int((again(z).indices[0, 0] >= 0).sum()) for _ in range(40)] == kept[:40]
    resumed = rvq("dropout batch")
    resumed.load_state_dict(vq.state_dict())
    assert int(resumed.dropout_step) == 300
    assert (vq.eval()(z).indices >= 0).all()
    assert int(vq.dropout_step) == 300
    other = rvq("dropout batch", dropout_seed=5)
    assert [int((other(z).indices[0, 0] >= 0).sum()) for _ in range(40)] != kept[:40]
    structured = rvq("dropout sample", levels=6, dropout_least=2, dropout_multiple=4, dropout_share=0.5)
    counts = (structured(torch.randn(400, D)).indices >= 0).sum(-1)
    assert set(counts.tolist()) == {4, 6}
    assert 40 < int((counts == 4).sum()) < 250


def test_a_shared_codebook_moves_once_per_step_by_the_rows_of_all_levels() -> None:
    vq = rvq("shared")
    z = torch.randn(30, D)
    start = vq.level(0).codebook.clone()
    out = vq(z)
    assert int(vq.level(0).steps) == 1
    assert list(vq.state_dict()) == [f"layers.0.{k}" for k in VectorQuantizer(K, D, decay=0.9).state_dict()]
    residual, sums, counts = z, 0.0, 0.0
    for i in range(Q):
        found = vqkernels.codebook_sum(residual, out.indices[:, i], K)
        sums, counts = sums + found[0], counts + found[1]
        residual = residual - start[out.indices[:, i]]
    close(vq.level(0).embed_avg, 0.9 * start + 0.1 * sums)
    close(vq.level(0).cluster_size, 0.9 + 0.1 * counts)


def test_kmeans_starts_level_by_level() -> None:
    z = torch.randn(200, D)
    first, second = rvq("ema dead kmeans", levels=2), rvq("ema dead kmeans", levels=2)
    first.initialize(z)
    assert first.training
    residual = z - first.eval()(z, num_levels=1).quantized
    alone = VectorQuantizer(K, D, decay=0.9, init="kmeans")
    alone.initialize(residual)
    assert torch.equal(first.level(1).codebook, alone.codebook)
    second(z)
    assert all(bool(level.initialized) for level in second.layers)


def test_lens_are_a_mask() -> None:
    for vq in (rvq("ema"), rvq("projection"), SplitResidualVectorQuantizer(K, D, 3, init="normal")):
        vq.eval()
        z, lens = (
            torch.randn(3, 6 if getattr(vq, "project_in", None) else D, 5),
            torch.tensor([5, 0, 2]),
        )
        mask = torch.arange(5) < lens[:, None]
        a, b = vq(z, mask), vq(z, lens=lens)
        assert torch.equal(a.indices, b.indices)
        assert torch.equal((a.indices >= 0).all(-1), mask)
        assert (a.quantized.movedim(1, -1)[~mask] == 0).all()
        close(vq.codes_to_output(a.indices), a.quantized)


@pytest.mark.parametrize("name", OPTIONS)
def test_eval_and_freeze_change_nothing(name: str) -> None:
    vq = rvq(name)
    z = torch.randn(6, channels(vq), 4)
    vq(z)
    before = state(vq)
    vq.eval()(z)
    assert same_state(state(vq), before)
    vq.train().freeze()
    vq(z)
    after = state(vq)
    assert same_state({k: v for k, v in after.items() if k != "dropout_step"},
                      {k: v for k, v in before.items() if k != "dropout_step"})  # fmt: skip
    vq.unfreeze()


@pytest.mark.parametrize("name", OPTIONS)
def test_no_rows_and_one_code(name: str) -> None:
    vq = rvq(name)
    vq(torch.randn(8, channels(vq)))
    out = vq(torch.randn(0, channels(vq), 5))
    assert out.quantized.shape == (0, channels(vq), 5)
    assert out.indices.shape == (0, 5, Q)
    assert out.loss == 0
    single = ResidualVectorQuantizer(1, D, 2, init="normal")
    out = single(torch.randn(3, D))
    assert (out.indices == 0).all()
    close(out.quantized, single.codes_to_output(out.indices))


@pytest.mark.parametrize("name", ["gradient", "ema", "rotation", "projection", "chained"])
def test_bf16_autocast_and_half_inputs(name: str) -> None:
    vq = rvq(name).eval()
    z = torch.randn(2, channels(vq), 9)
    want = vq(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vq(z)
    if vq.project_in is None and name != "chained":
        assert torch.equal(out.indices, want.indices)
        assert torch.equal(vq(z.bfloat16()).indices, vq(z.bfloat16().float()).indices)
    assert out.quantized.dtype == torch.float32
    half = vq(z.bfloat16().requires_grad_())
    assert half.quantized.dtype == torch.bfloat16
    assert half.loss.dtype == torch.float32
    half.quantized.float().sum().backward()


@pytest.mark.parametrize("name", OPTIONS)
def test_nan_under_a_mask_reaches_no_gradient(name: str) -> None:
    found = []
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    for filling in (0.0, float("nan")):
        vq = rvq(name)
        z = torch.where(mask.unsqueeze(1), torch.randn(2, channels(vq), 9), filling).requires_grad_()
        out = vq(z, mask)
        wanted = [z, *(p for p in vq.parameters() if p.requires_grad)]
        found.append(torch.autograd.grad(out.loss + out.quantized.square().sum(), wanted))
    assert found[0][0].any()
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)


def test_a_split_quantizer_rounds_its_sum_once() -> None:
    vq = SplitResidualVectorQuantizer(K, D, Q, init="normal").eval()
    for dtype in (torch.bfloat16, torch.float16):
        out = vq(torch.randn(2, D, 30, dtype=dtype))
        assert torch.equal(out.quantized, vq.codes_to_output(out.indices).to(dtype))


def test_vectors_without_a_batch() -> None:
    options: dict[str, Any] = {"channel_dim": -1, "init": "normal"}
    for vq, size in (
        (ResidualVectorQuantizer(K, D, Q, dropout="sample", **options), D),
        (SplitResidualVectorQuantizer(K, D, Q, dropout="sample", **options), D),
        (GroupedResidualVectorQuantizer(K, D, Q, groups=2, dropout="sample", **options), 2 * D),
    ):
        z = torch.randn(size)
        for _ in range(3):
            vq(z)
        out = vq.eval()(z)
        assert out.indices.shape == ((2, Q) if size > D else (Q,))
        close(vq.codes_to_output(out.indices), out.quantized)


@pytest.mark.parametrize("wrong", [{"mask": torch.ones(3, dtype=torch.bool)}, {"mask": True}, {"keep": torch.ones(3)}])
def test_wrong_arguments_change_nothing(wrong: dict[str, Any]) -> None:
    options: dict[str, Any] = {"decay": 0.9, "dropout": "sample"}
    for vq in (
        ResidualVectorQuantizer(K, D, Q, **options),
        SplitResidualVectorQuantizer(K, D, Q, **options),
        GroupedResidualVectorQuantizer(K, D // 2, Q, groups=2, **options),
    ):
        before = state(vq)
        with pytest.raises((ValueError, TypeError), match=f"{next(iter(wrong))} has"):
            vq(torch.randn(4, D), **wrong)
        assert same_state(state(vq), before)


@pytest.mark.parametrize("estimator", ["sum", "per_level"])
def test_a_shared_codebook_moves_after_a_regulariser_saw_it(estimator: str) -> None:
    vq = rvq(shared_codebook=True, dead_code_ratio=0.9, usage_decay=0.5, orthogonal_weight=0.1, estimator=estimator)
    vq(torch.randn(2, D)).loss.backward()
    assert vq.level(0).codebook.grad.any()


def test_accumulating_is_one_update_on_the_joined_batch() -> None:
    for name in ("ema", "shared"):
        joined, pooled = rvq(name), rvq(name)
        z = torch.randn(8, D, 5)
        joined(z)
        with pooled.accumulating():
            for part in z.split(3):
                pooled(part)
        for a, b in zip(pooled.state_dict().values(), joined.state_dict().values(), strict=True):
            close(a, b)


@pytest.mark.parametrize("name", ["ema dead kmeans", "shared", "dropout sample"])
def test_any_number_of_threads_gives_the_same_bits(name: str) -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            vq = rvq(name)
            torch.manual_seed(5)
            for _ in range(3):
                out = vq(torch.randn(4, D, 500))
            found.append(state(vq) | {"indices": out.indices, "quantized": out.quantized.detach()})
    finally:
        torch.set_num_threads(threads)
    assert same_state(*found)


def test_copies_and_pickles() -> None:
    vq = rvq("dropout batch")
    vq(torch.randn(3, D))
    for twin in (copy.deepcopy(vq), pickle.loads(pickle.dumps(vq))):
        assert same_state(state(twin), state(vq))
        z = torch.randn(3, D)
        assert torch.equal(twin.eval()(z).indices, vq.eval()(z).indices)


def test_checkpointed_blocks_recompute_the_same_levels() -> None:
    from torch.utils.checkpoint import checkpoint

    for name in ("dropout batch", "dropout sample", "shared", "ema"):
        plain, again = rvq(name), rvq(name)
        grads = []
        for vq, run in ((plain, None), (again, checkpoint)):
            torch.manual_seed(3)
            z = torch.randn(4, D, 6, requires_grad=True)
            for _ in range(2):
                out = vq(z) if run is None else run(vq, z, use_reentrant=False)
                (out.loss + out.quantized.sum()).backward()
            grads.append(z.grad)
        close(grads[0], grads[1])
        assert same_state(state(plain), state(again))


def test_groups_and_products_split_the_channels() -> None:
    vq = GroupedResidualVectorQuantizer(K, D, Q, groups=2, init="normal")
    z = torch.randn(3, 2 * D, 5)
    out = vq.eval()(z)
    assert out.indices.shape == (3, 5, 2, Q)
    for g in range(2):
        part = vq.group(g)(z[:, g * D : (g + 1) * D])
        assert torch.equal(part.indices, out.indices[..., g, :])
        close(part.quantized, out.quantized[:, g * D : (g + 1) * D])
    close(vq.codes_to_output(out.indices), out.quantized)
    assert vq.bitrate(2.0) == 2 * 2 * 4 * Q
    pq = ProductQuantizer(K, 2 * D, parts=2, init="normal").eval()
    found = pq(z)
    for g in range(2):
        want, _ = vqkernels.nearest(z[:, g * D : (g + 1) * D].movedim(1, -1), pq.codebook[g])
        assert torch.equal(found.indices[..., g], want)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResidualVectorQuantizer(4, 2), "num_levels is None"),
        (lambda: ResidualVectorQuantizer([4, 5], 2, 3), "num_embeddings has 2 entries"),
        (lambda: ResidualVectorQuantizer(4, 2, 0), "num_levels is 0"),
        (lambda: ResidualVectorQuantizer(4, 2, 2, estimator="all"), "estimator is 'all'"),
        (lambda: ResidualVectorQuantizer(4, 2, 2, dropout="level"), "dropout is 'level'"),
        (lambda: ResidualVectorQuantizer(4, 2, 2, dropout_least=3), "dropout_least is 3"),
        (lambda: ResidualVectorQuantizer([4, 5], 2, shared_codebook=True), "shared_codebook is True"),
        (lambda: ResidualVectorQuantizer(4, 8, 2, level_dim=2, estimator="sum"), "level_dim"),
        (lambda: ResidualVectorQuantizer(4, 8, 2, heads=2), "heads is 2"),
        (lambda: SplitResidualVectorQuantizer(4, 8, 2, semantic_levels=2), "semantic_levels is 2"),
        (lambda: ProductQuantizer(4, 9, parts=2), "dim is 9"),
        (lambda: rvq()(torch.zeros(2, D + 1)), "z has shape (2, 9)"),
        (lambda: rvq("projection")(torch.zeros(2, D)), "z has shape (2, 8)"),
        (lambda: rvq()(torch.zeros(2, D), num_levels=4), "num_levels is 4"),
        (lambda: rvq()(torch.zeros(2, D), keep=torch.ones(3, dtype=torch.long)), "keep has shape (3,)"),
        (lambda: rvq()(torch.zeros(2, D, 4), lens=torch.ones(3, dtype=torch.long)), "lens has shape (3,)"),
        (lambda: rvq().codes_to_output(torch.zeros(2, 4, dtype=torch.long)), "indices has shape (2, 4)"),
        (lambda: SplitResidualVectorQuantizer(4, 8, 2).codes_to_output(torch.ones(2, 3).int()), "indices has shape"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
