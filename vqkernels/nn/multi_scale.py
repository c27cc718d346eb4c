"""``MultiScaleVectorQuantizer``: one feature map as index maps of growing size, each on what the coarser ones left.

Called by users. Tian et al. 2024, "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale
Prediction", algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqkernels import _arguments as arguments
from vqkernels import ops
from vqkernels.functional import lookup_rows
from vqkernels.nn import checkpoints, statistics
from vqkernels.nn._distributed import all_reduce
from vqkernels.nn.codebook_init import random_codes_
from vqkernels.nn.estimators import estimate
from vqkernels.nn.learning import in_backward
from vqkernels.nn.phi import PhiPerScale

__all__ = ["MultiScaleOutput", "MultiScaleVectorQuantizer"]


class MultiScaleOutput(NamedTuple):
    """What :class:`MultiScaleVectorQuantizer` returns.

    Attributes:
        quantized: (B, C, H, W), the sum over scales, dtype of the input, with the straight-through gradient.
        indices: int64 (B, h, w) for each scale.
        loss: mean over scales of ``codebook_loss + beta * commitment_loss``.
        codebook_loss: (S,), mean |sg(f) - f_hat|^2 after each scale.
        commitment_loss: (S,), mean |f - sg(f_hat)|^2 after each scale.
    """

    quantized: Tensor
    indices: tuple[Tensor, ...]
    loss: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


class MultiScaleVectorQuantizer(nn.Module):
    """Per scale: average the residual down, search, look up, upsample bicubically, smooth by phi, subtract.

    One codebook serves all scales; it and the convolutions learn from the codebook loss after each scale. Arithmetic
    is float32 whatever autocast says. Runs with and without ``torch.distributed``.

    Args:
        num_embeddings: number of codes K.
        embedding_dim: channels C.
        sizes: of the index maps, coarse to fine, numbers or (h, w) pairs; the last is the size of the feature map.
        commitment_cost: weight beta of the commitment loss.
        metric: ``"l2"``, or ``"cosine"`` to compare by angle and output the raw codes (VAR's ``using_znorm``).
        phi_ratio: share of the convolution in phi; 0 for none.
        phi_shared: convolutions for all scales together; 0 for one per scale.
        init: of the codes, ``"uniform"`` U(-1/K, 1/K) or ``"normal"``.
        sync: count the codes of all processes, by one all-reduce per training step.
        device: of the parameters and buffers.

    State: ``codebook`` (K, C), ``quant_resi.qresi_ls.{i}.weight`` and ``.bias``, ``code_counts`` int64 (S, K). VAR's
    ``embedding.weight`` loads; its ``ema_vocab_hit_SV`` is left out.

    Example:
        >>> import torch, vqkernels
        >>> vq = vqkernels.nn.MultiScaleVectorQuantizer(64, 8, [1, 2, 4])
        >>> out = vq(torch.randn(2, 8, 4, 4))
        >>> [tuple(i.shape) for i in out.indices], vq.next_scale_inputs(out.indices).shape
        ([(2, 1, 1), (2, 2, 2), (2, 4, 4)], torch.Size([2, 20, 8]))
    """

    code_counts: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        sizes: Sequence[int | tuple[int, int]],
        *,
        commitment_cost: float = 0.25,
        metric: str = "l2",
        phi_ratio: float = 0.5,
        phi_shared: int = 4,
        init: str = "uniform",
        sync: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        arguments.check_count("num_embeddings", num_embeddings)
        arguments.check_count("embedding_dim", embedding_dim)
        arguments.check_number("commitment_cost", commitment_cost)
        arguments.check_number("phi_ratio", phi_ratio, high=1.0)
        arguments.check_choice("metric", metric, ("l2", "cosine"))
        arguments.check_choice("init", init, ("uniform", "normal"))
        if not sizes:
            raise ValueError("sizes is empty; expected the sizes of the index maps, coarse to fine")
        pairs = [(s, s) if isinstance(s, int) else tuple(s) if isinstance(s, Sequence) else () for s in sizes]
        for given, pair in zip(sizes, pairs, strict=True):
            if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) for n in pair):
                raise TypeError(f"sizes has {given!r}; expected integers or (h, w) pairs of them")
        self.sizes = tuple((h, w) for h, w in pairs)
        for size in self.sizes:
            arguments.check_count("sizes", min(size))
            if any(a > b for a, b in zip(size, self.sizes[-1], strict=True)):
                raise ValueError(f"sizes has {size}; expected none larger than the last, {self.sizes[-1]}")
        if isinstance(phi_shared, bool) or not isinstance(phi_shared, int) or phi_shared < 0:
            raise ValueError(f"phi_shared is {phi_shared!r}; expected a number of convolutions, or 0 for one per scale")
        self.num_embeddings, self.embedding_dim, self.metric = num_embeddings, embedding_dim, metric
        self.commitment_cost, self.sync = commitment_cost, sync
        self.init = init
        self.codebook = nn.Parameter(torch.empty((num_embeddings, embedding_dim), device=device))
        random_codes_(self.codebook, init)
        self.quant_resi = PhiPerScale(embedding_dim, len(self.sizes), ratio=phi_ratio, shared=phi_shared, device=device)
        counts = torch.zeros((len(self.sizes), num_embeddings), dtype=torch.int64, device=device)
        self.register_buffer("code_counts", counts)

    def reset_parameters(self) -> None:
        """Draw the codes anew and forget the counts, as after ``to_empty``; the convolutions have their own method."""
        random_codes_(self.codebook, self.init)
        self.reset_usage()

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{self.num_embeddings}, {self.embedding_dim}, sizes={list(self.sizes)}"

    # -- encoding ------------------------------------------------------------------------------------------------------

    def forward(self, f: Tensor) -> MultiScaleOutput:
        """Quantize a feature map (B, C, H, W).

        Raises:
            ValueError, TypeError: shape, dtype or device do not fit.
        """
        self._check(f)
        wide = f if f.dtype == torch.float64 else f.float()
        target = wide.detach()
        f_hat, indices, codebook_losses, commitment_losses = torch.zeros_like(target), [], [], []
        for scale in range(len(self.sizes)):
            index = self._search(target - f_hat.detach(), scale)
            f_hat = f_hat + self._contribution(index, scale)
            codebook_losses.append(F.mse_loss(f_hat, target))
            commitment_losses.append(F.mse_loss(wide, f_hat.detach()))
            indices.append(index)
        if self.training and not in_backward():
            found = [statistics.count_codes(i.flatten().unsqueeze(0), self.num_embeddings)[0] for i in indices]
            self.code_counts.add_(all_reduce([torch.stack(found)], self.sync)[0])
        codebook_loss, commitment_loss = torch.stack(codebook_losses), torch.stack(commitment_losses)
        loss = (codebook_loss + self.commitment_cost * commitment_loss).mean()
        if f.shape[0] == 0:  # means of nothing
            loss, codebook_loss, commitment_loss = (t.nan_to_num(0.0) for t in (loss, codebook_loss, commitment_loss))
        return MultiScaleOutput(estimate(wide, f_hat).to(f.dtype), tuple(indices), loss, codebook_loss, commitment_loss)

    @torch.no_grad()
    def f_to_indices(self, f: Tensor) -> tuple[Tensor, ...]:
        """The index maps (B, h, w) of a feature map, without losses or statistics.

        Raises:
            ValueError, TypeError: shape, dtype or device do not fit.
        """
        self._check(f)
        rest = f.clone() if f.dtype == torch.float64 else f.float()
        found = []
        for scale in range(len(self.sizes)):
            found.append(self._search(rest, scale))
            rest = rest - self._contribution(found[-1], scale)
        return tuple(found)

    def _check(self, f: Tensor) -> None:
        arguments.check_float_tensor("f", f)
        if f.dim() != 4 or tuple(f.shape[1:]) != (self.embedding_dim, *self.sizes[-1]):
            height, width = self.sizes[-1]
            raise ValueError(
                f"f has shape {arguments.shape_of(f)}; expected (B, {self.embedding_dim}, {height}, {width})"
            )
        if f.device != self.codebook.device:
            raise ValueError(f"f is on {f.device}, the codebook on {self.codebook.device}; expected one device")

    def _search(self, rest: Tensor, scale: int) -> Tensor:
        """Nearest codes (B, h, w) of the residual at one scale."""
        if scale < len(self.sizes) - 1:
            rest = F.interpolate(rest, size=self.sizes[scale], mode="area")
        rows = rest.flatten(2).transpose(1, 2).unsqueeze(0)
        indices, _ = ops.nearest(rows, self.codebook.detach().unsqueeze(0), self.metric)
        return torch.unflatten(indices[0], 1, self.sizes[scale])

    # -- decoding ------------------------------------------------------------------------------------------------------

    def _contribution(self, index: Tensor, scale: int) -> Tensor:
        """What the codes (B, h, w) of one scale add to the feature map, (B, C, H, W)."""
        values = lookup_rows(self.codebook.unsqueeze(0), index.flatten(1).unsqueeze(0), True)[0]
        h = torch.unflatten(values.transpose(1, 2), 2, self.sizes[scale])
        if scale < len(self.sizes) - 1:
            h = F.interpolate(h, size=self.sizes[-1], mode="bicubic")
        out: Tensor = self.quant_resi(h, scale)
        return out

    def indices_to_f(self, indices: Sequence[Tensor]) -> Tensor:
        """The feature map (B, C, H, W) of the index maps of the first scales; all of them give the whole.

        Args:
            indices: integers (B, h, w) or (B, h * w) per scale.

        Raises:
            ValueError, TypeError: number, shape or dtype do not fit.
        """
        return self.cumulative_f(indices)[-1]

    def cumulative_f(self, indices: Sequence[Tensor]) -> list[Tensor]:
        """The feature map after each scale."""
        maps = self._maps(indices)
        found = [self._contribution(maps[0], 0)]
        for scale in range(1, len(maps)):
            found.append(found[-1] + self._contribution(maps[scale], scale))
        return found

    def next_scale_inputs(self, indices: Sequence[Tensor]) -> Tensor:
        """What a next-scale predictor reads while it is taught: the map so far, averaged down to each next scale.

        Args:
            indices: integers (B, h, w) or (B, h * w) of all scales; the last one is not needed.

        Returns:
            (B, L, C), L = positions of scales 2 to S together (VAR's ``idxBl_to_var_input``).

        Raises:
            ValueError, TypeError: number, shape or dtype do not fit, or there is one scale only.
        """
        scales = len(self.sizes)
        if scales == 1 or len(indices) < scales - 1:
            raise ValueError(f"indices has {len(indices)} scales; expected at least {max(scales - 1, 1)} of {scales}")
        maps = self.cumulative_f(indices[: scales - 1])
        parts = [F.interpolate(f, size=size, mode="area") for f, size in zip(maps, self.sizes[1:], strict=True)]
        return torch.cat([part.flatten(2).transpose(1, 2) for part in parts], dim=1)

    def _maps(self, indices: Sequence[Tensor]) -> list[Tensor]:
        """Checked index maps (B, h, w)."""
        if not 1 <= len(indices) <= len(self.sizes):
            raise ValueError(f"indices has {len(indices)} scales; expected 1 to {len(self.sizes)}")
        found = []
        for scale, index in enumerate(indices):
            arguments.check_indices(index)
            height, width = self.sizes[scale]
            flat = index.flatten(1) if index.dim() == 3 else index
            if flat.dim() != 2 or flat.shape[1] != height * width:
                raise ValueError(
                    f"indices[{scale}] has shape {arguments.shape_of(index)}; expected (B, {height}, {width})"
                )
            found.append(torch.unflatten(flat.long(), 1, (height, width)))
        return found

    # -- usage ---------------------------------------------------------------------------------------------------------

    def usage(self) -> list[float]:
        """Per scale, the fraction of codes used in training since :meth:`reset_usage`."""
        found: list[float] = statistics.usage(self.code_counts).tolist()
        return found

    def perplexity(self) -> list[float]:
        """Per scale, exp(entropy) of the codes used in training since :meth:`reset_usage`."""
        found: list[float] = statistics.perplexity(self.code_counts).tolist()
        return found

    def reset_usage(self) -> None:
        """Start counting anew."""
        self.code_counts.zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = {"embedding.weight": "codebook", "quant_resi.qresi.": "quant_resi.qresi_ls.0."}
        checkpoints.rename_parts(state_dict, prefix, names)
        for i in range(len(self.sizes)):  # VAR without sharing is a plain list
            checkpoints.rename_parts(state_dict, prefix, {f"quant_resi.{i}.": f"quant_resi.qresi_ls.{i}."})
        state_dict.pop(prefix + "ema_vocab_hit_SV", None)
        codes = state_dict.get(prefix + "codebook", self.code_counts)
        state_dict.setdefault(prefix + "code_counts", torch.zeros_like(self.code_counts, device=codes.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
