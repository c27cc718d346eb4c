# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
"""``ema_update`` on two Triton kernels: the sizes with their total by parts, then one pass over the codes.

Called by ``dispatch``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels import _triton


@triton.jit(do_not_specialize=["num_codes"])
def _sizes(cluster_size, counts, partial, decay, rest, num_codes, BLOCK: tl.constexpr):
    """cluster_size of BLOCK codes of one head, and their sum in float64, where one of counts is as good as exact."""
    head = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = head * num_codes + k
    size = decay * tl.load(cluster_size + at, mask=k < num_codes, other=0.0)
    size += rest * tl.load(counts + at, mask=k < num_codes, other=0.0)
    tl.store(cluster_size + at, size, mask=k < num_codes)
    tl.store(partial + head * tl.num_programs(0) + tl.program_id(0), tl.sum(size.to(tl.float64), 0))


@triton.jit(do_not_specialize=["num_codes", "parts"])
def _update(
    cluster_size, partial, embed_avg, codebook, sums, decay, rest, eps, all_eps, num_codes, parts, dim,
    NORMALIZE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """embed_avg and codebook of BLOCK_N codes of one head."""
    head = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok, code = k < num_codes, head * num_codes + k
    totals = tl.zeros([BLOCK_P], tl.float64)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        totals += tl.load(partial + head * parts + part, mask=part < parts, other=0.0)
    total = tl.sum(totals, 0)
    denominator = total + all_eps
    smoothed = tl.load(cluster_size + code, mask=ok, other=0.0).to(tl.float64) + eps
    size = (smoothed / tl.where(denominator == 0, 1.0, denominator) * total).to(tl.float32)
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
    parts = _triton.ceil_div(k, 1024)
    partial = torch.empty((h, parts), dtype=torch.float64, device=codebook.device)
    block_d = min(128, _triton.power_of_two(d))
    block_n = max(1, 1024 // block_d)
    with _triton.on_device(codebook):
        _sizes[(parts, h)](
            cluster_size,
            counts.float().contiguous(),
            partial,
            decay,
            1 - decay,
            k,
            BLOCK=1024,
            num_warps=4,
            enable_fp_fusion=False,
        )
        _update[(_triton.ceil_div(k, block_n), h)](
            cluster_size, partial, embed_avg, codebook, sums.float().contiguous(), decay, 1 - decay, eps,
            k * eps, k, parts, d,
            NORMALIZE=int(normalize), BLOCK_P=256, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
