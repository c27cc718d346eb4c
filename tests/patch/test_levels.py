"""Residual quantizers of transformers: one search for all levels, and level by level wherever a level was changed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pairs import pair
from test_codebooks import transformers_class
from torch import Tensor, nn

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
