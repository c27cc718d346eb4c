"""Image quantizers, original and patched: taming and its descendants, LlamaGen, diffusers, transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pairs import LargestTensor, close, compare, pair, permuted, round_trip, same_buffers, wrong_rows
from restated import LlamaGen, Taming1, Taming2, TamingEma, TamingGumbel
from torch import Tensor, nn
from torch.nn import functional

import vqkernels

K, D = 37, 5


def transformers_class(model: str, name: str) -> Any:
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    return getattr(module, name)


def chameleon() -> nn.Module:
    config = SimpleNamespace(num_embeddings=K, embed_dim=D, beta=0.3)
    return transformers_class("chameleon", "ChameleonVQVAEVectorQuantizer")(config)


def janus() -> nn.Module:
    config = SimpleNamespace(num_embeddings=K, embed_dim=D, num_patches=3)
    return transformers_class("janus", "JanusVQVAEVectorQuantizer")(config)


def glm_image() -> nn.Module:
    config = SimpleNamespace(num_embeddings=K, embed_dim=D)
    return transformers_class("glm_image", "GlmImageVQVAEVectorQuantizer")(config)


def diffusers(**options: Any) -> nn.Module:
    vae = pytest.importorskip("diffusers.models.autoencoders.vae")
    return vae.VectorQuantizer(K, D, 0.25, **options)


MAKE: dict[str, Callable[[], nn.Module]] = {
    "transformers Chameleon": chameleon,
    "transformers Janus": janus,
    "transformers GLM-Image": glm_image,
    "diffusers": diffusers,
    "diffusers, beta done right": lambda: diffusers(legacy=False),
    "diffusers, index maps": lambda: diffusers(sane_index_shape=True),
    "re-stated taming 2": lambda: Taming2(K, D, 0.25),
    "re-stated taming 2, beta done right": lambda: Taming2(K, D, 0.25, legacy=False),
    "re-stated taming 1": lambda: Taming1(K, D, 0.25),
    "re-stated taming EMA": lambda: TamingEma(K, D, 0.25),
    "re-stated LlamaGen": lambda: LlamaGen(K, D, 0.25, 0.0, True, True),
    "re-stated LlamaGen, plain vectors": lambda: LlamaGen(K, D, 0.25, 0.0, False, False),
}
UNITS = ("GLM-Image", "re-stated LlamaGen")


def spread(module: nn.Module) -> nn.Module:
    """Codes as after training: as far apart as the latents, so that no formula is in doubt."""
    table: Any = module.embedding
    table.weight.data.normal_()
    return module


@pytest.fixture(params=MAKE)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def forward(module: nn.Module, z: Tensor) -> Any:
    return module(z)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)], ids=["contiguous", "last", "mixed"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_patched_equals_original(name: str, training: bool, grad: bool, order: tuple[int, ...]) -> None:
    original, patched = pair(spread(MAKE[name]()).train(training))
    compare(original, patched, forward, permuted(torch.randn(3, D, 7, 9), order), grad)
    same_buffers(original, patched)


def test_five_training_steps_end_at_the_same_state(name: str) -> None:
    original, patched = pair(spread(MAKE[name]()).train())
    for _ in range(5):
        z = torch.randn(3, D, 7, 9)
        compare(original, patched, forward, z, True)
        for module in (original, patched):
            for p in module.parameters():
                if p.grad is not None:
                    p.data.sub_(p.grad, alpha=0.1)
    same_buffers(original, patched)
    round_trip(original, patched)


def codes_of(module: nn.Module, z: Tensor, units: bool) -> tuple[Tensor, Tensor]:
    table: Any = module.embedding
    rows, codes = z.movedim(1, -1).reshape(-1, z.shape[1]), table.weight.detach()
    return (functional.normalize(rows, dim=-1), functional.normalize(codes, dim=-1)) if units else (rows, codes)


@pytest.mark.parametrize("kind", ["float32", "autocast", "bfloat16"])
def test_codes_are_the_nearest_where_the_original_misses_them(name: str, kind: str) -> None:
    # Small codes among large latents, as the usual U(-1/K, 1/K) start: the hardest case for a distance formula.
    module = MAKE[name]().eval()
    table: Any = module.embedding
    table.weight.data.uniform_(-1 / K, 1 / K)
    z = 8 * torch.randn(16, D, 16, 16)
    if kind == "bfloat16":
        module, z = module.bfloat16(), z.bfloat16()
    original, patched = pair(module)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        expected, out = original(z), patched(z)
    rows, codes = codes_of(module, z, any(u in name for u in UNITS) and "plain" not in name)
    indices = [result[2] if isinstance(result[2], Tensor) else result[2][2] for result in (expected, out)]
    missed = wrong_rows(indices[0], indices[1], rows, codes)
    print(f"{name}, {kind}: the original misses {missed} of {len(rows)}")
    if kind == "bfloat16":
        assert missed > 0
    # Never further from the latents than the original, measured in float64.
    ours, theirs = ((rows.double() - codes.double()[i.reshape(-1)]).square().sum() for i in reversed(indices))
    assert ours <= theirs
    assert out[0].dtype == expected[0].dtype
    if isinstance(expected[1], Tensor):
        exact = float((rows.double() - codes.double()[indices[1].reshape(-1)]).square().mean())
        beta: Any = module.beta
        both = 1 if name.endswith("EMA") else 0
        wanted = exact * (beta if both else 1 + beta)
        assert out[1].dtype == expected[1].dtype
        rounding = 2**-8 if expected[1].dtype == torch.bfloat16 else 1e-6
        assert abs(float(out[1]) - wanted) <= max(abs(float(expected[1]) - wanted), rounding * wanted)


def test_no_matrix_of_rows_by_codes(name: str) -> None:
    if "taming 1" in name or "EMA" in name:
        pytest.skip("a one-hot matrix is part of what it returns")
    original, patched = pair(spread(MAKE[name]()).train())
    with LargestTensor() as watch:
        original(torch.randn(2, D, 40, 40))
    assert watch.largest >= 3200 * K
    with LargestTensor() as watch:
        patched(torch.randn(2, D, 40, 40))
    assert watch.largest <= max(3200 * D, 65536)  # LlamaGen's window of tokens


def test_half_precision_latents_with_float_codes(name: str) -> None:
    original, patched = pair(spread(MAKE[name]()).eval())
    z = torch.randn(2, D, 5, 3).bfloat16()
    if "taming 1" in name or "EMA" in name or "LlamaGen" in name:
        pytest.skip("the original cannot: its matrix product wants one dtype")
    with torch.autocast("cpu", torch.bfloat16):
        expected, out = original(z), patched(z)
    assert out[0].dtype == expected[0].dtype
    assert out[1].dtype == expected[1].dtype


@pytest.mark.parametrize("unknown", ["random", "extra", 3])
@pytest.mark.parametrize("make", ["diffusers", "taming"])
def test_remapped_indices(make: str, unknown: Any, tmp_path: Any) -> None:
    used = torch.tensor([5, 30, 2, 5, 11, 36, 0])  # 5 twice: its first place counts
    if make == "diffusers":
        import numpy as np

        np.save(tmp_path / "used.npy", used.numpy())
        module = diffusers(remap=str(tmp_path / "used.npy"), unknown_index=unknown)
    else:
        module = Taming2(K, D, 0.25, used, unknown)
    original, patched = pair(spread(module))
    z = torch.randn(4, D, 6, 6)
    results = []
    for m in (original, patched):
        torch.manual_seed(3)
        results.append(m(z)[2][2])
    assert results[0].shape == (144, 1)
    assert torch.equal(results[0], results[1])
    odd = torch.tensor([[5, 1], [36, 30]])
    if unknown != "random":
        assert torch.equal(original.remap_to_used(odd), patched.remap_to_used(odd))


def test_codes_from_indices_without_a_one_hot_matrix() -> None:
    original, patched = pair(spread(Taming1(K, D, 0.25)))
    indices = torch.randint(0, K, (2 * 3 * 4,))
    close(original.get_codebook_entry(indices, (2, 3, 4, D)), patched.get_codebook_entry(indices, (2, 3, 4, D)))
    close(original.get_codebook_entry(indices, None), patched.get_codebook_entry(indices, None))


def test_gumbel_interface_is_refused_as_before() -> None:
    _, patched = pair(Taming2(K, D, 0.25))
    with pytest.raises(AssertionError):
        patched(torch.randn(1, D, 2, 2), temp=0.5)


def test_gumbel_is_left_alone_with_the_reason() -> None:
    module = nn.Sequential(TamingGumbel(K, D))
    report = vqkernels.patch(module, strict=True)
    assert not report.replaced
    assert "softmax" in report.skipped[0].reason


def test_llamagen_counts_more_tokens_than_its_window() -> None:
    _, patched = pair(spread(LlamaGen(K, D, 0.25, 0.0, True, True)).train())
    out = patched(torch.randn(2, D, 256, 257))  # 131 584 tokens; the original raises
    assert out[1][3] == len(out[2][2][-65536:].unique()) / K


@pytest.mark.parametrize("units", [False, True])
def test_llamagen_entropy_loss_in_chunks_equals_original(units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqkernels.recognisers.llamagen._CHUNK_ELEMENTS", 7 * K)
    original, patched = pair(spread(LlamaGen(K, D, 0.25, 0.1, units, False)).train())
    compare(original, patched, forward, torch.randn(2, D, 5, 6), True)
    with LargestTensor() as watch:
        patched(torch.randn(2, D, 40, 40))
    assert watch.largest <= 3200 * D


@pytest.mark.parametrize("shape", [(2, 3, D, 4, 5), (1, 1, D, 1, 1), (2, 1, D, 7, 3)])
def test_emu3_indices(shape: tuple[int, ...]) -> None:
    config = SimpleNamespace(codebook_size=K, embed_dim=D)
    original, patched = pair(spread(transformers_class("emu3", "Emu3VQVAEVectorQuantizer")(config)))
    for z in (torch.randn(shape), permuted(torch.randn(shape), (0, 2, 1, 3, 4))):
        assert torch.equal(original(z), patched(z))
    half, patched_half = pair(copy.deepcopy(original).bfloat16())
    z = torch.randn(shape).bfloat16()
    table: Any = half.embedding
    wrong_rows(half(z), patched_half(z), z.movedim(2, -1), table.weight)
