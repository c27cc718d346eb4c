"""``quantize_output`` on the kernels quantize_output.cpp and .cu below csrc: one pass, any layout.

Called by ``dispatch``.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vqkernels import _cuda, _native


def supports(
    z: Tensor, codebook: Tensor, indices: Tensor, distance: Tensor | None, masked: bool, channel_first: bool
) -> str | None:
    """Every shape and stride; float32, float64, float16 and bfloat16, mixed at will."""
    for name, tensor in (("z", z), ("codebook", codebook)):
        if tensor.dtype not in _native.DTYPES:
            return f"{name} is {tensor.dtype}, not one of float32, float64, float16, bfloat16"
    if distance is not None and distance.dtype != torch.float32:
        return f"distance is {distance.dtype}, not float32"
    return _cuda.unsupported(z)


def run(
    z: Tensor, codebook: Tensor, indices: Tensor, distance: Tensor | None, masked: bool, channel_first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows that count are found in any case: ``masked`` would save nothing."""
    h, b, s, d = z.shape
    out = torch.empty((h, b, d, s) if channel_first else (h, b, s, d), dtype=z.dtype, device=z.device)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    codebook_loss = torch.empty((), dtype=dtype, device=z.device)
    commitment_loss = torch.empty((), dtype=dtype, device=z.device)
    weight = torch.empty((), dtype=torch.float64, device=z.device)
    indices = indices.contiguous()
    distance = None if distance is None else distance.contiguous()
    inputs = _native.rows(z) if distance is None else None
    codes, rows = _native.codes(codebook), _native.rows(out.transpose(2, 3) if channel_first else out)
    arguments = (
        None if inputs is None else ctypes.byref(inputs),
        ctypes.byref(codes),
        indices.data_ptr(),
        None if distance is None else distance.data_ptr(),
        ctypes.byref(rows),
        codebook_loss.data_ptr(),
        commitment_loss.data_ptr(),
        weight.data_ptr(),
    )
    if _cuda.serves(z):
        library = _cuda.lib()
        workspace = _cuda.workspace(z, library.vqk_cuda_quantize_output_workspace(ctypes.byref(rows)))
        with _cuda.on_device(z):
            _cuda.check(library.vqk_cuda_quantize_output(*arguments, workspace.data_ptr(), *_cuda.stream(z)))
    else:
        _native.check(_native.lib().vqk_cpu_quantize_output(*arguments))
    return out, codebook_loss, commitment_loss, weight
