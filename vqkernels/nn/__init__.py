"""Modules that own a codebook: options, buffers, statistics and their synchronisation; no kernels."""

from vqkernels.nn.vector_quantizer import VectorQuantizer

__all__ = ["VectorQuantizer"]
