"""How close reconstructions are to their originals, image by image, and how far two sets of images are apart.

Called by :mod:`vqkernels.training.evaluate`. Metrics are torchmetrics'; one that cannot be computed is left out with
the reason, never with a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vqkernels.models import LPIPS, find_lpips
from vqkernels.training.config import require

__all__ = [
    "ImageMetrics",
    "detail",
    "fid_extractor",
    "frechet_distance",
    "pixel_diversity",
    "sharpness",
    "token_diversity",
]

# Five scales with a window of 11 need this many pixels on the shorter side.
MS_SSIM_SIDE = 176
# Variance of the Laplacian below which an image has no detail to compare: rounding to 8 bits alone makes about as much.
LEAST_DETAIL = 1e-5


class ImageMetrics:
    """Metrics of one pair of images.

    Attributes:
        missing: name to reason, for the metrics that cannot be computed here.
    """

    def __init__(self, device: torch.device) -> None:
        self.image = require("torchmetrics.functional.image")
        self.missing: dict[str, str] = {}
        self.lpips: LPIPS | None = None
        if isinstance(found := find_lpips("alex"), str):
            self.missing["lpips"] = found
        else:
            self.lpips = LPIPS("alex").to(device).eval()

    def __call__(self, original: Tensor, restored: Tensor) -> dict[str, float]:
        """Metrics by name.

        Args:
            original, restored: (3, H, W) in [0, 1].

        Returns:
            ``mse``, ``psnr`` (dB, of values in [0, 1]; 100 where nothing differs), ``ssim``, ``sharpness`` (of images
            that have detail), ``ms_ssim`` (of images with at least 176 pixels on each side) and ``lpips`` (where its
            weights are).
        """
        mse = float((original.double() - restored.double()).square().mean())
        a, b = restored[None].float(), original[None].float()
        found = {
            "mse": mse,
            "psnr": -10 * math.log10(max(mse, 1e-10)),
            "ssim": float(self.image.structural_similarity_index_measure(a, b, data_range=1.0)),
        }
        if (ratio := sharpness(original, restored)) is not None:
            found["sharpness"] = ratio
        if min(original.shape[1:]) >= MS_SSIM_SIDE:
            found["ms_ssim"] = float(
                self.image.multiscale_structural_similarity_index_measure(a, b, data_range=1.0, normalize="relu")
            )
        if self.lpips is not None:
            found["lpips"] = float(self.lpips(b, a))
        return found


def sharpness(original: Tensor, restored: Tensor) -> float | None:
    """Detail of a reconstruction as a share of the original's: Var(L * Y') / Var(L * Y).

    The variance of the Laplacian is the usual measure of focus (Pech-Pacheco et al. 2000, "Diatom autofocusing in
    brightfield microscopy", LAPV); Y = 0.299 R + 0.587 G + 0.114 B, L = [[0, 1, 0], [1, -4, 1], [0, 1, 0]] without
    padding. In [0, inf): 1 is as sharp as the original, below it blurred, above it over-sharpened. Noise and
    checkerboards count as detail, so read it beside a distance such as PSNR or LPIPS.

    Args:
        original, restored: (3, H, W) in [0, 1].

    Returns:
        The ratio, or ``None`` where the original is flat or smaller than 3 x 3.

    Example:
        >>> import torch
        >>> x = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> sharpness(x, x), round(sharpness(x, 0.5 * x), 6)
        (1.0, 0.25)
    """
    if min(original.shape[1:]) < 3:
        return None
    reference = detail(original)
    return detail(restored) / reference if reference > LEAST_DETAIL else None


def detail(image: Tensor) -> float:
    """Variance of the Laplacian of the luma of an image (3, H, W) in [0, 1]: what :func:`sharpness` compares."""
    luma = torch.einsum("chw,c->hw", image.double(), image.new_tensor([0.299, 0.587, 0.114]).double())
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return float((around - 4 * luma[1:-1, 1:-1]).var(correction=0))


def fid_extractor(weights: str | None, device: torch.device) -> Callable[[Tensor], Tensor] | str:
    """Inception features (B, 2048) of uint8 images for the Fréchet distance, or the reason why there are none.

    Args:
        weights: file of torch-fidelity's ``inception-v3-compat`` weights; nothing is downloaded.
        device: to compute on.
    """
    if weights is None:
        return "needs Inception weights: --inception FILE (torch-fidelity's pt_inception-2015-12-05)"
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    except ImportError as e:
        return f"needs torch-fidelity: {e}"
    except Exception as e:  # torch_fidelity and torch.load raise what they like
        return f"{weights} cannot be read: {' '.join(str(e).split())}"
    network = network.to(device).eval()

    def extract(images: Tensor) -> Tensor:
        features: Tensor = network(images)[0]
        return features

    return extract


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two Gaussians fitted to features (N, F), as in FID (Heusel et al. 2017).

    With the eigenvalues of S_a^(1/2) S_b S_a^(1/2), which is symmetric: no complex square root.

    Raises:
        ValueError: there are fewer than two rows.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> round(frechet_distance(x, x + 3), 6)
        9.0
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"there are {len(a)} and {len(b)} images; a Fréchet distance needs at least two of each")
    means, roots, traces = [], [], []
    for features in (a.double(), b.double()):
        means.append(features.mean(0))
        covariance = torch.cov(features.T).reshape(features.shape[1], features.shape[1])
        values, vectors = torch.linalg.eigh(covariance)
        roots.append(vectors * values.clamp(min=0).sqrt() @ vectors.T)
        traces.append(covariance.trace())
    # Singular values of S_a^(1/2) S_b^(1/2) are the square roots of those eigenvalues.
    both = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    return float((means[0] - means[1]).square().sum() + traces[0] + traces[1] - 2 * both)


def pixel_diversity(thumbnails: Sequence[Tensor]) -> float:
    """Mean Euclidean distance of all pairs of small images (3, h, w), per root of the number of values.

    Example:
        >>> import torch
        >>> pixel_diversity([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)])
        1.0
    """
    if len(thumbnails) < 2:
        return 0.0
    rows = torch.stack(list(thumbnails)).flatten(1).double()
    return float(torch.pdist(rows).mean() / rows.shape[1] ** 0.5)


def token_diversity(sets: Sequence[frozenset[int]]) -> float:
    """Mean Jaccard distance of the sets of tokens of all pairs of images: 1 if no two share a token, 0 if all agree.

    Example:
        >>> token_diversity([frozenset({1, 2}), frozenset({2, 3})])
        0.6666666666666667
    """
    distances = [1 - len(a & b) / max(len(a | b), 1) for i, a in enumerate(sets) for b in sets[i + 1 :]]
    return float(np.mean(distances)) if distances else 0.0
