"""Options and helpers that the tests of VectorQuantizer share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqkernels import VectorQuantizer

K, D = 16, 8
OPTIONS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "ema": {"decay": 0.9},
    "ema dead": {"decay": 0.9, "dead_code_ratio": 0.5},
    "gradient dead": {"dead_code_ratio": 0.5},
    "cosine": {"metric": "cosine"},
    "cosine ema": {"metric": "cosine", "decay": 0.9},
    "cosine raw": {"metric": "cosine", "normalize": False},
    "dot": {"metric": "dot"},
    "heads": {"heads": 2},
    "heads ema dead": {"heads": 2, "decay": 0.9, "dead_code_ratio": 0.9},
    "kmeans": {"init": "kmeans", "decay": 0.9},
    "rotation": {"gradient": "rotation", "init": "normal"},
}


def state(vq: VectorQuantizer) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in vq.state_dict().items()}


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(a: Tensor, b: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def batch(vq: VectorQuantizer, *places: int, **kwargs: Any) -> Tensor:
    channels = vq.heads * vq.embedding_dim
    shape = (places[0], channels, *places[1:]) if vq.channel_dim == 1 else (*places, channels)
    return torch.randn(shape, **kwargs)
