"""VAR's multi-scale quantizer: one search per scale, on what the coarser scales left of the feature map.

Read by :mod:`vqkernels.patch`. For a quantizer of your own: :class:`vqkernels.MultiScaleVectorQuantizer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from vqkernels._arguments import without_autocast
from vqkernels.functional import lookup, nearest
from vqkernels.nn.estimators import estimate
from vqkernels.nn.statistics import count_codes
from vqkernels.recognisers._adapter import Adapter
from vqkernels.recognisers._copies import unknown_attributes
from vqkernels.recognisers._feature_maps import check_map

__all__ = ["ADAPTERS"]


class VarQuantizer(Adapter):
    """``VectorQuantizer2``: (B, C, H, W) to (f_hat, usages, loss), and ``f_to_idxBl_or_fhat``.

    The original's training step fails without a process group; here it runs, and counts the codes of this process.
    """

    targets = ("*.quant.VectorQuantizer2",)
    overrides = ("forward", "f_to_idxBl_or_fhat")
    signatures: ClassVar = {
        "forward": ("f_BChw", "ret_usages"),
        "f_to_idxBl_or_fhat": ("f_BChw", "to_fhat", "v_patch_nums"),
    }
    attributes = (
        "embedding",
        "quant_resi",
        "v_patch_nums",
        "using_znorm",
        "beta",
        "vocab_size",
        "ema_vocab_hit_SV",
        "record_hit",
        "prog_si",
    )

    @classmethod
    def unsupported(cls, module: Any) -> str | None:
        return unknown_attributes(module, cls.overrides, (*cls.attributes, "Cvae"))

    @classmethod
    def describe(cls, module: Any) -> str:
        return f"{len(module.v_patch_nums)} scales, {'by angle' if module.using_znorm else 'l2'}"

    def forward(self, f_BChw: Tensor, ret_usages: bool = False) -> tuple[Tensor, list[float] | None, Tensor]:
        module: Any = self
        check_map(f_BChw, module.embedding.weight)
        f = f_BChw.float()
        target, sizes = f.detach(), [(n, n) for n in module.v_patch_nums]
        _check_size(f, sizes[-1])
        rest, f_hat, loss, hits = target, torch.zeros_like(target), f.new_zeros(()), []
        with without_autocast(f):
            for scale in range(len(sizes)):
                indices = self._search(rest, sizes, scale)
                h = self._contribution(indices, sizes, scale)
                f_hat, rest = f_hat + h, rest - h.detach()
                loss = loss + F.mse_loss(f_hat.detach(), f) * module.beta + F.mse_loss(f_hat, target)
                if module.training:
                    hits.append(count_codes(indices.flatten().unsqueeze(0), module.vocab_size)[0].float())
            if hits:
                self._count(torch.stack(hits))
            out = estimate(f, f_hat)
        return out, self._usages(f) if ret_usages else None, loss / len(sizes)

    def f_to_idxBl_or_fhat(
        self, f_BChw: Tensor, to_fhat: bool, v_patch_nums: Sequence[int | tuple[int, int]] | None = None
    ) -> list[Tensor]:
        module: Any = self
        check_map(f_BChw, module.embedding.weight)
        sizes = [(n, n) if isinstance(n, int) else (n[0], n[1]) for n in v_patch_nums or module.v_patch_nums]
        _check_size(f_BChw, sizes[-1])
        rest = f_BChw.detach()
        f_hat, found = torch.zeros_like(rest), []
        for scale in range(len(sizes)):
            if 0 <= module.prog_si < scale:
                break
            indices = self._search(rest, sizes, scale)
            h = self._contribution(indices, sizes, scale)
            f_hat, rest = (f_hat + h).to(f_hat.dtype), (rest - h.detach()).to(rest.dtype)
            found.append(f_hat if to_fhat else indices.flatten(1))
        return found

    def _search(self, rest: Tensor, sizes: list[tuple[int, int]], scale: int) -> Tensor:
        """Nearest codes (B, h, w) of the residual, averaged down but at the last scale."""
        module: Any = self
        if scale < len(sizes) - 1:
            rest = F.interpolate(rest, size=sizes[scale], mode="area")
        metric = "cosine" if module.using_znorm else "l2"
        return nearest(rest.movedim(1, -1), module.embedding.weight, metric=metric)[0]

    def _contribution(self, indices: Tensor, sizes: list[tuple[int, int]], scale: int) -> Tensor:
        """What the codes (B, h, w) of a scale add to the feature map."""
        module: Any = self
        h = lookup(module.embedding.weight, indices).movedim(-1, 1)
        if scale < len(sizes) - 1:
            h = F.interpolate(h, size=sizes[-1], mode="bicubic")
        out: Tensor = module.quant_resi[scale / max(1, len(sizes) - 1)](h.contiguous())
        return out

    # It counts in a Python number, which a graph would be compiled for anew in every step.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _count(self, hits: Tensor) -> None:
        """The original's moving averages of how often each scale (S, K) chose each code; one all-reduce for all."""
        module: Any = self
        group = dist.is_available() and dist.is_initialized()
        if group:
            # The repository's own flag says whether it counts.
            original: Any = self.original_of(type(self))
            theirs = getattr(original.forward.__globals__.get("dist"), "initialized", None)
            if theirs is not None and not theirs():
                return
            dist.all_reduce(hits)
        for scale, hit in enumerate(hits):
            average = module.ema_vocab_hit_SV[scale]
            if module.record_hit == 0:
                average.copy_(hit)
            else:
                average.lerp_(hit, 0.1 if module.record_hit < 100 else 0.01)
            module.record_hit += 1

    def _usages(self, f: Tensor) -> list[float]:
        """Per scale, the percentage of codes that were hit at least 8 % as often as on average."""
        module: Any = self
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        least = processes * (f.numel() / f.shape[1]) / module.vocab_size * 0.08
        return [100 * share for share in (module.ema_vocab_hit_SV >= least).float().mean(1).tolist()]


def _check_size(f: Tensor, size: tuple[int, int]) -> None:
    if tuple(f.shape[2:]) != size:
        raise ValueError(
            f"the feature map is {f.shape[2]} x {f.shape[3]}; expected the last scale, {size[0]} x {size[1]}"
        )


ADAPTERS = (VarQuantizer,)
