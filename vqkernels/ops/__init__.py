"""The ops that everything composes from, one folder each: contract, reference, and one file per backend.

Called by :mod:`vqkernels.functional`; importing this package registers every op with torch.
"""

from vqkernels.ops import _batching as _batching
from vqkernels.ops.codebook_sum import codebook_sum
from vqkernels.ops.ema_update import ema_update
from vqkernels.ops.lookup import lookup
from vqkernels.ops.nearest import nearest
from vqkernels.ops.quantize_grad import quantize_grad
from vqkernels.ops.quantize_output import quantize_output
from vqkernels.ops.residual_nearest import residual_nearest
from vqkernels.ops.soft_assign import soft_assign
from vqkernels.ops.soft_assign_grad import soft_assign_grad

__all__ = [
    "codebook_sum",
    "ema_update",
    "lookup",
    "nearest",
    "quantize_grad",
    "quantize_output",
    "residual_nearest",
    "soft_assign",
    "soft_assign_grad",
]
