"""``quantize_grad`` on the kernels of csrc/cpu/quantize_grad.cpp and csrc/cuda/quantize_grad.cu: one pass, any layout.

Called by ``dispatch``.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vqkernels import _cuda, _native


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
    for name, tensor in (("grad", grad), ("z", z), ("codebook", codebook)):
        if tensor.dtype not in _native.DTYPES:
            return f"{name} is {tensor.dtype}, not one of float32, float64, float16, bfloat16"
    return _cuda.unsupported(z)


def run(
    grad: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    commitment: Tensor,
    gradient: str,
    channel_first: bool,
) -> Tensor:
    """Write dz straight into the layout that was asked for."""
    h, b, s, d = z.shape
    out = torch.empty((h, b, d, s) if channel_first else (h, b, s, d), dtype=z.dtype, device=z.device)
    if out.numel() == 0:
        return out
    indices = indices.contiguous()
    rows = _native.rows(out.transpose(2, 3) if channel_first else out)
    grads, inputs, codes = _native.rows(grad), _native.rows(z), _native.codes(codebook)
    if _cuda.serves(z):
        # Where it lies: to read a value that is on a GPU would wait for it.
        c = commitment.to(device=z.device, dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)
        with _cuda.on_device(z):
            _cuda.check(
                _cuda.lib().vqk_cuda_quantize_grad(
                    ctypes.byref(grads),
                    ctypes.byref(inputs),
                    ctypes.byref(codes),
                    indices.data_ptr(),
                    c.data_ptr(),
                    _native.GRADIENTS[gradient],
                    ctypes.byref(rows),
                    *_cuda.stream(z),
                )
            )
        return out
    _native.check(
        _native.lib().vqk_cpu_quantize_grad(
            ctypes.byref(grads),
            ctypes.byref(inputs),
            ctypes.byref(codes),
            indices.data_ptr(),
            float(commitment),
            _native.GRADIENTS[gradient],
            ctypes.byref(rows),
        )
    )
    return out
