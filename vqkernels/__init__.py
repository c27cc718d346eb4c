"""Exact, fused vector quantization for PyTorch."""

from vqkernels.convert import convert
from vqkernels.dispatch import Unsupported, use_backend
from vqkernels.explanation import explain
from vqkernels.functional import VQOutput, codebook_sum, lookup, nearest, vector_quantize
from vqkernels.info import info
from vqkernels.levels import ResidualNearest, residual_nearest
from vqkernels.nn import (
    BSQ,
    FSQ,
    LFQ,
    GroupedResidualVectorQuantizer,
    MultiScaleVectorQuantizer,
    RandomProjectionQuantizer,
    ResidualVectorQuantizer,
    SimVQ,
    SplitResidualVectorQuantizer,
    VectorQuantizer,
)
from vqkernels.patch import PatchReport, patch, unpatch

__version__ = "0.1.0"

__all__ = [
    "BSQ",
    "FSQ",
    "LFQ",
    "GroupedResidualVectorQuantizer",
    "MultiScaleVectorQuantizer",
    "PatchReport",
    "RandomProjectionQuantizer",
    "ResidualNearest",
    "ResidualVectorQuantizer",
    "SimVQ",
    "SplitResidualVectorQuantizer",
    "Unsupported",
    "VQOutput",
    "VectorQuantizer",
    "__version__",
    "codebook_sum",
    "convert",
    "explain",
    "info",
    "lookup",
    "nearest",
    "patch",
    "residual_nearest",
    "unpatch",
    "use_backend",
    "vector_quantize",
]
