"""vector-quantize-pytorch: ``VectorQuantize``, and with it ``ResidualVQ`` and all else built on it, and ``SimVQ``.

The library's own code goes on running; what is replaced is the codebook inside, where the cost is: search, one-hot
and the sums for the moving averages. Tested against version 1.32; of another one, a method with other parameters keeps
its code.
"""

from __future__ import annotations

from vqkernels.recognisers.vector_quantize_pytorch.modules import SimVQAdapter, VectorQuantizeAdapter
from vqkernels.recognisers.vector_quantize_pytorch.residual import ResidualVQAdapter

__all__ = ["ADAPTERS", "IGNORED"]

ADAPTERS = (VectorQuantizeAdapter, ResidualVQAdapter, SimVQAdapter)

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
        ("finite_scalar_perturbation", "FSP"),
        ("evo_lookup_free_quantization", "EvoLFQ"),
    )
}
