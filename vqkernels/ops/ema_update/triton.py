# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
"""``ema_update`` on a Triton kernel: one pass over the codes, after the sizes and their total.

Called by ``dispatch``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels import _triton


@triton.jit(do_not_specialize=["num_codes"])
def _update(
    smoothed, embed_avg, codebook, sums, decay, rest, num_codes, dim,
    NORMALIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """embed_avg and codebook of BLOCK_N codes; ``num_codes`` counts all heads'."""
    code = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = code < num_codes
    size = tl.load(smoothed + code, mask=ok, other=0.0)
    used = ok & (size != 0)
    lane = tl.arange(0, BLOCK_D)
    square = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, dim, BLOCK_D):
        d = first + lane
        mask = ok[:, None] & (d < dim)[None, :]
        at = code[:, None] * dim + d[None, :]
        average = decay * tl.load(embed_avg + at, mask=mask, other=0.0)
        average += rest * tl.load(sums + at, mask=mask, other=0.0)
        tl.store(embed_avg + at, average, mask=mask)
        value = average / tl.where(used, size, 1.0)[:, None]
        square += tl.sum(value * value, 1)
        if NORMALIZE == 0:
            tl.store(codebook + at, value, mask=mask & used[:, None])
    if NORMALIZE:
        length = tl.maximum(tl.sqrt(square), 1e-12)  # as torch.nn.functional.normalize
        for first in range(0, dim, BLOCK_D):
            d = first + lane
            mask = used[:, None] & (d < dim)[None, :]
            at = code[:, None] * dim + d[None, :]
            value = tl.load(embed_avg + at, mask=mask, other=0.0) / tl.where(used, size, 1.0)[:, None]
            tl.store(codebook + at, value / length[:, None], mask=mask)


def supports(
    cluster_size: Tensor,
    embed_avg: Tensor,
    codebook: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    eps: float,
    normalize: bool,
) -> str | None:
    """State that is contiguous float32, as modules keep it."""
    for name, state in (("cluster_size", cluster_size), ("embed_avg", embed_avg), ("codebook", codebook)):
        if state.dtype != torch.float32 or not state.is_contiguous():
            return f"{name} is {state.dtype} with strides {state.stride()}, not contiguous float32"
    return None


def run(
    cluster_size: Tensor,
    embed_avg: Tensor,
    codebook: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    eps: float,
    normalize: bool,
) -> None:
    """Update the three states in place."""
    if codebook.numel() == 0:
        return
    h, k, d = codebook.shape
    cluster_size.mul_(decay).add_(counts, alpha=1 - decay)
    # (H, K) values in float64, where a total of counts is as good as exact; O(H*K) work, as in the reference.
    size = cluster_size.double()
    total = size.sum(1, keepdim=True)
    denominator = total + k * eps
    smoothed = (size + eps) / torch.where(denominator == 0, 1.0, denominator) * total
    block_d = min(128, _triton.power_of_two(d))
    block_n = max(1, 1024 // block_d)
    with _triton.on_device(codebook):
        _update[(_triton.ceil_div(h * k, block_n),)](
            smoothed.float(), embed_avg, codebook, sums.float().contiguous(), decay, 1 - decay, h * k, d,
            NORMALIZE=int(normalize), BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
