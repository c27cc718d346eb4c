"""The losses of a VQGAN put together: what the generator minimises and what the discriminator does, term by term.

Called by the training loop, two times per step; holds no optimiser and moves no weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels.models import adversarial
from vqkernels.models.config import Config, check_choice, check_int, check_number
from vqkernels.models.perceptual import LPIPS, LaplacianPyramidLoss
from vqkernels.models.reconstruction import ms_ssim_loss
from vqkernels.models.tokens import ModelOutput
from vqkernels.models.vqvae import VQVAEOutput

__all__ = ["LossTerms", "VQGANLoss", "VQGANLossConfig"]

PERCEPTUAL = ("laplacian", "lpips", "none")


@dataclass(frozen=True)
class VQGANLossConfig(Config):
    """Weights and switches of a :class:`VQGANLoss`. The defaults are taming's, but for the perceptual term.

    Args:
        l1, l2, ms_ssim: weights of the reconstruction losses.
        perceptual: "laplacian" (needs no weights), "lpips" (its weights must be on this machine) or "none".
        perceptual_weight: of that term.
        codebook_weight: of the quantizer's loss.
        adversarial: "hinge", "vanilla" or "non_saturating".
        adversarial_weight: of the generator's adversarial loss; 0 trains a plain VQ-VAE.
        adaptive: multiply that weight by the ratio of the gradients at the last layer.
        adaptive_most: upper clamp of the ratio.
        discriminator_start: first step in which generator and discriminator see each other.
        discriminator_ramp: steps over which the generator's adversarial weight then grows to its value.
        r1: gamma of the gradient penalty; 0 for none.
        lecam: weight of the LeCam regulariser; 0 for none.
        lecam_decay: of its moving averages.

    Raises:
        ValueError: a value is out of range.
    """

    l1: float = 1.0
    l2: float = 0.0
    ms_ssim: float = 0.0
    perceptual: str = "laplacian"
    perceptual_weight: float = 1.0
    codebook_weight: float = 1.0
    adversarial: str = "hinge"
    adversarial_weight: float = 1.0
    adaptive: bool = True
    adaptive_most: float = 1e4
    discriminator_start: int = 0
    discriminator_ramp: int = 0
    r1: float = 0.0
    lecam: float = 0.0
    lecam_decay: float = 0.999

    def __post_init__(self) -> None:
        for name in (
            "l1", "l2", "ms_ssim", "perceptual_weight", "codebook_weight", "adversarial_weight", "adaptive_most", "r1",
            "lecam",
        ):  # fmt: skip
            check_number(name, getattr(self, name))
        check_number("lecam_decay", self.lecam_decay, 0.0, 1.0)
        check_choice("perceptual", self.perceptual, PERCEPTUAL)
        check_choice("adversarial", self.adversarial, adversarial.KINDS)
        for name in ("discriminator_start", "discriminator_ramp"):
            check_int(name, getattr(self, name), 0)


class LossTerms(NamedTuple):
    """``total`` to call ``backward`` on, and its detached parts (0-d tensors) by name, unweighted."""

    total: Tensor
    terms: dict[str, Tensor]


class VQGANLoss(nn.Module):
    """Named terms and totals of the two steps of VQGAN training.

    The discriminator is an argument, not a part: it belongs to its own optimiser and, with several processes, to its
    own ``DistributedDataParallel``. Pass :meth:`generator` the plain module and :meth:`discriminator` the wrapped one;
    the former leaves the discriminator's parameters without gradient, so each optimiser's step has exactly the
    gradients of its own parameters. Losses are computed in float32 whatever autocast says.

    Args:
        config: weights and switches; default :class:`VQGANLossConfig`.
        sync: adaptive weight and LeCam averages of all processes together.

    Raises:
        FileNotFoundError: LPIPS is asked for and its weights are not on this machine.

    Example:
        >>> import torch
        >>> from vqkernels.models import build_discriminator, build_model
        >>> model, critic, loss = build_model("tiny-vqgan"), build_discriminator(channels=8, layers=2), VQGANLoss()
        >>> images = torch.rand(2, 3, 32, 32)
        >>> output = model(images)
        >>> first = loss.generator(images, output, critic, model.last_layer, step=0)
        >>> first.total.backward()
        >>> second = loss.discriminator(images, output.reconstruction, critic, step=0)
        >>> second.total.backward()
        >>> sorted(second.terms)
        ['discriminator', 'logits_fake', 'logits_real', 'total']
    """

    def __init__(self, config: VQGANLossConfig | None = None, *, sync: bool = True) -> None:
        super().__init__()
        self.config = c = config or VQGANLossConfig()
        self.sync = sync
        self.perceptual: nn.Module | None = None
        if c.perceptual_weight > 0 and c.perceptual != "none":
            self.perceptual = LPIPS("vgg") if c.perceptual == "lpips" else LaplacianPyramidLoss()
        self.lecam = adversarial.LeCam(c.lecam_decay, sync) if c.lecam > 0 else None

    def adversarial_factor(self, step: int) -> float:
        """What the generator's adversarial weight is multiplied by in this step: 0 before the start, then 1 or a ramp.

        Example:
            >>> loss = VQGANLoss(VQGANLossConfig(discriminator_start=10, discriminator_ramp=4))
            >>> [loss.adversarial_factor(step) for step in (9, 10, 11, 13, 100)]
            [0.0, 0.25, 0.5, 1.0, 1.0]
        """
        c = self.config
        if step < c.discriminator_start or c.adversarial_weight == 0:
            return 0.0
        return min(1.0, (step - c.discriminator_start + 1) / max(1, c.discriminator_ramp))

    def reconstruction(self, images: Tensor, reconstruction: Tensor) -> LossTerms:
        """The weighted reconstruction and perceptual losses.

        Args:
            images: (B, C, H, W) in [0, 1].
            reconstruction: the same shape.

        Raises:
            ImportError, ValueError: as in :func:`vqkernels.models.reconstruction.ms_ssim_loss`.
        """
        c = self.config
        with torch.autocast(images.device.type, enabled=False):
            a, b = images.float(), reconstruction.float()
            terms = {"l1": F.l1_loss(b, a), "l2": F.mse_loss(b, a)}
            total = c.l1 * terms["l1"] + c.l2 * terms["l2"]
            if c.ms_ssim > 0:
                terms["ms_ssim"] = ms_ssim_loss(a, b)
                total = total + c.ms_ssim * terms["ms_ssim"]
            if self.perceptual is not None:
                terms["perceptual"] = self.perceptual(a, b)
                total = total + c.perceptual_weight * terms["perceptual"]
        return LossTerms(total, {name: t.detach() for name, t in terms.items()})

    def generator(
        self,
        images: Tensor,
        output: ModelOutput | VQVAEOutput,
        discriminator: nn.Module | None,
        last_layer: Tensor,
        step: int,
    ) -> LossTerms:
        """What the generator minimises.

        Args:
            images: (B, C, H, W) in [0, 1].
            output: of the model for ``images``.
            discriminator: the plain module, also where it is trained wrapped; ``None`` without adversarial loss.
            last_layer: ``model.last_layer``.
            step: counted from 0.

        Returns:
            Terms ``l1``, ``l2``, ``ms_ssim`` and ``perceptual`` where used, ``reconstruction`` (their weighted sum),
            ``quantizer``, ``codebook``, ``commitment``; from ``discriminator_start`` on ``adversarial`` and
            ``adaptive_weight``; ``total``. Without gradients being recorded (evaluation) the ratio counts as 1.

        Raises:
            ValueError: an adversarial loss is due and there is no discriminator.
        """
        c, factor = self.config, self.adversarial_factor(step)
        nll, terms = self.reconstruction(images, output.reconstruction)
        quantizer = output.quantizer
        total = nll + c.codebook_weight * quantizer.loss
        terms["reconstruction"] = nll.detach()
        terms["quantizer"] = quantizer.loss.detach()
        terms["codebook"] = quantizer.codebook_loss.detach()
        terms["commitment"] = quantizer.commitment_loss.detach()
        if factor > 0:
            if discriminator is None:
                raise ValueError(f"discriminator is None; expected one from step {c.discriminator_start} on")
            with without_gradient(discriminator):
                fooled = adversarial.generator_loss(c.adversarial, discriminator(output.reconstruction))
            ratio = torch.ones_like(nll)
            if c.adaptive and torch.is_grad_enabled() and nll.requires_grad:
                ratio = adversarial.adaptive_weight(nll, fooled, last_layer, most=c.adaptive_most, sync=self.sync)
            total = total + factor * c.adversarial_weight * ratio * fooled
            terms["adversarial"], terms["adaptive_weight"] = fooled.detach(), ratio
        terms["total"] = total.detach()
        return LossTerms(total, terms)

    def discriminator(self, images: Tensor, reconstruction: Tensor, discriminator: nn.Module, step: int) -> LossTerms:
        """What the discriminator minimises; before ``discriminator_start`` zero, with zero gradients.

        Args:
            images: (B, C, H, W) in [0, 1].
            reconstruction: of the generator; detached here.
            discriminator: wrapped or not. It is called once, on real and generated images together.
            step: counted from 0.

        Returns:
            Terms ``discriminator``, ``logits_real`` and ``logits_fake`` (means), ``r1`` and ``lecam`` where used,
            ``total``.
        """
        c = self.config
        real = images.detach().float()
        if c.r1 > 0:
            real.requires_grad_(True)
        both = discriminator(torch.cat([real, reconstruction.detach().to(real.dtype)]))
        halves = [s.float().chunk(2) for s in ([both] if isinstance(both, Tensor) else both)]
        d_real, d_fake = [h[0] for h in halves], [h[1] for h in halves]
        terms = {"discriminator": adversarial.discriminator_loss(c.adversarial, d_real, d_fake)}
        total = terms["discriminator"]
        if c.r1 > 0:
            terms["r1"] = adversarial.r1_penalty(d_real, real)
            total = total + 0.5 * c.r1 * terms["r1"]
        active = self.adversarial_factor(step) > 0
        if self.lecam is not None:
            if self.training and active:
                self.lecam.update(d_real, d_fake)
            terms["lecam"] = self.lecam(d_real, d_fake)
            total = total + c.lecam * terms["lecam"]
        total = total * float(active)
        terms["logits_real"] = torch.stack([d.mean() for d in d_real]).mean()
        terms["logits_fake"] = torch.stack([d.mean() for d in d_fake]).mean()
        terms["total"] = total
        return LossTerms(total, {name: t.detach() for name, t in terms.items()})


@contextlib.contextmanager
def without_gradient(module: nn.Module) -> Iterator[None]:
    """Gradients flow through ``module`` but not to its parameters."""
    asked = [p for p in module.parameters() if p.requires_grad]
    for p in asked:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)
