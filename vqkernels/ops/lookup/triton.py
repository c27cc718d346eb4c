# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
"""``lookup`` on a Triton kernel: gather straight into the layout and dtype that were asked for.

Called by ``dispatch``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels import _triton


@triton.jit(do_not_specialize=["num_rows", "inner", "num_codes"])
def _gather(
    codebook, e_head, e_code, e_dim, indices, out, o_head, o_batch, o_row, o_dim, num_rows, inner, num_codes, dim,
    DOUBLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of ``out``; index -1 gives zeros, an index out of range NaN."""
    head = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    ok = n < num_rows
    index = tl.load(indices + head * num_rows + n, mask=ok, other=-1)
    known = (index >= 0) & (index < num_codes)
    at = codebook + head * e_head + (tl.where(known, index, 0) * e_code)[:, None] + (d * e_dim)[None, :]
    value = tl.load(at, mask=known[:, None] & (d < dim)[None, :], other=0.0)
    value = value.to(tl.float64 if DOUBLE else tl.float32)
    value = tl.where((known | (index == -1))[:, None], value, float("nan"))
    to = out + head * o_head + (n // inner * o_batch + n % inner * o_row)[:, None] + (d * o_dim)[None, :]
    tl.store(to, value.to(out.dtype.element_ty), mask=ok[:, None] & (d < dim)[None, :])


def supports(codebook: Tensor, indices: Tensor, channel_first: bool, dtype: torch.dtype | None) -> str | None:
    """Every shape and stride; float32, float64, float16 and bfloat16 on either side."""
    return _triton.unsupported_dtype(_triton.DTYPES, codebook=codebook, dtype=dtype or codebook.dtype)


def run(codebook: Tensor, indices: Tensor, channel_first: bool, dtype: torch.dtype | None) -> Tensor:
    """One launch. On GPUs an index out of range gives NaN, for a check would wait for the device."""
    (h, b, s), (k, d) = indices.shape, codebook.shape[1:]
    _triton.check_indices("lookup", indices, k)
    shape = (h, b, d, s) if channel_first else (h, b, s, d)
    out = torch.empty(shape, dtype=dtype or codebook.dtype, device=codebook.device)
    if out.numel() == 0:
        return out
    rows = out.transpose(2, 3) if channel_first else out
    indices = indices.contiguous()
    block_d = min(128, _triton.power_of_two(d))
    block_m = max(1, 2048 // block_d)
    with _triton.on_device(codebook):
        _gather[(_triton.ceil_div(b * s, block_m), _triton.ceil_div(d, block_d), h)](
            codebook, *_triton.strides(codebook), indices, rows, *_triton.strides(rows), b * s, s, k, d,
            DOUBLE=out.dtype == torch.float64, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out
