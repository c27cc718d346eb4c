"""``VectorQuantize`` and ``SimVQ`` of vector-quantize-pytorch; residual, grouped and other variants are built on them.

``VectorQuantize`` keeps its own forward; the adapter only tells the codebook when a call looks at all distances.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vqkernels._arguments import autocast_dtype, without_autocast
from vqkernels._gradients import transformed
from vqkernels.functional import lookup_rows, quantize_rows
from vqkernels.recognisers._adapter import Adapter
from vqkernels.recognisers.vector_quantize_pytorch.codebook import CodebookAdapter

__all__ = ["SimVQAdapter", "VectorQuantizeAdapter"]

_LIBRARY = "vector_quantize_pytorch"


class VectorQuantizeAdapter(Adapter):
    """``VectorQuantize``."""

    targets = (f"{_LIBRARY}.vector_quantize_pytorch.VectorQuantize",)
    parts: ClassVar = {"_codebook": CodebookAdapter}
    signatures: ClassVar = {
        "forward": (
            "x",
            "indices",
            "mask",
            "lens",
            "topk",
            "sample_codebook_temp",
            "freeze_codebook",
            "return_loss_breakdown",
            "codebook_transform_fn",
            "ema_update_weight",
            "accum_ema_update",
            "ema_update",
        )
    }
    attributes = ("dim", "has_codebook_diversity_loss", "has_commitment_loss", "commitment_use_cross_entropy_loss")

    @classmethod
    def describe(cls, module: Any) -> str:
        codebook = module._codebook
        heads, size, dim = codebook.embed.shape
        shape = f"{size} x {dim}" if heads == 1 else f"{heads} x {size} x {dim}"
        kind = "cosine" if module.use_cosine_sim else "l2"
        options = codebook.gumbel_sample.keywords
        slow = [
            name
            for name, on in (
                ("the diversity loss", module.has_codebook_diversity_loss),
                ("the cross entropy loss", module.commitment_use_cross_entropy_loss),
                ("stochastic sampling", options.get("stochastic")),
                ("gumbel straight-through", options.get("straight_through")),
            )
            if on
        ]
        note = f"; training runs the original code because of {' and '.join(slow)}" if slow else ""
        return f"{shape}, {kind}{note}"

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Any = None,
        ema_update_weight: Any = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> Any:
        freeze = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        unusual = (indices, mask, lens, topk, codebook_transform_fn)
        if all(argument is None for argument in unusual) and self._is_plain(x, freeze, sample_codebook_temp):
            return self._train(x, freeze, return_loss_breakdown, ema_update_weight, accum_ema_update, ema_update)
        arguments = {
            "mask": mask,
            "lens": lens,
            "topk": topk,
            "sample_codebook_temp": sample_codebook_temp,
            "freeze_codebook": freeze_codebook,
            "return_loss_breakdown": return_loss_breakdown,
            "codebook_transform_fn": codebook_transform_fn,
            "ema_update_weight": ema_update_weight,
            "accum_ema_update": accum_ema_update,
            "ema_update": ema_update,
        }
        cross_entropy = self.commitment_use_cross_entropy_loss and self.has_commitment_loss
        if indices is None and not (self.training and (self.has_codebook_diversity_loss or cross_entropy)):
            return super().forward(x, indices, **arguments)
        self._codebook.needs_distances = True
        try:
            return super().forward(x, indices, **arguments)
        finally:
            del self._codebook.needs_distances

    def _is_plain(self, x: Tensor, freeze: bool, temperature: float | None) -> bool:
        """Whether this is a training step that one fused function computes: losses, and the gradient to the input."""
        codebook = self._codebook
        image = self.accept_image_fmap or self.accept_3d_fmap
        return bool(
            self.training
            and x.is_floating_point()
            and (x.dim() in (2, 3) if not image else x.dim() == (5 if self.accept_3d_fmap else 4))
            and x.shape[1 if image or (x.dim() == 3 and not self.channel_last) else -1] == self.dim
            and not self.has_codebook_diversity_loss
            and not self.has_codebook_orthogonal_loss
            and not self.directional_reparam
            and not (self.commitment_use_cross_entropy_loss and self.has_commitment_loss)
            and self.sync_update_v == 0.0
            and self.in_place_codebook_optimizer is None
            # Without a commitment loss nothing reaches the codes, and an optimizer must see None, not zeros.
            and (
                not self.learnable_codebook
                or (self.has_commitment_loss and x.requires_grad and self.route_gradients_to_input and not freeze)
            )
            and not codebook.draws_at_random(temperature)
            and not codebook._forward_hooks
            and not codebook._forward_pre_hooks
            and not codebook._backward_hooks
        )

    def _train(
        self, x: Tensor, freeze: bool, return_loss_breakdown: bool, weight: Any, accumulate: bool, ema_update: Any
    ) -> Any:
        """The library's forward for a plain training step, with one function for search, losses and gradients."""
        codebook, loss = self._codebook, self.zero.requires_grad_()  # torch.func refuses it: before anything is updated
        only_one, image = x.dim() == 2, self.accept_image_fmap or self.accept_3d_fmap
        channel_first = not only_one and (image or not self.channel_last)
        z = x.unsqueeze(1) if only_one else x.flatten(2).transpose(1, 2) if channel_first else x
        z = codebook.transform_input(self.maybe_split_heads_from_input(self.project_in(z)))
        # A projection under autocast makes a half-precision z of a float32 x: the codes must not be rounded to that.
        z = z.to(torch.promote_types(z.dtype, x.dtype))
        rows = z if z.dim() == 4 else z.unsqueeze(0)
        routed = x.requires_grad and self.route_gradients_to_input
        gradient = ("rotation" if self.rotation_trick else "straight_through") if routed else "none"
        with without_autocast(x):
            codebook.initialize(rows, None)
            codes = codebook.prepare(rows, None)
            out = quantize_rows(rows, _snapshot(codes), metric=codebook.metric, gradient=gradient, live=codes)
            if not freeze:
                codebook.update(rows, out.indices, None, weight, accumulate, ema_update)
        commitment = out.commitment_loss
        if self.learnable_codebook:
            commitment = commitment + (out.codebook_loss - out.codebook_loss.detach())
        if self.has_commitment_loss:
            loss = loss + commitment * self.commitment_weight
        # The library's mse_loss has the dtype of its rows, which a half-precision `zero` does not widen.
        own = commitment.dtype if autocast_dtype(x) is not None else z.dtype
        loss = loss.to(torch.promote_types(own, self.zero.dtype))
        quantized, found = out.quantized, out.indices
        quantized, found = self._by_position(out.quantized).flatten(2), self._by_position(out.indices)
        if self.heads == 1:
            found = found.squeeze(2)
        quantized = self.project_out(quantized)
        if channel_first:
            quantized = quantized.transpose(1, 2)
        if image:
            quantized = quantized.reshape(*quantized.shape[:2], *x.shape[2:])
            found = found.reshape(found.shape[0], *x.shape[2:], *found.shape[2:])
        if only_one:
            quantized, found = quantized.squeeze(1), found.squeeze(1)
        if not return_loss_breakdown:
            return quantized, found, loss
        from vector_quantize_pytorch.vector_quantize_pytorch import LossBreakdown

        shown = commitment.to(own) if self.has_commitment_loss else self.zero
        return quantized, found, loss, LossBreakdown(shown, self.zero, self.zero, self.zero)

    def _by_position(self, values: Tensor) -> Tensor:
        """(H, B, S, ...), or (1, B * H, S, ...) where all heads share one codebook, as (B, S, H, ...)."""
        if self.heads > 1 and not self.separate_codebook_per_head:
            values = values.view(-1, self.heads, *values.shape[2:]).transpose(0, 1)
        return values.movedim(0, 2)


