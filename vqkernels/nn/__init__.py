"""Modules that own a codebook: options, buffers, statistics and their synchronisation; no kernels."""

from vqkernels.nn.fsq import FSQ
from vqkernels.nn.grouped import GroupedResidualVectorQuantizer, ProductQuantizer
from vqkernels.nn.lfq import BSQ, LFQ, LFQOutput
from vqkernels.nn.multi_scale import MultiScaleOutput, MultiScaleVectorQuantizer
from vqkernels.nn.random_projection import RandomProjectionQuantizer
from vqkernels.nn.regularizers import orthogonality
from vqkernels.nn.remap import IndexRemap
from vqkernels.nn.residual import ResidualVectorQuantizer, ResidualVQOutput
from vqkernels.nn.sim_vq import SimVQ
from vqkernels.nn.split import SplitResidualVectorQuantizer
from vqkernels.nn.vector_quantizer import VectorQuantizer

__all__ = [
    "BSQ",
    "FSQ",
    "LFQ",
    "GroupedResidualVectorQuantizer",
    "IndexRemap",
    "LFQOutput",
    "MultiScaleOutput",
    "MultiScaleVectorQuantizer",
    "ProductQuantizer",
    "RandomProjectionQuantizer",
    "ResidualVQOutput",
    "ResidualVectorQuantizer",
    "SimVQ",
    "SplitResidualVectorQuantizer",
    "VectorQuantizer",
    "orthogonality",
]
