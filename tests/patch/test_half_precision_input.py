"""Half-precision latents without autocast, against float32 codes: vector-quantize-pytorch compares them in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairs import pair, same_buffers, wrong_rows
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

D, K = 16, 64
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "straight through": {"rotation_trick": False},
    "cosine": {"use_cosine_sim": True, "rotation_trick": False},
    "learnable": {"ema_update": False, "learnable_codebook": True},
    "affine": {"affine_param": True, "rotation_trick": False},
    "kmeans, dead codes": {"kmeans_init": True, "threshold_ema_dead_code": 2, "rotation_trick": False},
    "bridge": {"vq_bridge": torch.nn.Linear(D, D)},
}


def half(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(3, 100, D, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_codes_are_not_rounded_to_the_precision_of_the_input(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    original, patched = pair(VectorQuantize(dim=D, codebook_size=K, **OPTIONS[name]))
    for step in range(2):
        x = half(step, dtype)
        results = []
        for module in (original, patched):
            torch.manual_seed(step)  # dead codes become random rows
            results.append(module(x, return_loss_breakdown=True))
        (_, expected, _, said), (quantized, indices, loss, breakdown) = results
        assert torch.equal(indices, expected)
        assert quantized.dtype == dtype
        assert [part.dtype for part in breakdown] == [part.dtype for part in said]
        (quantized.float().square().mean() + loss).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        same_buffers(original, patched)


def test_the_nearest_of_the_float32_codes_is_named() -> None:
    torch.manual_seed(0)
    original, patched = pair(VectorQuantize(dim=2, codebook_size=400, rotation_trick=False))
    codes = original._codebook.embed[0].clone()
    x = half(0, torch.bfloat16).detach().reshape(3, -1, 2)
    assert wrong_rows(original(x)[1], patched(x)[1], x.float(), codes) == 0
