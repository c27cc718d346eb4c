"""Exact, fused vector quantization for PyTorch."""

from vqkernels import ops as ops
