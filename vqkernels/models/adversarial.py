"""Adversarial losses, the weight that balances them against reconstruction, and two regularisers of a discriminator.

Called by :class:`vqkernels.models.VQGANLoss`. Sources: Lim and Ye 2017 (hinge), Goodfellow et al. 2014 (logistic),
Esser et al. 2021, eq. 7 (adaptive weight), Mescheder et al. 2018 (R1), Tseng et al. 2021 (LeCam).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels.models.config import check_choice
from vqkernels.nn._distributed import all_reduce, rank_and_size

__all__ = ["KINDS", "LeCam", "Logits", "adaptive_weight", "discriminator_loss", "generator_loss", "r1_penalty"]

KINDS = ("hinge", "vanilla", "non_saturating")
Logits = Tensor | Sequence[Tensor]


def _over_scales(logits: Logits, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean over scales of the mean over images and places."""
    scales = [logits] if isinstance(logits, Tensor) else list(logits)
    values = [function(s.float()).mean() for s in scales]
    return torch.stack(values).mean()


def discriminator_loss(kind: str, real: Logits, fake: Logits) -> Tensor:
    """Half the loss on real plus half the loss on generated images.

    Args:
        kind: ``"hinge"`` max(0, 1 -+ D); ``"vanilla"`` and ``"non_saturating"`` softplus(-+ D).
        real: logits of real images, or one tensor per scale.
        fake: logits of generated images.

    Raises:
        ValueError: ``kind`` is none of these.

    Example:
        >>> import torch
        >>> discriminator_loss("hinge", torch.tensor([0.5]), torch.tensor([-3.0])).item()
        0.25
    """
    check_choice("kind", kind, KINDS)
    loss = _hinge if kind == "hinge" else _logistic
    return 0.5 * (_over_scales(real, loss) + _over_scales(fake, lambda s: loss(-s)))


def _hinge(s: Tensor) -> Tensor:
    return F.relu(1 - s)


def _logistic(s: Tensor) -> Tensor:
    # log(1 + e^-s) without overflow
    return F.softplus(-s)


def generator_loss(kind: str, fake: Logits) -> Tensor:
    """What the generator minimises.

    Args:
        kind: ``"hinge"`` and ``"vanilla"`` -D, as taming does for both; ``"non_saturating"`` softplus(-D).
        fake: logits of generated images, or one tensor per scale.

    Raises:
        ValueError: ``kind`` is none of these.
    """
    check_choice("kind", kind, KINDS)
    return _over_scales(fake, _logistic if kind == "non_saturating" else torch.neg)


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_layer: Tensor,
    *,
    eps: float = 1e-4,
    most: float = 1e4,
    sync: bool = True,
) -> Tensor:
    """|grad of the reconstruction loss| / (|grad of the adversarial loss| + eps), both at the generator's last layer.

    Args:
        reconstruction: loss, 0-d, with a graph that reaches ``last_layer``; the graph is kept.
        adversarial: the generator's loss, likewise.
        last_layer: a parameter.
        eps: keeps the weight finite.
        most: upper clamp.
        sync: with several processes, use the gradients of the joined batch (one all-reduce of twice the layer).

    Returns:
        0-d, detached, in [0, ``most``].
    """
    grads = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (reconstruction, adversarial)]
    if rank_and_size(sync)[1] > 1:
        grads = [g / rank_and_size(sync)[1] for g in all_reduce(grads, sync)]
    first, second = (g.detach().to(torch.promote_types(g.dtype, torch.float32)).norm() for g in grads)
    ratio: Tensor = (first / (second + eps)).clamp(0.0, most).to(reconstruction.dtype)
    return ratio


def r1_penalty(real: Logits, images: Tensor) -> Tensor:
    """Mean over images of the squared norm of the gradient of the mean logit; times gamma / 2 it is R1.

    Args:
        real: logits of ``images``; scales and places are averaged per image.
        images: real images that require a gradient.

    Returns:
        0-d, differentiable.
    """
    scales = [real] if isinstance(real, Tensor) else list(real)
    per_image = sum((s.float().flatten(1).mean(1) for s in scales[1:]), scales[0].float().flatten(1).mean(1)) / len(
        scales
    )
    grad = torch.autograd.grad(per_image.sum(), images, create_graph=True)[0]
    return grad.float().square().flatten(1).sum(1).mean()


class LeCam(nn.Module):
    """LeCam regulariser: keep logits near the moving average of the other side's, for training on little data.

    Args:
        decay: of the moving averages; they start at the first batch's means.
        sync: averages over all processes.
    """

    real: Tensor
    fake: Tensor
    started: Tensor

    def __init__(self, decay: float = 0.999, sync: bool = True) -> None:
        super().__init__()
        self.decay, self.sync = decay, sync
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def update(self, real: Logits, fake: Logits) -> None:
        """Move the averages; every process must call."""
        means = [_over_scales(logits, lambda s: s) for logits in (real, fake)]
        size = rank_and_size(self.sync)[1]
        for average, mean in zip((self.real, self.fake), all_reduce(means, self.sync), strict=True):
            new = mean.to(average) / size
            average.copy_(torch.where(self.started, self.decay * average + (1 - self.decay) * new, new))
        self.started.fill_(True)

    def forward(self, real: Logits, fake: Logits) -> Tensor:
        """``mean max(0, D(x) - a_fake)^2 + mean max(0, a_real - D(G))^2``."""
        first = _over_scales(real, lambda s: F.relu(s - self.fake).square())
        return first + _over_scales(fake, lambda s: F.relu(self.real - s).square())