class SimVQAdapter(Adapter):
    """``SimVQ``: the codes are a learnt map of frozen ones."""

    targets = (f"{_LIBRARY}.sim_vq.SimVQ",)
    signatures: ClassVar = {"forward": ("x",)}
    attributes = ("frozen_codebook", "code_transform", "rotation_trick", "input_to_quantize_commit_loss_weight")

    @classmethod
    def describe(cls, module: Any) -> str:
        return f"{module.codebook_size} codes, {'rotation trick' if module.rotation_trick else 'straight-through'}"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = x.movedim(1, -1) if self.channel_first else x
        codes = self.codebook
        if z.dim() < 2 or z.shape[-1] != codes.shape[-1] or not z.is_floating_point():
            outcome: tuple[Tensor, Tensor, Tensor] = super().forward(x)  # its own error
            return outcome
        rows = z.flatten(1, -2).unsqueeze(0) if z.dim() > 2 else z.unsqueeze(0).unsqueeze(2)
        wanted = x.requires_grad or transformed(x)
        gradient = ("rotation" if self.rotation_trick else "straight_through") if wanted else "none"
        out = quantize_rows(rows, codes.unsqueeze(0), metric="l2", gradient=gradient)
        quantized = out.quantized.reshape(z.shape)
        if self.channel_first:
            quantized = quantized.movedim(-1, 1)
        loss = out.codebook_loss + out.commitment_loss * self.input_to_quantize_commit_loss_weight
        if autocast_dtype(x) is None:
            loss = loss.to(torch.promote_types(z.dtype, codes.dtype))  # as mse_loss has it
        return quantized, out.indices.reshape(z.shape[:-1]), loss * self.commitment_weight


def _snapshot(codes: Tensor) -> Tensor:
    """The codes as they are now: averages and dead codes change the codebook in place before the backward pass."""
    if torch.compiler.is_compiling():
        # A copy that Inductor (torch 2.13) keeps: it drops `clone`, then saves the codes of after the update.
        every = torch.arange(codes.shape[1], device=codes.device)
        return lookup_rows(codes, every.expand(codes.shape[0], 1, -1), False).squeeze(1)
    return codes.clone() if torch.is_grad_enabled() else codes
