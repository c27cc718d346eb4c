"""Every option of vector-quantize-pytorch, patched against the installed library: results, gradients, buffers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import assert_same_state, assert_same_step, assert_state_loads_both_ways, pair
from torch import Tensor, nn
from vector_quantize_pytorch import (
    GroupedResidualVQ,
    HierarchicalVQ,
    RandomProjectionQuantizer,
    ResidualSimVQ,
    ResidualVQ,
    SimVQ,
)
from vector_quantize_pytorch import VectorQuantize as VQ

import vqkernels
from vqkernels import recognisers

Make = Callable[[], nn.Module]
D, K = 10, 23


def make(cls: Any, **options: Any) -> Make:
    return functools.partial(cls, **{"dim": D, "codebook_size": K, **options})


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.3)


LEARNABLE = {"ema_update": False, "learnable_codebook": True}
# name -> the module, and the shape of its input if it is not (3, 37, D)
SINGLE: dict[str, tuple[Make, tuple[int, ...]]] = {
    "default": (make(VQ), (3, 37, D)),
    "straight through": (make(VQ, rotation_trick=False), (3, 37, D)),
    "one dim": (make(VQ, dim=1), (3, 37, 1)),
    "one token": (make(VQ), (37, D)),
    "slow decay": (make(VQ, decay=0.99, eps=1e-3), (3, 37, D)),
    "cosine": (make(VQ, use_cosine_sim=True), (3, 37, D)),
    "projections": (make(VQ, codebook_dim=4), (3, 37, D)),
    "projections layernorm": (make(VQ, codebook_dim=4, layernorm_after_project_in=True), (3, 37, D)),
    "heads": (make(VQ, heads=2, codebook_dim=5), (3, 37, D)),
    "heads projected": (make(VQ, heads=3, codebook_dim=4), (3, 37, D)),
    "separate heads": (make(VQ, heads=2, codebook_dim=5, separate_codebook_per_head=True), (3, 37, D)),
    "cosine heads": (
        make(VQ, heads=2, codebook_dim=5, separate_codebook_per_head=True, use_cosine_sim=True),
        (3, 37, D),
    ),
    "one token heads": (make(VQ, heads=2, codebook_dim=5, separate_codebook_per_head=True), (37, D)),
    "channel first": (make(VQ, channel_last=False), (3, D, 37)),
    "image": (make(VQ, accept_image_fmap=True), (3, D, 5, 7)),
    "image heads": (make(VQ, accept_image_fmap=True, heads=2, codebook_dim=3), (3, D, 5, 7)),
    "video": (make(VQ, accept_3d_fmap=True), (2, D, 2, 5, 3)),
    "kmeans": (make(VQ, kmeans_init=True), (3, 37, D)),
    "kmeans cosine": (make(VQ, kmeans_init=True, use_cosine_sim=True, kmeans_iters=3), (3, 37, D)),
    "kmeans few rows": (make(VQ, kmeans_init=True), (1, 11, D)),
    "kmeans heads": (make(VQ, kmeans_init=True, heads=2, separate_codebook_per_head=True, codebook_dim=5), (3, 37, D)),
    "dead codes": (make(VQ, threshold_ema_dead_code=2), (3, 37, D)),
    "dead codes few rows": (make(VQ, threshold_ema_dead_code=2), (1, 7, D)),
    "dead codes cosine": (make(VQ, threshold_ema_dead_code=2, use_cosine_sim=True), (3, 37, D)),
    "dead codes heads": (
        make(VQ, threshold_ema_dead_code=1, heads=2, separate_codebook_per_head=True, codebook_dim=5),
        (3, 37, D),
    ),
    "no averages, dead codes": (make(VQ, ema_update=False, threshold_ema_dead_code=1), (3, 37, D)),
    "manual averages": (make(VQ, manual_ema_update=True), (3, 37, D)),
    "frozen": (make(VQ, freeze_codebook=True), (3, 37, D)),
    "learnable": (make(VQ, **LEARNABLE), (3, 37, D)),
    "learnable dead codes": (make(VQ, **LEARNABLE, threshold_ema_dead_code=1), (3, 37, D)),
    "learnable frozen": (make(VQ, **LEARNABLE, freeze_codebook=True), (3, 37, D)),
    "learnable heads": (make(VQ, **LEARNABLE, heads=2, separate_codebook_per_head=True, codebook_dim=5), (3, 37, D)),
    "optimistic": (make(VQ, **LEARNABLE, sync_update_v=0.3), (3, 37, D)),
    "affine": (make(VQ, affine_param=True), (3, 37, D)),
    "affine learnable": (make(VQ, affine_param=True, **LEARNABLE), (3, 37, D)),
    "affine dead codes": (make(VQ, affine_param=True, threshold_ema_dead_code=1), (3, 37, D)),
    "in place": (make(VQ, **LEARNABLE, in_place_codebook_optimizer=sgd), (3, 37, D)),
    "not routed": (make(VQ, route_gradients_to_input=False), (3, 37, D)),
    "learnable not routed": (make(VQ, route_gradients_to_input=False, **LEARNABLE), (3, 37, D)),
    "directional": (make(VQ, directional_reparam=True, threshold_ema_dead_code=1), (3, 37, D)),
    "commitment 0.25": (make(VQ, commitment_weight=0.25), (3, 37, D)),
    "no commitment": (make(VQ, commitment_weight=0.0), (3, 37, D)),
    "cross entropy": (make(VQ, commitment_use_cross_entropy_loss=True), (3, 37, D)),
    "cross entropy heads": (make(VQ, commitment_use_cross_entropy_loss=True, heads=2, codebook_dim=5), (3, 37, D)),
    "orthogonal": (make(VQ, orthogonal_reg_weight=0.5), (3, 37, D)),
    "orthogonal active": (
        make(VQ, orthogonal_reg_weight=0.5, orthogonal_reg_active_codes_only=True, orthogonal_reg_max_codes=9),
        (3, 37, D),
    ),
    "diversity": (make(VQ, codebook_diversity_loss_weight=0.1, codebook_diversity_temperature=2.0), (3, 37, D)),
    "stochastic": (
        make(VQ, stochastic_sample_codes=True, sample_codebook_temp=0.5, rotation_trick=False),
        (3, 37, D),
    ),
    "gumbel": (make(VQ, straight_through=True, rotation_trick=False), (3, 37, D)),
    "bridge": (lambda: VQ(dim=D, codebook_size=K, vq_bridge=nn.Linear(D, D)), (3, 37, D)),
}
COMPOSED: dict[str, tuple[Make, tuple[int, ...]]] = {
    "residual": (make(ResidualVQ, num_quantizers=3), (3, 37, D)),
    "residual shared": (make(ResidualVQ, num_quantizers=3, shared_codebook=True), (3, 37, D)),
    "residual shared dead codes": (
        make(ResidualVQ, num_quantizers=3, shared_codebook=True, threshold_ema_dead_code=1),
        (3, 37, D),
    ),
    "residual dropout": (make(ResidualVQ, num_quantizers=4, quantize_dropout=True), (3, 37, D)),
    "residual dropout by twos": (
        make(
            ResidualVQ,
            num_quantizers=4,
            quantize_dropout=True,
            quantize_dropout_cutoff_index=1,
            quantize_dropout_multiple_of=2,
        ),
        (3, 37, D),
    ),
    "residual kmeans dead codes": (
        # With rotation: a dead code becomes a row, its residual is rounding noise, and the next level divides by that.
        make(ResidualVQ, num_quantizers=3, kmeans_init=True, threshold_ema_dead_code=2, rotation_trick=False),
        (3, 37, D),
    ),
    "residual projected": (make(ResidualVQ, num_quantizers=3, codebook_dim=4), (3, 37, D)),
    "residual cosine": (make(ResidualVQ, num_quantizers=3, use_cosine_sim=True), (3, 37, D)),
    "residual sizes": (make(ResidualVQ, codebook_size=(23, 11, 5)), (3, 37, D)),
    "residual not detached": (make(ResidualVQ, num_quantizers=3, quant_grad_frac=0.3), (3, 37, D)),
    "residual diveq": (make(ResidualVQ, num_quantizers=3, diveq=True), (3, 37, D)),
    "residual beam": (make(ResidualVQ, num_quantizers=3, beam_size=3), (3, 37, D)),
    "residual implicit": (make(ResidualVQ, num_quantizers=3, implicit_neural_codebook=True), (2, 9, D)),
    "residual stochastic": (make(ResidualVQ, num_quantizers=3, stochastic_sample_codes=True), (3, 37, D)),
    "grouped": (make(GroupedResidualVQ, groups=2, num_quantizers=3), (3, 37, D)),
    "grouped dropout": (make(GroupedResidualVQ, groups=2, num_quantizers=3, quantize_dropout=True), (3, 37, D)),
    "hierarchical": (make(HierarchicalVQ, scales=(1, 2, 5), kmeans_init=False, decay=0.8), (3, D, 16)),
    "hierarchical image": (
        make(
            HierarchicalVQ, scales=(1, 2, 4), shared_codebook=False, accept_image_fmap=True, threshold_ema_dead_code=0
        ),
        (3, D, 6, 6),
    ),
    "simvq": (make(SimVQ), (3, 37, D)),
    "simvq straight through": (make(SimVQ, rotation_trick=False, commitment_weight=0.3), (3, 37, D)),
    "simvq image": (make(SimVQ, channel_first=True, frozen_codebook_dim=6), (3, D, 5, 7)),
    "simvq transform": (
        lambda: SimVQ(
            dim=D, codebook_size=K, codebook_transform=nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, D))
        ),
        (3, 37, D),
    ),
    "residual simvq": (make(ResidualSimVQ, num_quantizers=3), (3, 37, D)),
    "residual simvq dropout": (make(ResidualSimVQ, num_quantizers=3, quantize_dropout=True), (3, 37, D)),
}
ALL = SINGLE | COMPOSED


def batch(shape: tuple[int, ...], seed: int, permuted: bool = False, grad: bool = True) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if permuted:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
        assert x.dim() < 2 or not x.is_contiguous() or 1 in x.shape
    return x.requires_grad_(grad)


@pytest.mark.parametrize("name", ALL)
def test_five_training_steps_and_evaluation(name: str) -> None:
    build, shape = ALL[name]
    original, twin = pair(build)
    for i in range(5):
        # The fourth step's input has no gradient, the second and fifth are not contiguous.
        x = batch(shape, i, permuted=i % 3 == 1, grad=i != 3)
        assert_same_step(original, twin, x, seed=i, call={})
        assert_same_state(original, twin)
    assert_state_loads_both_ways(original, twin, build)
    for model in (original, twin):
        model.eval()
    assert_same_step(original, twin, batch(shape, 7, permuted=True), seed=7, call={})
    with torch.no_grad():
        assert_same_step(original, twin, batch(shape, 8, grad=False), seed=8, call={})
        for model in (original, twin):
            model.train()
        if name != "in place":  # its own backward pass cannot run there
            assert_same_step(original, twin, batch(shape, 9), seed=9, call={})
    assert_same_state(original, twin)


MASK = torch.arange(37) < torch.tensor([[30], [37], [5]])
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "mask": ("default", {"mask": MASK}),
    "lens": ("default", {"lens": torch.tensor([30, 37, 5])}),
    "mask dead codes": ("dead codes", {"mask": MASK}),
    "mask kmeans": ("kmeans", {"mask": MASK}),
    "mask affine": ("affine", {"mask": MASK}),
    "mask cosine": ("cosine", {"mask": MASK}),
    "mask cross entropy": ("cross entropy", {"mask": MASK}),
    "mask in place": ("in place", {"mask": MASK}),
    "mask residual": ("residual", {"mask": MASK}),
    "topk": ("default", {"topk": 4}),
    "top one": ("default", {"topk": 1}),
    "top one mask": ("default", {"topk": 1, "mask": MASK}),
    "temperature": ("stochastic", {"sample_codebook_temp": 0.0}),
    "freeze": ("default", {"freeze_codebook": True}),
    "breakdown": ("default", {"return_loss_breakdown": True}),
    "breakdown learnable": ("learnable", {"return_loss_breakdown": True}),
    "breakdown orthogonal": ("orthogonal", {"return_loss_breakdown": True}),
    "weight": ("default", {"ema_update_weight": torch.linspace(0.1, 1.0, K)}),
    "weight function": ("default", {"ema_update_weight": lambda sums, counts: (counts > 1).float()}),
    "no update": ("default", {"ema_update": False}),
    "indices": ("default", {"indices": torch.arange(3 * 37).reshape(3, 37) % K}),
    "all codes": ("residual", {"return_all_codes": True}),
    "all codes dropout": ("residual dropout", {"return_all_codes": True}),
    "dropout seed": ("residual dropout", {"rand_quantize_dropout_fixed_seed": 5}),
    "beam": ("residual", {"beam_size": 2}),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_arguments_of_a_call(name: str, training: bool) -> None:
    option, call = CALLS[name]
    build, shape = ALL[option]
    original, twin = pair(build)
    if option == "affine" and not training:  # its statistics begin empty, and it divides by them
        assert_same_step(original, twin, batch(shape, 7), seed=7, call=call)
    for i in range(2):
        for model in (original, twin):
            model.train(training)
        assert_same_step(original, twin, batch(shape, i), seed=i, call=call)
        assert_same_state(original, twin)


def test_micro_batches_put_aside_are_averaged_later() -> None:
    original, twin = pair(ALL["default"][0])
    for i, accumulate in enumerate((True, True, False)):
        assert_same_step(original, twin, batch((3, 37, D), i), seed=i, call={"accum_ema_update": accumulate})
        assert_same_state(original, twin)


def test_random_projections_are_searched_by_the_patched_codebook() -> None:
    original, twin = pair(make(RandomProjectionQuantizer, codebook_dim=4, num_codebooks=3))
    x = batch((3, 37, D), 0, grad=False)
    assert torch.equal(original(x), twin(x))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FSQ", {"levels": [3, 3]}),
        ("FSP", {"levels": [3, 3]}),
        ("LFQ", {"codebook_size": 4}),
        ("ResidualFSQ", {"levels": [3, 3], "dim": 2, "num_quantizers": 2}),
        ("ResidualLFQ", {"codebook_size": 4, "dim": 2, "num_quantizers": 2}),
        ("LatentQuantize", {"levels": [3, 3], "dim": 2}),
        ("BinaryMapper", {"bits": 3}),
    ],
)
def test_classes_without_a_codebook_are_left_alone_with_the_reason(name: str, options: dict[str, Any]) -> None:
    library = importlib.import_module("vector_quantize_pytorch")
    report = vqkernels.patch(getattr(library, name)(**options), strict=True)
    assert not report.replaced
    assert {s.reason for s in report.skipped} == {"has no codebook to search"}


def test_every_class_of_the_library_is_known() -> None:
    """A new version with a new quantizer fails here."""
    library = importlib.import_module("vector_quantize_pytorch")
    ignored = {path.rpartition(".")[2] for path in recognisers.ignored()}
    built_on_these = {"GroupedResidualVQ", "HierarchicalVQ", "RandomProjectionQuantizer", "ResidualSimVQ", "ResidualVQ"}
    others = {"Sequential"}
    classes = {n for n, c in vars(library).items() if isinstance(c, type) and issubclass(c, nn.Module)}
    assert classes <= ignored | built_on_these | {"VectorQuantize", "SimVQ"} | others


def test_what_crashes_upstream_crashes_with_the_same_error() -> None:
    # ResidualVQ with indices unpacks two results as three; an image needs C == H == W; batches are not heads.
    calls: list[tuple[Make, Tensor, dict[str, Any]]] = [
        (make(ResidualVQ, num_quantizers=2), batch((3, 37, D), 0), {"indices": torch.zeros(3, 37, 2).long()}),
        (make(ResidualVQ, num_quantizers=2, accept_image_fmap=True), batch((3, D, 5, 7), 0), {}),
        (make(VQ), batch((3, 5, 7, D), 0), {}),
        (make(VQ), batch((3, 5, D + 1), 0), {}),
        (make(VQ, accept_image_fmap=True), batch((3, D - 1, D, D), 0), {}),
        (make(SimVQ), batch((3, 5, D + 1), 0), {}),
        (make(VQ, heads=2, codebook_dim=5), batch((3, 37, D), 0), {"mask": MASK}),
    ]
    for build, x, call in calls:
        for model in pair(build):
            with pytest.raises((ValueError, RuntimeError, IndexError)) as found:
                model(x, **call)
            assert "vqkernels" not in str(found.value)


def test_codes_that_no_loss_reaches_have_no_gradient() -> None:
    """A gradient of zeros would let weight decay move them."""
    vq = VQ(dim=8, codebook_size=16, commitment_weight=0.0, learnable_codebook=True, ema_update=False)
    vqkernels.patch(vq, strict=True)
    quantized, _, loss = vq(torch.randn(3, 11, 8, requires_grad=True))
    (quantized.sum() + loss.sum()).backward()
    assert vq._codebook.embed.grad is None
