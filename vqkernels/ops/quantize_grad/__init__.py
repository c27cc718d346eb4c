"""``quantize_grad``: gradient of a quantizer with respect to its input, in one pass.

Contract: ``grad`` (H, B, S, D) is dL/d(quantized), ``z`` (H, B, S, D) the input, both any strides; ``codebook``
(H, K, D), ``indices`` (H, B, S) in [-1, K), ``commitment`` a 0-d tensor c. Returns dz (H, B, S, D) in z's dtype,
contiguous, or contiguous (H, B, D, S) with ``channel_first=True``:

    dz = T(grad) + c * (z - e),     e = codebook[index];    dz = 0 where the index is -1

* ``straight_through``  T(g) = g (Bengio et al. 2013)
* ``none``              T(g) = 0
* ``rotation``          T(g) = lam * (g - 2 (g.w) w + 2 (g.e^) z^), z^ = z/|z|, e^ = e/|e|, w = (z^ + e^)/|z^ + e^|,
                        lam = |e|/|z|, norms clamped at 1e-6: the transpose of the map that rotates and scales z onto
                        e (Fifty et al. 2024, "Restructuring Vector Quantization with the Rotation Trick", sec. 4.2)

Arithmetic is float32 (float64 if ``z`` is).
"""

from __future__ import annotations

from torch import Tensor

from vqkernels.ops._register import register

__all__ = ["GRADIENTS", "quantize_grad"]

GRADIENTS = ("straight_through", "rotation", "none")


def _fake(
    grad: Tensor,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    commitment: Tensor,
    gradient: str = "straight_through",
    channel_first: bool = False,
    backend: str = "auto",
) -> Tensor:
    h, b, s, d = z.shape[-4:]
    return z.new_empty((h, b, d, s) if channel_first else (h, b, s, d))


quantize_grad = register(
    "quantize_grad",
    "(Tensor grad, Tensor z, Tensor codebook, Tensor indices, Tensor commitment, str gradient='straight_through', "
    "bool channel_first=False, str backend='auto') -> Tensor",
    _fake,
)
