"""Packed tokens come back bit by bit; compressed models hold exactly the codes that they search."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vqkernels
from vqkernels.models import VQGAN, Int8Codebook, build_model, load_model, pack_tokens, packed_size, unpack_tokens
from vqkernels.models.compression import compress

CODES = [1, 2, 3, 5, 16, 255, 256, 257, 1024, 16384, 65537, 262144, 2**31 - 1, 2**40 + 3, 2**63]


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 63, 257])
def test_tokens_come_back_and_take_ceil_log2_bits(codes: int, count: int) -> None:
    tokens = torch.randint(0, codes if codes < 2**63 else 2**63 - 1, (count,))
    if count:
        tokens[-1] = codes - 1  # the largest one needs all bits
    data = pack_tokens(tokens, codes)
    assert len(data) == packed_size(count, codes) == math.ceil(count * max(0, (codes - 1).bit_length()) / 8)
    assert torch.equal(unpack_tokens(data, codes, (count,)), tokens)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2**20), st.lists(st.integers(0, 5), min_size=0, max_size=3), st.integers(0, 2**31))
def test_any_codes_and_shape(codes: int, shape: list[int], seed: int) -> None:
    tokens = torch.randint(0, codes, shape, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack_tokens(pack_tokens(tokens, codes), codes, shape), tokens)


def test_streams_longer_than_a_part() -> None:
    tokens = torch.randint(0, 1000, (3, 50_001))
    data = pack_tokens(tokens.int(), 1000)
    assert len(data) == math.ceil(150_003 * 10 / 8)
    assert torch.equal(unpack_tokens(data, 1000, (3, 50_001)), tokens)


def test_the_format_is_as_documented() -> None:
    # 3 bits each, lowest bit first: 5 = 101, 1 = 100, 6 = 011 -> 1 0 1 1 0 0 0 1 | 1
    assert pack_tokens(torch.tensor([5, 1, 6]), 7) == bytes([0b10001101, 0b00000001])


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"indices lie in \[-1, 3\]; expected \[0, 4\)"):
        pack_tokens(torch.tensor([-1, 3]), 4)
    with pytest.raises(ValueError, match=r"indices lie in \[0, 4\]"):
        pack_tokens(torch.tensor([0, 4]), 4)
    with pytest.raises(TypeError, match="indices has dtype"):
        pack_tokens(torch.zeros(3), 4)
    with pytest.raises(ValueError, match="data has 2 bytes; expected 3 for 8 tokens of 3 bits"):
        unpack_tokens(b"ab", 5, (8,))
    with pytest.raises(ValueError, match="data holds the token 7; expected less than codes=5"):
        unpack_tokens(bytes([0b111]), 5, (1,))
    with pytest.raises(ValueError, match="codes is 0"):
        pack_tokens(torch.tensor([0]), 0)


@pytest.mark.parametrize("shape", [(257, 5), (3, 31, 8), (1, 1)])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_int8_search_is_exact_for_the_dequantized_codes(shape: tuple[int, ...], metric: str) -> None:
    codebook = torch.randn(shape)
    small = Int8Codebook.quantize(codebook)
    codes = small.dequantize()
    step = codebook.abs().amax(-1, keepdim=True) / 127
    assert ((codes - codebook).abs() <= 0.5001 * step).all()
    assert small.nbytes == codebook.numel() + 4 * codebook.shape[:-1].numel()
    x = torch.randn(*shape[:-2], 100, shape[-1])
    found, _ = small.nearest(x, metric=metric)
    wide, rows = codes.double(), x.double()
    if metric == "l2":
        want = (rows.unsqueeze(-2) - wide.unsqueeze(-3)).square().sum(-1).argmin(-1)
    else:
        want = (rows @ torch.nn.functional.normalize(wide, dim=-1).transpose(-1, -2)).argmax(-1)
    assert torch.equal(found, want)
    assert torch.equal(found, vqkernels.nearest(x, codes, metric=metric)[0])


def test_int8_codes_of_any_size() -> None:
    codebook = torch.tensor([[0.0, 0.0], [1e-40, -1e-40], [3e38, -1.0], [1e-30, 5e-31]])
    codes = Int8Codebook.quantize(codebook).dequantize()
    assert codes.isfinite().all()
    torch.testing.assert_close(codes[[0, 2, 3]], codebook[[0, 2, 3]], rtol=0.01, atol=1.2e36)
    with pytest.raises(ValueError, match="not finite"):
        Int8Codebook.quantize(torch.tensor([[float("nan")]]))


@pytest.mark.parametrize("name", ["tiny", "tiny-vqgan"])
@pytest.mark.parametrize(("weights", "codebook"), [("bf16", "fp32"), ("fp16", "int8"), ("fp32", "int8")])
def test_compressed_models_are_small_and_nearly_the_same(
    name: str, weights: str, codebook: str, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    model: Any = build_model(name)
    images = torch.rand(2, 3, 32, 32)
    model(images)
    model.eval()
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "small", weights=weights, codebook=codebook)
    sizes = [(tmp_path / kind / "model.safetensors").stat().st_size for kind in ("full", "small")]
    assert sizes[1] < (0.6 if weights != "fp32" else 0.99) * sizes[0]
    loaded: Any = load_model(tmp_path / "small")
    assert loaded.config == model.config
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    want = model.quantizer.codebook
    want = Int8Codebook.quantize(want).dequantize() if codebook == "int8" else want
    assert torch.equal(loaded.quantizer.codebook, want)
    torch.testing.assert_close(loaded.latents(images), model.latents(images), atol=0.05, rtol=0.05)
    # The quantizer searches what the file holds, exactly.
    rows = loaded.latents(images).movedim(1, -1)
    assert torch.equal(loaded.encode(images), vqkernels.nearest(rows, want)[0])


def test_a_weight_that_overflows_is_refused() -> None:
    model: Any = build_model("tiny")
    with torch.no_grad():
        model.decoder.mix.weight[0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match=r"weights is 'fp16', but decoder.mix.weight has values beyond its range"):
        compress(model.state_dict(), "fp16")
    assert compress(model.state_dict(), "bf16")["decoder.mix.weight"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="codebook is 'int4'"):
        compress(model.state_dict(), codebook="int4")


def test_a_damaged_compressed_file_is_refused(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = build_model("tiny-vqgan")
    model.save_pretrained(tmp_path, codebook="int8")
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    del tensors["quantizer.codebook.scale"]
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit this model \(missing: quantizer.cluster_size"):
        VQGAN.from_pretrained(tmp_path)
