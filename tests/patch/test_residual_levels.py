"""Residual quantizers: one search for all levels, and level by level wherever a level does more or was changed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pairs import pair
from test_codebooks import transformers_class
from torch import Tensor, nn
from vector_quantize_pytorch import GroupedResidualVQ, ResidualVQ

import vqkernels
from vqkernels import ops

K, D, Q = 45, 6, 5
CLASSES = {
    "encodec": "EncodecResidualVectorQuantizer",
    "xcodec": "XcodecResidualVectorQuantization",
    "mimi": "MimiResidualVectorQuantizer",
}


def levels_of(module: Any) -> nn.ModuleList:
    found: nn.ModuleList = module.quantizers if hasattr(module, "quantizers") else module.layers
    return found


@pytest.fixture(params=CLASSES)
def quantizer(request: pytest.FixtureRequest) -> nn.Module:
    config = SimpleNamespace(
        codebook_size=K, codebook_dim=D, num_quantizers=Q, frame_rate=75,
        vector_quantization_hidden_dimension=D, hidden_size=D,
    )  # fmt: skip
    module: nn.Module = transformers_class(request.param, CLASSES[request.param])(config)
    for i, level in enumerate(levels_of(module)):
        (level.codebook.embed_sum if request.param == "mimi" else level.codebook.embed).normal_(std=0.7**i)
    return module.eval()


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of levels of every search."""
    found: list[int] = []
    nearest, residual_nearest = ops.nearest, ops.residual_nearest

    def one(x: Tensor, codebook: Tensor, *options: Any) -> Any:
        found.append(1)
        return nearest(x, codebook, *options)

    def several(x: Tensor, codebooks: list[Tensor], *options: Any) -> Any:
        found.append(len(codebooks))
        return residual_nearest(x, codebooks, *options)

    monkeypatch.setattr(ops, "nearest", one)
    monkeypatch.setattr(ops, "residual_nearest", several)
    return found


@pytest.mark.parametrize("shape", [(3, D, 41), (1, D, 1), (2, D, 300), (2, D, 0)])
def test_one_search_finds_the_codes_of_all_levels(
    quantizer: nn.Module, searches: list[int], shape: tuple[int, ...]
) -> None:
    original, patched = pair(quantizer)
    x = torch.randn(shape)
    expected, codes = original.encode(x), patched.encode(x)
    assert codes.shape == (Q, shape[0], shape[2])
    assert codes.is_contiguous()
    assert torch.equal(expected, codes)
    assert torch.equal(original.decode(expected), patched.decode(codes))
    assert searches == [Q]


def test_fewer_levels_may_be_asked_for(quantizer: nn.Module, searches: list[int]) -> None:
    original, patched = pair(quantizer)
    x = torch.randn(2, D, 10)
    # EnCodec and X-Codec take a bandwidth in kbit/s: a level has 75 * log2(45) = 412 bits per second.
    limits: list[Any] = [1, 3] if hasattr(quantizer, "input_proj") else [0.42, 1.3]
    for limit in limits:
        assert torch.equal(original.encode(x, limit), patched.encode(x, limit))
    assert searches == [1, 3]


def test_half_precision_latents_meet_float32_codes(quantizer: nn.Module, searches: list[int]) -> None:
    _, patched = pair(quantizer)
    x = torch.randn(2, D, 30).bfloat16()
    codes = patched.encode(x)
    residual = x
    for level, found in zip(levels_of(patched), codes, strict=True):
        assert torch.equal(level.encode(residual), found)
        residual = residual - level.decode(found)
    assert searches[0] == Q


def test_half_precision_goes_level_by_level(quantizer: nn.Module, searches: list[int]) -> None:
    _, patched = pair(quantizer.bfloat16())
    patched.encode(torch.randn(2, D, 30).bfloat16())
    assert searches == [1] * Q


def other_class(level: Any) -> None:
    original = type(level)

    def decode(self: Any, codes: Tensor) -> Any:
        return 0.5 * original.decode(self, codes)

    level.__class__ = type("Mine", (original,), {"decode": decode})


def other_decode(level: Any) -> None:
    decode = level.decode
    level.decode = lambda codes: 0.5 * decode(codes)


def other_codebook_decode(level: Any) -> None:
    decode = level.codebook.decode
    level.codebook.decode = lambda codes: 0.5 * decode(codes)


@pytest.mark.parametrize("change", [other_class, other_decode, other_codebook_decode])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_changed_level_is_asked(
    quantizer: nn.Module, searches: list[int], change: Callable[[Any], None], when: str
) -> None:
    x = torch.randn(2, D, 30)
    plain = quantizer.encode(x)
    if when == "before":
        change(levels_of(quantizer)[1])
        expected = quantizer.encode(x)
        report = vqkernels.patch(quantizer, strict=True)
        assert any(r.options.startswith("level by level: ") for r in report.replaced)
    else:
        vqkernels.patch(quantizer)
        change(levels_of(quantizer)[1])
        expected = plain
    codes = quantizer.encode(x)
    assert searches == [1] * Q
    assert codes[:2].equal(plain[:2])
    assert not codes.equal(plain)
    assert codes.equal(expected) == (when == "before")


