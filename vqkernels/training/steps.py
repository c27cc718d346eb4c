"""One optimiser step of a run: plain, with the losses of a VQGAN, or against a discriminator.

Called by :mod:`vqkernels.training.loop`. A step owns its optimisers, the moving average of the weights and the
discriminator, and knows how all of it goes into a checkpoint and back.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqkernels.models import TokenModel, VQGANLoss, averaged, build_discriminator
from vqkernels.nn import VectorQuantizer
from vqkernels.training import checkpoint, metrics
from vqkernels.training.config import TrainConfig, TrainingError

__all__ = ["AdversarialStep", "LossStep", "PlainStep", "learning_rate", "make_step"]


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Linear warm-up over 2 % of the steps, then a cosine down to 5 %; a function of the step alone."""
    warm_up = max(1, steps // 50)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


class PlainStep:
    """Mean squared error plus the quantizer's loss.

    Args:
        config: of the run.
        model: on its device, not wrapped yet.
        accelerator: wraps it in :meth:`prepare`.
    """

    terms: tuple[str, ...] = metrics.TERMS
    betas = (0.9, 0.95)
    # Whether a second player looks at images and reconstructions after the model's step.
    adversarial = False

    def __init__(self, config: TrainConfig, model: TokenModel, accelerator: Any) -> None:
        self.config, self.model, self.accelerator = config, model, accelerator
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self.optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=self.betas)
        self.average = None if config.average is None else averaged(model, config.average)
        self.codebooks = [m for m in model.modules() if isinstance(m, VectorQuantizer)]

    @property
    def evaluated(self) -> TokenModel:
        """The model to evaluate and to save: the moving average if there is one."""
        if self.average is None:
            return self.model
        module = self.average.module
        assert isinstance(module, TokenModel)
        return module

    def prepare(self) -> None:
        """Wrap for the device, precision and processes; after this nothing is restored."""
        self.engine, self.prepared = self.accelerator.prepare(self.model, self.optimizer)

    # Checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        found = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        found |= checkpoint.optimizer_tensors(self.optimizer, self.names)
        if self.average is not None:
            found |= {f"average.{name}": t for name, t in self.average.state_dict().items()}
        return found

    def restore(self, tensors: Mapping[str, Tensor], path: Path, step: int) -> None:
        """Put :meth:`tensors` back.

        Raises:
            TrainingError: they are of another model.
        """
        checkpoint.restore_model(self.model, tensors, path)
        if step > 0:
            checkpoint.restore_optimizer(self.optimizer, self.names, tensors, path)
        if self.average is not None:
            checkpoint.restore_model(self.average, tensors, path, "average")

    # The step

    def run(self, images: Tensor, step: int) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Train on one batch.

        Args:
            images: (B, 3, S, S) in [0, 1], this process' share.
            step: counted from 0.

        Returns:
            The loss terms, and how often each code of each stream was chosen.
        """
        parts = images.chunk(self.config.accumulate)
        self._set_rate(self.optimizer, self.config.lr, step)
        self.prepared.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        counts, seen = metrics.no_counts(self.model.streams, images.device), []
        with contextlib.ExitStack() as stack:
            if len(parts) > 1:
                for codebook in self.codebooks:
                    stack.enter_context(codebook.accumulating())
            for number, part in enumerate(parts):
                with self._sync(self.engine, number == len(parts) - 1):
                    out = self.engine(part)
                    loss, terms = self._loss(part, out, step)
                    self.accelerator.backward(loss / len(parts))
                self._pool(sums, terms, len(parts))
                for mine, new in zip(
                    counts, metrics.count_codes(out.quantizer.indices, self.model.streams), strict=True
                ):
                    mine += new
                if self.adversarial:
                    seen.append((part, out.reconstruction.detach()))
        self._finish(self.model, self.prepared)
        if self.average is not None:
            self.average.update_parameters(self.model)
        sums |= self._after(seen, step)
        return sums, counts

    def _loss(self, images: Tensor, out: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        reconstruction = torch.nn.functional.mse_loss(out.reconstruction.float(), images)
        loss = reconstruction + self.config.codebook_weight * out.quantizer.loss
        return loss, {
            "loss": loss.detach(),
            "reconstruction": reconstruction.detach(),
            "codebook": out.quantizer.codebook_loss.detach(),
            "commitment": out.quantizer.commitment_loss.detach(),
        }

    def _after(self, seen: Sequence[tuple[Tensor, Tensor]], step: int) -> dict[str, Tensor]:
        return {}

    def _set_rate(self, optimizer: torch.optim.Optimizer, peak: float, step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(peak, step, self.config.steps)

    def _sync(self, engine: Any, last: bool) -> Any:
        return contextlib.nullcontext() if last else self.accelerator.no_sync(engine)

    def _finish(self, module: torch.nn.Module, prepared: Any) -> None:
        if self.config.clip is not None:
            self.accelerator.clip_grad_norm_(module.parameters(), self.config.clip)
        prepared.step()

    @staticmethod
    def _pool(sums: dict[str, Tensor], terms: Mapping[str, Tensor], parts: int) -> None:
        for name, value in terms.items():
            share = value.detach() / parts
            sums[name] = sums[name] + share if name in sums else share


class LossStep(PlainStep):
    """The losses of :class:`vqkernels.models.VQGANLoss` without a discriminator."""

    terms: tuple[str, ...] = (*metrics.TERMS, "l1", "l2", "ms_ssim", "perceptual", "quantizer")
    critic: torch.nn.Module | None = None

    def __init__(self, config: TrainConfig, model: TokenModel, accelerator: Any) -> None:
        super().__init__(config, model, accelerator)
        last_layer = model.last_layer
        assert isinstance(last_layer, Tensor)
        self.last_layer = last_layer
        try:
            self.loss = VQGANLoss(config.loss_config).to(accelerator.device)
        except FileNotFoundError as e:
            raise TrainingError(str(e)) from e

    def _loss(self, images: Tensor, out: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            with self.accelerator.autocast():
                total, terms = self.loss.generator(images, out, self.critic, self.last_layer, step)
        except (ImportError, ValueError) as e:
            raise TrainingError(f"loss: {e}") from e
        terms["loss"] = terms.pop("total")
        return total, terms


class AdversarialStep(LossStep):
    """A generator step, then, from ``discriminator_start`` on, a step of the discriminator on the same images."""

    adversarial = True
    terms: tuple[str, ...] = (
        *LossStep.terms, "adversarial", "adaptive_weight", "discriminator", "logits_real", "logits_fake", "r1", "lecam",
    )  # fmt: skip
    # Momentum makes two players overshoot: taming's choice.
    betas = (0.5, 0.9)

    def __init__(self, config: TrainConfig, model: TokenModel, accelerator: Any) -> None:
        super().__init__(config, model, accelerator)
        sizes = config.discriminator_config
        assert sizes is not None
        if sizes.norm == "batch" and accelerator.num_processes > 1:
            raise TrainingError("discriminator.norm is 'batch', which couples the images of a batch; several processes "
                                "need 'group', 'spectral' or 'none'")  # fmt: skip
        critic = build_discriminator(sizes).to(accelerator.device)
        self.critic = critic.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.critic_names: dict[Tensor, str] = {p: name for name, p in self.critic.named_parameters()}
        self.critic_rate = config.lr / 2 if config.discriminator_lr is None else config.discriminator_lr
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=self.critic_rate, betas=self.betas)

    def prepare(self) -> None:
        """Wrap both networks and both optimisers."""
        super().prepare()
        self.critic_engine, self.critic_prepared = self.accelerator.prepare(self.critic, self.critic_optimizer)

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        assert self.critic is not None
        found = super().tensors() | {f"discriminator.{name}": t for name, t in self.critic.state_dict().items()}
        found |= checkpoint.optimizer_tensors(self.critic_optimizer, self.critic_names, "discriminator_optimizer")
        if self.loss.lecam is not None:
            found |= {f"lecam.{name}": t for name, t in self.loss.lecam.state_dict().items()}
        return found

    def restore(self, tensors: Mapping[str, Tensor], path: Path, step: int) -> None:
        """Put :meth:`tensors` back.

        Raises:
            TrainingError: they are of another model.
        """
        super().restore(tensors, path, step)
        assert self.critic is not None
        checkpoint.restore_model(self.critic, tensors, path, "discriminator")
        if any(name.startswith("discriminator_optimizer.") for name in tensors):  # else it has not begun
            optimizer, names = self.critic_optimizer, self.critic_names
            checkpoint.restore_optimizer(optimizer, names, tensors, path, "discriminator_optimizer")
        if self.loss.lecam is not None:
            checkpoint.restore_model(self.loss.lecam, tensors, path, "lecam")

    def _after(self, seen: Sequence[tuple[Tensor, Tensor]], step: int) -> dict[str, Tensor]:
        if self.loss.adversarial_factor(step) == 0:
            return {}
        assert self.critic is not None
        self._set_rate(self.critic_optimizer, self.critic_rate, step)
        self.critic_prepared.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for number, (images, restored) in enumerate(seen):
            with self._sync(self.critic_engine, number == len(seen) - 1):
                total, terms = self.loss.discriminator(images, restored, self.critic_engine, step)
                self.accelerator.backward(total / len(seen))
            del terms["total"]
            self._pool(sums, terms, len(seen))
        self._finish(self.critic, self.critic_prepared)
        return sums


def make_step(config: TrainConfig, model: TokenModel, accelerator: Any) -> PlainStep:
    """The kind of step that a config asks for.

    Raises:
        TrainingError: weights that it needs are not on this machine.
    """
    if config.loss_config is None:
        return PlainStep(config, model, accelerator)
    kind = LossStep if config.discriminator_config is None else AdversarialStep
    return kind(config, model, accelerator)
