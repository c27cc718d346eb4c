"""IBQ (SEED-Voken): the code with the largest dot product, and a gradient through the softmax over all codes.

Read by :mod:`vqkernels.patch`; calls :mod:`vqkernels.nn.propagation`, which streams that softmax.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vqkernels._arguments import autocast_dtype, without_autocast
from vqkernels.functional import quantize_rows
from vqkernels.nn.assignment import mean_assignment
from vqkernels.nn.propagation import propagate
from vqkernels.recognisers._adapter import Adapter
from vqkernels.recognisers._copies import unknown_attributes
from vqkernels.recognisers._feature_maps import average_dtype, check_map

__all__ = ["ADAPTERS"]


class IbqQuantizer(Adapter):
    """``IndexPropagationQuantize``: (B, C, H, W) to (quantized, loss or four of them, (None, None, indices))."""

    targets = ("*.vqvae.quantize.IndexPropagationQuantize",)
    signatures: ClassVar = {"forward": ("z", "temp", "return_logits")}
    attributes = (
        "embedding",
        "beta",
        "remap",
        "use_entropy_loss",
        "entropy_temperature",
        "sample_minimization_weight",
        "batch_maximization_weight",
    )

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        if module.remap is not None:
            return "remap is set, which takes codes out of the softmax"
        return unknown_attributes(module, cls.overrides, (*cls.attributes, "n_e", "e_dim", "remap_to_used", "used"))

    @classmethod
    def describe(cls, module: Any) -> str:
        entropy = f", entropy loss at {module.entropy_temperature:g}" if module.use_entropy_loss else ""
        return f"softmax in blocks of rows, beta={module.beta:g} on the codebook loss{entropy}"

    def forward(self, z: Tensor, temp: float | None = None, return_logits: bool = False) -> Any:
        module: Any = self
        codes = module.embedding.weight.unsqueeze(0)
        check_map(z, codes)
        # The original's last step is a matrix product, which autocast makes a half-precision one.
        given = torch.promote_types(z.dtype, codes.dtype)
        dtype = autocast_dtype(z) or given
        loss_dtype = average_dtype(z.to(given))
        softmax_dtype = _softmax_dtype(given, z)
        rows = z.flatten(2).transpose(1, 2).to(given).unsqueeze(0)
        with without_autocast(z):
            out = quantize_rows(rows, codes, metric="dot", gradient="none")
            values = propagate(rows, codes, out.indices, "dot") if torch.is_grad_enabled() else out.quantized
            # Of these three terms the first reaches all codes, through the softmax.
            loss = (values - rows).square().mean() + out.commitment_loss + module.beta * out.codebook_loss
            loss = loss.to(loss_dtype)
            diff: Any = loss
            if module.use_entropy_loss:
                entropy, usage = mean_assignment(rows, codes, "dot", module.entropy_temperature, None)
                batch = -(usage * torch.log(usage + 1e-5)).sum()
                weights = module.sample_minimization_weight, module.batch_maximization_weight
                own, batch = (t.to(softmax_dtype) for t in (entropy.mean(), batch))
                diff = (loss, own, batch, weights[0] * own - weights[1] * batch)
        quantized = values[0].transpose(1, 2).reshape(z.shape).contiguous().to(dtype)
        return quantized, diff, (None, None, out.indices.reshape(-1))


def _softmax_dtype(given: torch.dtype, z: Tensor) -> torch.dtype:
    """What the softmax of a matrix product has: float32 in CUDA's autocast, the product's dtype in the CPU's."""
    product = autocast_dtype(z)
    if product is None:
        return given
    return product if z.device.type == "cpu" else torch.float32


ADAPTERS = (IbqQuantizer,)