def test_a_codebook_can_be_unpatched_or_patched_alone(quantizer: nn.Module, searches: list[int]) -> None:
    x = torch.randn(2, D, 30)
    expected = quantizer.encode(x)
    assert vqkernels.patch(levels_of(quantizer)[0]).replaced
    assert quantizer.encode(x).equal(expected)
    assert searches == [1]
    report = vqkernels.patch(quantizer, strict=True)
    assert [r.options for r in report.replaced if r.path == ""] == [f"{Q} levels in one search"]
    vqkernels.unpatch(levels_of(quantizer)[2])
    assert quantizer.encode(x).equal(expected)
    assert searches == [1] * Q
    assert len(vqkernels.unpatch(quantizer)) == Q
    assert quantizer.encode(x).equal(expected)


def test_compiles(quantizer: nn.Module) -> None:
    original, patched = pair(quantizer)
    torch._dynamo.reset()
    x = torch.randn(2, D, 30)
    assert torch.compile(patched.encode, fullgraph=True, backend="aot_eager")(x).equal(original.encode(x))


def lucidrains(**options: Any) -> nn.Module:
    torch.manual_seed(2)
    module = ResidualVQ(**({"dim": D, "num_quantizers": Q, "codebook_size": K} | options)).eval()
    for i, layer in enumerate(module.layers):
        layer._codebook.embed.data.normal_(std=0.7**i)
    return module


def assert_same(original: nn.Module, patched: nn.Module, x: Tensor, **options: Any) -> None:
    results = []
    for module in (original, patched):
        torch.manual_seed(5)
        results.append(module(x, **options))
    for a, b in zip(*results, strict=True):
        assert (a.dtype, a.is_contiguous(), a.requires_grad) == (b.dtype, b.is_contiguous(), b.requires_grad)
        torch.testing.assert_close(b, a, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"codebook_dim": 4},
        {"codebook_size": (23, 11, 5, 1, 40)},
        {"shared_codebook": True},
        {"learnable_codebook": True, "ema_update": False},
        {"quant_grad_frac": 0.3, "quantize_dropout": True, "rotation_trick": False},
    ],
    ids=str,
)
@torch.no_grad()
def test_lucidrains_residual_vq_is_one_search_in_eval(searches: list[int], options: dict[str, Any]) -> None:
    original, patched = pair(lucidrains(**options))
    for shape in ((3, 41, D), (1, 1, D), (2, 0, D)):
        assert_same(original, patched, torch.randn(shape))
    assert searches == [Q] * 3
    grouped = GroupedResidualVQ(dim=2 * D, groups=2, num_quantizers=Q, codebook_size=K).eval()
    assert_same(*pair(grouped), torch.randn(2, 9, 2 * D))
    assert searches[3:] == [Q, Q]


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"use_cosine_sim": True}, {}),
        ({"beam_size": 3}, {}),
        ({"implicit_neural_codebook": True}, {}),
        ({"diveq": True}, {}),
        ({}, {"mask": torch.arange(41) < torch.tensor([41, 7, 0])[:, None]}),
        ({}, {"return_all_codes": True}),
        ({}, {"beam_size": 2}),
    ],
    ids=str,
)
@torch.no_grad()
def test_lucidrains_options_go_through_the_library(
    searches: list[int], options: dict[str, Any], call: dict[str, Any]
) -> None:
    original, patched = pair(lucidrains(**options))
    assert_same(original, patched, torch.randn(3, 41, D), **call)
    assert Q not in searches


@torch.no_grad()
def test_lucidrains_affine_codes_are_asked_for_level_by_level(searches: list[int]) -> None:
    original, patched = pair(lucidrains(affine_param=True).train())
    x = torch.randn(3, 41, D)
    assert_same(original, patched, x)  # a training step: the statistics that the map needs
    assert_same(original.eval(), patched.eval(), x)
    assert Q not in searches


def test_lucidrains_training_and_gradients_go_through_the_library(searches: list[int]) -> None:
    _, patched = pair(lucidrains())
    x = torch.randn(3, 41, D)
    patched(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        patched(x)
    with torch.no_grad():
        patched.train()(x)
        patched.eval()
        handle = patched.layers[1].register_forward_hook(lambda module, args, out: None)
        patched(x)
        assert Q not in searches
        handle.remove()
        patched(x)
    assert searches[-1] == Q
