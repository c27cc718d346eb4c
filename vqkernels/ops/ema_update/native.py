"""``ema_update`` on the kernels of csrc/cpu/ema_update.cpp and csrc/cuda/ema_update.cu: one pass over the state.

Called by ``dispatch``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels import _cuda, _native


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
    return _cuda.unsupported(codebook)


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
    counts, sums = counts.float().contiguous(), sums.float().contiguous()
    if _cuda.serves(codebook):
        lib = _cuda.lib()
        workspace = _cuda.workspace(codebook, lib.vqk_cuda_ema_update_workspace(*codebook.shape[:2]))
        with _cuda.on_device(codebook):
            _cuda.check(
                lib.vqk_cuda_ema_update(
                    *(t.data_ptr() for t in (cluster_size, embed_avg, codebook, counts, sums)),
                    *codebook.shape,
                    decay,
                    eps,
                    int(normalize),
                    workspace.data_ptr(),
                    *_cuda.stream(codebook),
                )
            )
        return
    _native.check(
        _native.lib().vqk_cpu_ema_update(
            *(t.data_ptr() for t in (cluster_size, embed_avg, codebook, counts, sums)),
            *codebook.shape,
            decay,
            eps,
            int(normalize),
        )
    )
