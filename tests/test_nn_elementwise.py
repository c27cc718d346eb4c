"""FSQ, LFQ, BSQ, SimVQ and random projections: against vector-quantize-pytorch, float64 formulas, and by contract."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vqkernels
from tests.quantizers import same_state, state
from vqkernels.nn import BSQ, FSQ, LFQ, RandomProjectionQuantizer, SimVQ
from vqkernels.nn.lfq import mean_of_products

MODULES: dict[str, Any] = {
    "fsq": lambda **o: FSQ([8, 5, 5, 5], **o),
    "fsq symmetric": lambda **o: FSQ([8, 5, 2, 5], symmetric=True, **o),
    "lfq": lambda **o: LFQ(4, commitment_cost=0.25, **o),
    "bsq": lambda **o: BSQ(4, **o),
    "simvq": lambda **o: SimVQ(32, 4, **o),
}


def close(a: Tensor, b: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def peers() -> Any:
    return pytest.importorskip("vector_quantize_pytorch")


# -- against vector-quantize-pytorch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_fsq_is_that_of_vector_quantize_pytorch(symmetric: bool, heads: int) -> None:
    levels = [8, 5, 6, 3]
    theirs = peers().FSQ(levels, dim=10, num_codebooks=heads, preserve_symmetry=symmetric)
    ours = FSQ(levels, heads=heads, symmetric=symmetric, input_dim=10, channel_dim=-1)
    ours.load_state_dict(theirs.state_dict())
    x, y = (torch.randn(2, 51, 10, generator=torch.Generator().manual_seed(3)).requires_grad_() for _ in range(2))
    want, indices = theirs(x)
    out = ours(y)
    assert torch.equal(out.indices, indices.long())
    close(out.quantized, want)
    close(ours.codes_to_output(out.indices), theirs.indices_to_codes(indices))
    want.sin().sum().backward()
    out.quantized.sin().sum().backward()
    close(y.grad, x.grad)
    close(ours.project_in.weight.grad, theirs.project_in.weight.grad, atol=1e-5)


@pytest.mark.parametrize("spherical", [False, True])
def test_lfq_is_that_of_vector_quantize_pytorch(spherical: bool) -> None:
    # A warm softmax: vector-quantize-pytorch clamps probabilities at 1e-5 before the logarithm.
    theirs = peers().LFQ(
        codebook_size=64, dim=10, entropy_loss_weight=0.1, commitment_loss_weight=0.25, diversity_gamma=1.5,
        spherical=spherical,
    )  # fmt: skip
    ours = LFQ(
        6, input_dim=10, channel_dim=-1, spherical=spherical, temperature=4.0, entropy_weight=0.1, diversity=1.5,
        commitment_cost=0.25,
    )  # fmt: skip
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k.startswith("project")})
    x, y = (torch.randn(2, 33, 10, generator=torch.Generator().manual_seed(3)).requires_grad_() for _ in range(2))
    (want, indices, loss), parts = theirs(x, inv_temperature=0.25, return_loss_breakdown=True)
    out = ours(y)
    assert torch.equal(out.indices, indices.long())
    close(out.quantized, want)
    close(out.sample_entropy, parts.per_sample_entropy)
    close(out.batch_entropy, parts.batch_entropy)
    close(out.loss, loss)
    (want.sin().sum() + loss).backward()
    (out.quantized.sin().sum() + out.loss).backward()
    close(y.grad, x.grad, rtol=1e-5, atol=1e-5)
    close(ours.codes_to_output(out.indices), theirs.indices_to_codes(indices))


@pytest.mark.parametrize("rotation", [False, True])
def test_simvq_is_that_of_vector_quantize_pytorch(rotation: bool) -> None:
    theirs = peers().SimVQ(dim=8, codebook_size=50, frozen_codebook_dim=5, rotation_trick=rotation)
    gradient = "rotation" if rotation else "straight_through"
    ours = SimVQ(50, 8, frozen_dim=5, gradient=gradient, channel_dim=-1)
    ours.load_state_dict(theirs.state_dict())
    x, y = (torch.randn(2, 41, 8, generator=torch.Generator().manual_seed(3)).requires_grad_() for _ in range(2))
    want, indices, loss = theirs(x)
    out = ours(y)
    assert torch.equal(out.indices, indices)
    close(out.quantized, want)
    close(out.loss, loss)
    (want.sin().sum() + loss).backward()
    (out.quantized.sin().sum() + out.loss).backward()
    close(y.grad, x.grad, atol=1e-5)
    # The rotated output of vector-quantize-pytorch has no path to the codebook, nor has ours.
    close(ours.code_transform.weight.grad, theirs.code_transform.weight.grad, atol=1e-5)
    close(ours.codes_to_output(out.indices), out.quantized)


def test_simvq_reads_the_authors_checkpoint_and_outputs_projected_codes() -> None:
    ours = SimVQ(20, 6, bias=True)
    found = {
        "embedding.weight": torch.randn(20, 6),
        "embedding_proj.weight": torch.randn(6, 6),
        "embedding_proj.bias": torch.randn(6),
    }
    ours.load_state_dict(found)
    projected = found["embedding.weight"] @ found["embedding_proj.weight"].T + found["embedding_proj.bias"]
    z = torch.randn(30, 6)
    out = ours.eval()(z)
    want = torch.cdist(z.double(), projected.double()).argmin(1)
    assert torch.equal(out.indices, want)
    close(out.quantized, projected[want])


def test_simvq_moves_every_code() -> None:
    vq = SimVQ(64, 4)
    before = vq.codebook.detach().clone()
    optimizer = torch.optim.SGD(vq.parameters(), lr=0.1)
    out = vq(torch.randn(7, 4))
    out.loss.backward()
    optimizer.step()
    assert ((vq.codebook - before).abs().amax(1) > 0).all()
    assert vq.usage() == out.indices.unique().numel() / 64
    with pytest.raises(ValueError, match="transform gave shape"):
        SimVQ(8, 4, transform=nn.Linear(4, 3))(torch.randn(2, 4))


def test_random_projections_label_as_vector_quantize_pytorch_does() -> None:
    theirs = peers().RandomProjectionQuantizer(dim=20, codebook_size=30, codebook_dim=6)
    ours = RandomProjectionQuantizer(20, 30, 6, channel_dim=-1)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(2, 70, 20)
    assert torch.equal(ours(x), theirs(x))


def test_random_projections_follow_from_the_seed_and_never_learn() -> None:
    torch.manual_seed(1)
    first = RandomProjectionQuantizer(9, 30, 4, seed=3)
    torch.manual_seed(2)
    second, other = RandomProjectionQuantizer(9, 30, 4, seed=3), RandomProjectionQuantizer(9, 30, 4, seed=4)
    x = torch.randn(5, 9, 7)
    labels = first(x)
    assert torch.equal(labels, second(x))
    assert not torch.equal(labels, other(x))
    assert labels.shape == (5, 7)
    assert same_state(state(first), state(second))
    assert not list(first.parameters())
    assert (first(x, lens=torch.tensor([7, 0, 1, 2, 3]))[1] == -1).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(first(x), labels)
    with pytest.raises(ValueError, match=r"z has shape \(5, 8, 7\)"):
        first(x[:, :8])


# -- formulas ----------------------------------------------------------------------------------------------------------


def test_bfloat16_inputs_reach_every_level_and_large_grids_every_code() -> None:
    fsq = FSQ([1000, 1000, 1000, 1000], channel_dim=-1)
    digits = torch.randint(0, 1000, (500, 4))
    indices = (digits * fsq.basis).sum(-1)
    assert indices.max() > 2**32
    codes = fsq.codes_to_output(indices)
    # The inverse of the bound: inputs that round to these digits.
    half, offset = 999 * 1.001 / 2, 0.5
    z = torch.atanh((codes.double() * 500 + offset) / half) - torch.atanh(
        torch.tensor(offset / half, dtype=torch.float64)
    )
    assert torch.equal(fsq(z).indices, indices)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fsq(z).indices, indices)
    wide = FSQ([257], channel_dim=-1)
    z = torch.linspace(-4, 4, 4001)[:, None].bfloat16()
    assert torch.equal(wide(z).indices, wide(z.double()).indices)


def test_every_code_of_a_grid_is_its_own_nearest() -> None:
    for fsq in (FSQ([4, 3, 6], channel_dim=-1), FSQ([4, 3, 2], symmetric=True, channel_dim=-1)):
        indices = torch.arange(fsq.num_embeddings)
        codes = fsq.codes_to_output(indices)
        assert codes.unique(dim=0).shape[0] == fsq.num_embeddings
        assert codes.abs().max() == 1
        levels = [codes[:, d].unique().numel() for d in range(3)]
        assert levels == fsq.levels.tolist()


def test_noise_replaces_rounding_in_training_only() -> None:
    fsq = FSQ([5, 5], symmetric=True, noise=0.5, channel_dim=-1)
    z = torch.randn(400, 2)
    codes = fsq.codes_to_output(fsq(z).indices)
    moved = (fsq(z).quantized != codes).float().mean()
    assert 0.3 < moved < 0.6
    assert torch.equal(fsq.eval()(z).quantized, codes)


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_entropies_are_those_of_the_listed_distribution(bits: int) -> None:
    """In float64, without any clamp; the 2^bits codes are listed here and nowhere else."""
    lfq = LFQ(bits, temperature=0.7, channel_dim=-1, groups=1)
    z = torch.randn(50, bits, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(50) > 0.3
    out = lfq(z, mask)
    codes = lfq.codes_to_output(torch.arange(2**bits)).double()
    p = (2 * z[mask] @ codes.T / 0.7).softmax(-1)
    sample, batch = torch.special.entr(p).sum(-1).mean(), torch.special.entr(p.mean(0)).sum()
    close(out.sample_entropy, sample, rtol=1e-12, atol=1e-12)
    close(out.batch_entropy, batch, rtol=1e-12, atol=1e-12)
    (got,) = torch.autograd.grad(out.sample_entropy - 0.3 * out.batch_entropy, z)
    (want,) = torch.autograd.grad(sample - 0.3 * batch, z)
    close(got, want, rtol=1e-9, atol=1e-12)
    assert out.commitment_loss.item() == pytest.approx(F.mse_loss(z[mask], z[mask].sign()).item())


def test_groups_bound_the_batch_entropy_from_above() -> None:
    z = torch.randn(64, 12) + torch.randn(64, 1)
    found = [float(LFQ(12, temperature=1.0, groups=g, channel_dim=-1)(z).batch_entropy) for g in (1, 2, 3, 12)]
    assert found == sorted(found)
    assert found[0] < found[-1] - 0.1
    assert LFQ(18).groups == 2
    assert LFQ(13).groups == 13


@pytest.mark.parametrize("make", [lambda: LFQ(6), lambda: BSQ(6), lambda: LFQ(6, temperature=1e-4)])
def test_gradients_of_certain_bits_are_finite(make: Any) -> None:
    """At the usual temperatures most of the 2^D probabilities underflow to 0."""
    z = (3 * torch.randn(40, 6)).requires_grad_()
    make()(z).loss.backward()
    assert torch.isfinite(z.grad).all()


def test_mean_of_products_has_a_gradient() -> None:
    up = torch.rand(2, 5, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(2, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(mean_of_products, (up, weight))


# -- the contract ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_layouts_masks_and_decoding(name: str) -> None:
    for shape, channel_dim in (((3, 4, 5, 6), 1), ((3, 7, 4), -1), ((3, 4), 1), ((0, 4, 5), 1)):
        vq = MODULES[name](channel_dim=channel_dim).eval()
        z = torch.randn(shape)
        out = vq(z)
        places = shape[:-1] if channel_dim == -1 else (shape[0], *shape[2:])
        assert out.quantized.shape == shape
        assert out.indices.shape == places
        close(vq.codes_to_output(out.indices), out.quantized)
        mask = torch.rand(places) > 0.5
        masked = vq(z, mask)
        assert torch.equal(masked.indices, torch.where(mask, out.indices, -1))
        close(vq.codes_to_output(masked.indices), masked.quantized)
        assert (masked.quantized.movedim(1 if channel_dim == 1 and len(shape) > 2 else -1, -1)[~mask] == 0).all()
        assert torch.isfinite(masked.loss)
    z = torch.randn(2, 4, 5)
    vq = MODULES[name]()
    lens = torch.tensor([5, 2])
    assert torch.equal(vq(z, lens=lens).indices, vq(z, torch.arange(5) < lens[:, None]).indices)
    with pytest.raises(ValueError, match=r"z has shape \(2, 3\)"):
        vq(torch.randn(2, 3))
    with pytest.raises(TypeError, match="z has dtype"):
        vq(torch.zeros(2, 4, dtype=torch.long))


@pytest.mark.parametrize("name", MODULES)
def test_half_precision_pickles_and_gradients(name: str) -> None:
    vq = MODULES[name]().eval()
    z = torch.randn(4, 4, 9)
    want = vq(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vq(z).indices, want.indices)
    half = z.bfloat16().requires_grad_()
    out = vq(half)
    assert out.quantized.dtype == torch.bfloat16
    assert torch.equal(out.indices, vq(half.detach().float()).indices)
    out.quantized.float().sum().backward()
    assert torch.isfinite(half.grad).all()
    before = state(vq)
    vq(z)
    assert same_state(state(vq), before)
    assert torch.equal(pickle.loads(pickle.dumps(vq))(z).indices, want.indices)


@pytest.mark.parametrize("options", [{}, {"input_dim": 5}], ids=["plain", "projection"])
@pytest.mark.parametrize("name", [n for n in MODULES if n != "simvq"])
def test_nan_under_a_mask_reaches_no_gradient(name: str, options: dict[str, Any]) -> None:
    vq, mask = MODULES[name](**options), torch.rand(3, 9) > 0.4
    z, found = torch.randn(3, options.get("input_dim", 4), 9), []
    for filling in (0.0, float("nan")):
        a = torch.where(mask.unsqueeze(1), z, filling).requires_grad_()
        out = vq(a, mask)
        found.append(torch.autograd.grad(out.loss + out.quantized.square().sum(), [a, *vq.parameters()]))
    assert found[0][0].any()
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)


def test_straight_through_gradients_pass_unchanged() -> None:
    z = torch.randn(5, 4, requires_grad=True)
    out = vqkernels.LFQ(4, entropy_weight=0.0)(z)
    g = torch.randn(5, 4)
    assert torch.equal(torch.autograd.grad(out.quantized, z, g)[0], g)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FSQ([]), "levels is []"),
        (lambda: FSQ([8, 1]), "levels is [8, 1]"),
        (lambda: FSQ([2, 3]), "symmetric=True"),
        (lambda: FSQ([3], noise=0.5), "noise is 0.5"),
        (lambda: FSQ([2**40, 2**40]), "below 2^63"),
        (lambda: LFQ(63), "dim is 63"),
        (lambda: LFQ(8, groups=3), "groups is 3"),
        (lambda: LFQ(8, temperature=0.0), "temperature is 0.0"),
        (lambda: SimVQ(8, 4, gradient="soft"), "gradient is 'soft'"),
        (lambda: FSQ([3, 3], channel_dim=2), "channel_dim is 2"),
        (lambda: FSQ([3, 3]).codes_to_output(torch.tensor(1)), "indices has shape ()"),
        (
            lambda: RandomProjectionQuantizer(4, 8, 2)(torch.zeros(2, 4, device="meta")),
            "z is on meta, the projection on",
        ),
        (lambda: FSQ([3, 3], input_dim=4)(torch.zeros(2, 4, device="meta")), "z is on meta, the projection on cpu"),
    ],
)
def test_bad_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
