# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
"""``quantize_grad`` on a Triton kernel: one launch, dz straight into the layout that was asked for.

Called by ``dispatch``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels import _triton

GRADIENTS = {"straight_through": 0, "rotation": 1, "none": 2}


@triton.jit
def _load(x_start, d, dim, x_dim, ok, DOUBLE: tl.constexpr):
    mask = ok[:, None] & (d < dim)[None, :]
    return tl.load(x_start[:, None] + (d * x_dim)[None, :], mask=mask, other=0.0).to(
        tl.float64 if DOUBLE else tl.float32
    )


@triton.jit(do_not_specialize=["num_rows", "inner", "num_codes"])
def _backward(
    grad, g_head, g_batch, g_row, g_dim, z, z_head, z_batch, z_row, z_dim, codebook, e_head, e_code, e_dim,
    indices, commitment, out, o_head, o_batch, o_row, o_dim, num_rows, inner, num_codes, dim,
    GRADIENT: tl.constexpr, DOUBLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dz of BLOCK_M rows; the rotation reads them three times, for norms, for the reflection, and for dz."""
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_D).to(tl.int64)
    ok = n < num_rows
    index = tl.load(indices + head * num_rows + n, mask=ok, other=-1)
    live = ok & (index >= 0) & (index < num_codes)
    image, row = n // inner, n % inner
    g_start = grad + head * g_head + image * g_batch + row * g_row
    z_start = z + head * z_head + image * z_batch + row * z_row
    o_start = out + head * o_head + image * o_batch + row * o_row
    e_start = codebook + head * e_head + tl.where(live, index, 0) * e_code
    c = tl.load(commitment)
    if GRADIENT == 1:
        zz = tl.zeros([BLOCK_M], tl.float64 if DOUBLE else tl.float32)
        ee = tl.zeros([BLOCK_M], tl.float64 if DOUBLE else tl.float32)
        for first in range(0, dim, BLOCK_D):
            a = _load(z_start, first + lane, dim, z_dim, live, DOUBLE)
            b = _load(e_start, first + lane, dim, e_dim, live, DOUBLE)
            zz += tl.sum(a * a, 1)
            ee += tl.sum(b * b, 1)
        z_norm = tl.maximum(tl.sqrt(zz), 1e-6)  # Fifty et al. 2024, the authors' implementation
        e_norm = tl.maximum(tl.sqrt(ee), 1e-6)
        ww = tl.zeros([BLOCK_M], tl.float64 if DOUBLE else tl.float32)
        gw = tl.zeros([BLOCK_M], tl.float64 if DOUBLE else tl.float32)
        ge = tl.zeros([BLOCK_M], tl.float64 if DOUBLE else tl.float32)
        for first in range(0, dim, BLOCK_D):
            g = _load(g_start, first + lane, dim, g_dim, live, DOUBLE)
            a = _load(z_start, first + lane, dim, z_dim, live, DOUBLE) / z_norm[:, None]
            b = _load(e_start, first + lane, dim, e_dim, live, DOUBLE) / e_norm[:, None]
            ww += tl.sum((a + b) * (a + b), 1)
            gw += tl.sum(g * (a + b), 1)
            ge += tl.sum(g * b, 1)
        w_norm = tl.maximum(tl.sqrt(ww), 1e-6)
        gw = gw / w_norm / w_norm
    for first in range(0, dim, BLOCK_D):
        d = first + lane
        a = _load(z_start, d, dim, z_dim, live, DOUBLE)
        b = _load(e_start, d, dim, e_dim, live, DOUBLE)
        dz = c * (a - b)
        if GRADIENT != 2:
            g = _load(g_start, d, dim, g_dim, live, DOUBLE)
            if GRADIENT == 1:
                z_unit = a / z_norm[:, None]
                w = z_unit + b / e_norm[:, None]
                g = g - 2 * gw[:, None] * w + 2 * ge[:, None] * z_unit
                g = (e_norm / z_norm)[:, None] * g
            dz = g + dz
        dz = tl.where(live[:, None], dz, 0.0)
        to = o_start[:, None] + (d * o_dim)[None, :]
        tl.store(to, dz.to(out.dtype.element_ty), mask=ok[:, None] & (d < dim)[None, :])


def supports(
    grad: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    commitment: Tensor,
    gradient: str,
    channel_first: bool,
) -> str | None:
    """Every shape and stride; float32, float64, float16 and bfloat16, mixed at will."""
    return _triton.unsupported_dtype(_triton.DTYPES, grad=grad, z=z, codebook=codebook)


def run(
    grad: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    commitment: Tensor,
    gradient: str,
    channel_first: bool,
) -> Tensor:
    """Arithmetic in float32, in float64 if ``z`` is."""
    h, b, s, d = z.shape
    out = torch.empty((h, b, d, s) if channel_first else (h, b, s, d), dtype=z.dtype, device=z.device)
    if out.numel() == 0:
        return out
    rows = out.transpose(2, 3) if channel_first else out
    indices = indices.contiguous()
    double = z.dtype == torch.float64
    c = commitment.to(device=z.device, dtype=torch.float64 if double else torch.float32)
    block_d = min(128, _triton.power_of_two(d))
    block_m = max(1, 512 // block_d)  # more spills registers in the rotation
    with _triton.on_device(z):
        _backward[(_triton.ceil_div(b * s, block_m), h)](
            grad, *_triton.strides(grad), z, *_triton.strides(z), codebook, *_triton.strides(codebook), indices,
            c, rows, *_triton.strides(rows), b * s, s, codebook.shape[1], d,
            GRADIENT=GRADIENTS[gradient], DOUBLE=double, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
