# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
"""``quantize_output`` on two Triton kernels: gather with partial sums per block of rows, then the partials in order.

Called by ``dispatch``. Sums over lanes are launched without fusion: a lane that fuses its own product into the sum of
another lane's has other last bits than that one, and either may be stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels import _triton


@triton.jit(do_not_specialize=["num_rows", "inner", "num_codes"])
def _output(
    z, z_head, z_batch, z_row, z_dim, codebook, e_head, e_code, e_dim, indices, distance, out, o_head, o_batch, o_row,
    o_dim, partial, num_rows, inner, num_codes, dim,
    MEASURED: tl.constexpr, DOUBLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of the output; the block's sum of |z - e|^2 and its number of rows that count, in float64."""
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_D).to(tl.int64)
    ok = n < num_rows
    index = tl.load(indices + head * num_rows + n, mask=ok, other=-1)
    known = (index >= 0) & (index < num_codes)
    image, row = n // inner, n % inner
    z_start = z + head * z_head + image * z_batch + row * z_row
    o_start = out + head * o_head + image * o_batch + row * o_row
    e_start = codebook + head * e_head + tl.where(known, index, 0) * e_code
    error = tl.zeros([BLOCK_M], tl.float64 if DOUBLE else tl.float32)
    for first in range(0, dim, BLOCK_D):
        d = first + lane
        mask = known[:, None] & (d < dim)[None, :]
        value = tl.load(e_start[:, None] + (d * e_dim)[None, :], mask=mask, other=0.0).to(error.dtype)
        if MEASURED == 0:
            given = tl.load(z_start[:, None] + (d * z_dim)[None, :], mask=mask, other=0.0).to(error.dtype)
            error += tl.sum((given - value) * (given - value), 1)
        value = tl.where((known | (index == -1))[:, None], value, float("nan"))
        to = o_start[:, None] + (d * o_dim)[None, :]
        tl.store(to, value.to(out.dtype.element_ty), mask=ok[:, None] & (d < dim)[None, :])
    if MEASURED:
        error = tl.load(distance + head * num_rows + n, mask=known, other=0.0).to(error.dtype)
    at = partial + (head * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(at, tl.sum(tl.where(known, error, 0.0).to(tl.float64), 0))
    tl.store(at + 1, tl.sum(known.to(tl.float64), 0))


@triton.jit(do_not_specialize=["blocks", "dim"])
def _finish(partial, codebook_loss, commitment_loss, weight, blocks, dim, BLOCK: tl.constexpr):
    """All partial sums by one program, each lane in ascending order."""
    total = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.float64)
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        total += tl.load(partial + block * 2, mask=block < blocks, other=0.0)
        count += tl.load(partial + block * 2 + 1, mask=block < blocks, other=0.0)
    share = 1.0 / tl.maximum(tl.sum(count, 0) * dim, 1.0)
    loss = (tl.sum(total, 0) * share).to(codebook_loss.dtype.element_ty)
    tl.store(codebook_loss, loss)
    tl.store(commitment_loss, loss)
    tl.store(weight, share)


def supports(
    z: Tensor, codebook: Tensor, indices: Tensor, distance: Tensor | None, masked: bool, channel_first: bool
) -> str | None:
    """Every shape and stride; float32, float64, float16 and bfloat16, mixed at will."""
    return _triton.unsupported_dtype(_triton.DTYPES, z=z, codebook=codebook)


def run(
    z: Tensor, codebook: Tensor, indices: Tensor, distance: Tensor | None, masked: bool, channel_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two launches. On GPUs an index out of range gives NaN, for a check would wait for the device."""
    h, b, s, d = z.shape
    _triton.check_indices("quantize_output", indices, codebook.shape[1])
    double = z.dtype == torch.float64
    out = torch.empty((h, b, d, s) if channel_first else (h, b, s, d), dtype=z.dtype, device=z.device)
    dtype = torch.float64 if double else torch.float32
    losses = [torch.empty((), dtype=dtype, device=z.device) for _ in range(2)]
    weight = torch.empty((), dtype=torch.float64, device=z.device)
    rows = out.transpose(2, 3) if channel_first else out
    indices = indices.contiguous()
    measured = indices if distance is None else distance.contiguous()
    block_d = min(128, _triton.power_of_two(d))
    block_m = max(1, 2048 // block_d)
    blocks = _triton.ceil_div(b * s, block_m)
    partial = torch.empty((h, blocks, 2), dtype=torch.float64, device=z.device)
    with _triton.on_device(z):
        if out.numel():
            _output[(blocks, h)](
                z, *_triton.strides(z), codebook, *_triton.strides(codebook), indices, measured, rows,
                *_triton.strides(rows), partial, b * s, s, codebook.shape[1], d,
                MEASURED=distance is not None, DOUBLE=double, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=4,
                enable_fp_fusion=False,
            )  # fmt: skip
        _finish[(1,)](partial, *losses, weight, h * blocks, d, BLOCK=1024, num_warps=4, enable_fp_fusion=False)
    return out, losses[0], losses[1], weight
