"""Modules that own a codebook: options, buffers, statistics and their synchronisation; no kernels."""

from vqkernels.nn.grouped import GroupedResidualVectorQuantizer, ProductQuantizer
from vqkernels.nn.regularizers import orthogonality
from vqkernels.nn.residual import ResidualVectorQuantizer, ResidualVQOutput
from vqkernels.nn.split import SplitResidualVectorQuantizer
from vqkernels.nn.vector_quantizer import VectorQuantizer

__all__ = [
    "GroupedResidualVectorQuantizer",
    "ProductQuantizer",
    "ResidualVQOutput",
    "ResidualVectorQuantizer",
    "SplitResidualVectorQuantizer",
    "VectorQuantizer",
    "orthogonality",
]
