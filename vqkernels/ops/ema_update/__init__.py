"""``ema_update``: exponential moving average of codebook statistics, and the codes that follow from them, in place.

Contract, all float32: ``cluster_size`` (H, K), ``embed_avg`` (H, K, D), ``codebook`` (H, K, D) are updated from
``counts`` (H, K) and ``sums`` (H, K, D):

    cluster_size = decay * cluster_size + (1 - decay) * counts
    embed_avg    = decay * embed_avg    + (1 - decay) * sums
    smoothed     = (cluster_size + eps) / (total + K * eps) * total,   total = sum over K of cluster_size
    codebook     = embed_avg / smoothed          (then divided by its norm if ``normalize``)

(van den Oord et al. 2017, appendix A.1; Laplace smoothing as in Sonnet's VectorQuantizerEMA.) A code with
``smoothed == 0`` keeps its old value. Deterministic.
"""

from __future__ import annotations

from torch import Tensor

from vqkernels.ops._register import register

__all__ = ["ema_update"]


def _fake(
    cluster_size: Tensor,
    embed_avg: Tensor,
    codebook: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    eps: float = 1e-5,
    normalize: bool = False,
    backend: str = "auto",
) -> None:
    return None


ema_update = register(
    "ema_update",
    "(Tensor(a!) cluster_size, Tensor(b!) embed_avg, Tensor(c!) codebook, Tensor counts, Tensor sums, float decay, "
    "float eps=1e-5, bool normalize=False, str backend='auto') -> ()",
    _fake,
)
