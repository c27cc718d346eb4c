"""Reconstruction losses of images in [0, 1]: L1, L2 and MS-SSIM, which torchmetrics computes.

Called by :class:`vqkernels.models.VQGANLoss`; torchmetrics is imported when MS-SSIM is used first.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["ms_ssim_loss", "ms_ssim_scales"]

# Wang et al. 2003, "Multi-scale structural similarity for image quality assessment", section 3.2.
BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
KERNEL = 11


def ms_ssim_scales(size: int) -> int:
    """How many of the five scales fit images of this side (0: not even one).

    Example:
        >>> [ms_ssim_scales(size) for size in (8, 32, 64, 256)]
        [0, 2, 3, 5]
    """
    # torchmetrics wants more than 10 pixels after a division by (scales - 1)^2.
    fitting = [n for n in range(1, len(BETAS) + 1) if size // max(1, n - 1) ** 2 >= KERNEL and size >= 2**n]
    return max(fitting, default=0)


def ms_ssim_loss(images: Tensor, reconstruction: Tensor) -> Tensor:
    """``1 - MS-SSIM``, with as many scales as fit, their weights rescaled to sum to that of all five.

    Similarities enter as (1 + s) / 2, so that negative ones have a finite gradient.

    Args:
        images: (B, C, H, W) in [0, 1].
        reconstruction: the same shape.

    Returns:
        0-d float32.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: images are smaller than 11 x 11.
    """
    try:
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim
    except ImportError as e:
        raise ImportError("MS-SSIM needs torchmetrics: pip install 'vqkernels[train]'") from e
    scales = ms_ssim_scales(min(images.shape[-2:]))
    if not scales:
        raise ValueError(f"images has shape {tuple(images.shape)}; MS-SSIM expects sides of at least {KERNEL}")
    total = sum(BETAS[:scales])
    betas = tuple(b / total * sum(BETAS) for b in BETAS[:scales])
    value: Tensor = ms_ssim(reconstruction.float(), images.float(), data_range=1.0, betas=betas, normalize="simple")
    return 1 - value
