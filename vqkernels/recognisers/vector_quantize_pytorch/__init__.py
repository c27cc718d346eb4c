"""vector-quantize-pytorch: ``VectorQuantize``, and with it ``ResidualVQ`` and all else built on it, and ``SimVQ``.

The library's own code goes on running; what is replaced is the codebook inside, where the cost is: search, one-hot
and the sums for the moving averages. Written against versions 1.27 to 1.32.
"""

from __future__ import annotations

from vqkernels.recognisers.vector_quantize_pytorch.modules import SimVQAdapter, VectorQuantizeAdapter

__all__ = ["ADAPTERS", "IGNORED"]

ADAPTERS = (VectorQuantizeAdapter, SimVQAdapter)

_LIBRARY = "vector_quantize_pytorch"
IGNORED = {
    f"{_LIBRARY}.{module}.{name}": "has no codebook to search"
    for module, name in (
        ("finite_scalar_quantization", "FSQ"),
        ("residual_fsq", "ResidualFSQ"),
        ("residual_fsq", "GroupedResidualFSQ"),
        ("lookup_free_quantization", "LFQ"),
        ("residual_lfq", "ResidualLFQ"),
        ("residual_lfq", "GroupedResidualLFQ"),
        ("latent_quantization", "LatentQuantize"),
        ("binary_mapper", "BinaryMapper"),
    )
}
