"""Where patched and original may differ: indices that the original gets wrong, by the float64 oracle; bf16; memory."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import pair
from torch import Tensor
from vector_quantize_pytorch import SimVQ, VectorQuantize

import vqkernels
from vqkernels.testing import oracle_nearest

# Options under which fp32 distances of the classic tiny codes (uniform +-1/K) collide.
HARD: dict[str, dict[str, Any]] = {
    "l2": {},
    "separate heads": {"heads": 2, "separate_codebook_per_head": True, "codebook_dim": 16},
    "image": {"accept_image_fmap": True},
}


def shrink(vq: Any) -> None:
    codebook = vq._codebook
    codebook.embed.data.uniform_(-1 / codebook.codebook_size, 1 / codebook.codebook_size)
    codebook.embed_avg.copy_(codebook.embed)


def wrong(indices: Tensor, rows: Tensor, codebook: Tensor, metric: str = "l2") -> int:
    """How many indices differ from the oracle's; rows (H, N, D), codes (H, K, D), indices (H, N)."""
    found = [oracle_nearest(x, e, metric)[0] for x, e in zip(rows, codebook, strict=True)]
    return int((torch.stack(found) != indices).sum())


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_indices_equal_the_oracle_where_the_original_errs(name: str, training: bool) -> None:
    options = HARD[name]
    original, twin = pair(lambda: VectorQuantize(dim=32, codebook_size=3000, **options))
    shrink(original)
    twin.load_state_dict(original.state_dict())
    codes = original._codebook.embed.clone()  # type: ignore[union-attr, operator]
    x = torch.randn(2, 32, 20, 15) if name == "image" else torch.randn(2, 300, 32)
    rows = x.flatten(2).transpose(1, 2) if name == "image" else x
    rows = rows.reshape(-1, codes.shape[0], codes.shape[2]).transpose(0, 1)
    errors = []
    for model in (original, twin):
        model.train(training)
        _, indices, _ = model(x)
        errors.append(wrong(indices.reshape(-1, codes.shape[0]).T, rows, codes))
    assert errors[1] == 0, f"patched: {errors[1]} wrong, original: {errors[0]} of {rows.shape[0] * rows.shape[1]}"
    assert errors[0] > 0, "the original made no mistake: this test shows nothing"


# Options under CPU autocast to bf16, with the metric of the oracle.
AUTOCAST: dict[str, tuple[dict[str, Any], str]] = {
    "l2": ({}, "l2"),
    "cosine": ({"use_cosine_sim": True}, "dot"),
    "learnable": ({"learnable_codebook": True, "ema_update": False}, "l2"),
    "projections": ({"codebook_dim": 8}, "l2"),
}


@pytest.mark.parametrize("name", AUTOCAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bf16_autocast_is_no_worse_than_the_original(name: str, dtype: torch.dtype) -> None:
    options, metric = AUTOCAST[name]
    original, twin = pair(lambda: VectorQuantize(dim=16, codebook_size=200, **options))
    seen: list[Tensor] = []
    original._codebook.register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # type: ignore[union-attr]
    codes = original._codebook.embed.detach().clone()  # type: ignore[union-attr, operator]
    x = (torch.randn(2, 150, 16) * codes.std()).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        results = [model(x.clone().requires_grad_()) for model in (original, twin)]
    rows = seen[0].detach()
    flat = rows.flatten(0, 1)
    errors = [wrong(indices.reshape(1, -1), flat.unsqueeze(0), codes, metric) for _, indices, _ in results]
    assert errors[1] == 0, f"patched: {errors[1]} wrong, original: {errors[0]} of {x.shape[0] * x.shape[1]}"
    exact = codes[0].double()[oracle_nearest(flat, codes[0], metric)[0]].view(*rows.shape)
    loss = (rows.double() - exact).square().mean()
    exact = original.project_out.double()(exact)  # type: ignore[operator, union-attr]
    assert results[1][0].dtype == results[0][0].dtype
    assert results[1][2].dtype == results[0][2].dtype
    distances = [(q.double() - exact).abs().mean().item() for q, _, _ in results]
    assert distances[1] <= distances[0] * 1.01 + 1e-7
    assert abs(float(results[1][2]) - float(loss)) <= abs(float(results[0][2]) - float(loss)) + 1e-6 * float(loss)


def test_half_precision_inputs_keep_their_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        original, twin = pair(lambda: VectorQuantize(dim=6, codebook_size=11))
        x = torch.randn(2, 9, 6).to(dtype)
        for a, b in zip(original(x), twin(x), strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def status(name: str) -> float:
    found = re.search(name + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc (Linux)")
@pytest.mark.parametrize("build", [lambda: VectorQuantize(16, 8192), lambda: SimVQ(16, 8192)], ids=["vq", "simvq"])
def test_no_step_holds_rows_times_codes(build: Any) -> None:
    vq = build()
    vqkernels.patch(vq)
    vq(torch.randn(1, 64, 16))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    out = vq(torch.randn(2, 8192, 16).requires_grad_())
    (out[0].sum() + out[2]).backward()
    grown = status("VmHWM") - before
    assert grown < 256, f"{grown:.0f} MiB; N x K floats are 512 MiB"


@pytest.mark.slow
def test_compiles_after_patching() -> None:
    original, twin = pair(lambda: VectorQuantize(dim=8, codebook_size=16, heads=2, codebook_dim=4))
    compiled = torch.compile(copy.deepcopy(twin), backend="aot_eager")
    for i in range(2):
        x = torch.randn(2, 9, 8)
        gradients = []
        for model in (original, twin, compiled):
            z = x.clone().requires_grad_()
            torch.manual_seed(i)
            quantized, indices, loss = model(z)
            (quantized.sin().sum() + loss.sum()).backward()
            gradients.append((quantized.detach(), indices, loss.detach(), z.grad))
        for other in gradients[1:]:
            for a, b in zip(other, gradients[0], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
