"""Smaller files of a trained model: weights in 16 bits, codebooks in 8.

Called by :mod:`vqkernels.models.pretrained`, and by anyone who stores a codebook. What is stored is what is searched:
indices are exact with respect to the codes that the file holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vqkernels._arguments import check_choice, check_codebook
from vqkernels.functional import nearest
from vqkernels.nn import checkpoints

__all__ = ["CODEBOOKS", "WEIGHTS", "Int8Codebook", "compress", "expand"]

WEIGHTS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CODEBOOKS = ("fp32", "int8")
_STATISTICS = ("cluster_size", "embed_avg", "code_counts", "steps")


@dataclass(frozen=True)
class Int8Codebook:
    """A codebook of 8-bit integers with one float32 scale per code: a quarter of the bytes.

    Guarantee: :meth:`nearest` is exact, as :func:`vqkernels.nearest` is, with respect to :meth:`dequantize`, whose
    values are one float32 product each and so the same bits on every machine. With respect to the original codes it is
    not exact: each of their values has moved by at most half a scale, 1/254 of the largest value of its code.

    Args:
        values: int8 (K, D) or (H, K, D).
        scale: float32 (K, 1) or (H, K, 1).

    Example:
        >>> import torch
        >>> codes = Int8Codebook.quantize(torch.tensor([[1.0, -0.5], [0.0, 2.54]]))
        >>> codes.values.tolist(), codes.nearest(torch.tensor([[0.9, -0.4]]))[0].tolist()
        ([[127, -64], [0, 127]], [0])
    """

    values: Tensor
    scale: Tensor

    @classmethod
    def quantize(cls, codebook: Tensor) -> Int8Codebook:
        """Round every code to 255 steps of its largest value.

        Raises:
            ValueError, TypeError: ``codebook`` is none, or has values that are not finite.
        """
        check_codebook(codebook)
        codes = codebook.detach().float()
        if not bool(codes.isfinite().all()):
            raise ValueError("codebook has values that are not finite; expected finite ones")
        largest = codes.abs().amax(-1, keepdim=True)
        # Below the smallest normal float a scale would lose its digits, or become 0.
        scale = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return cls((codes / scale).round().clamp(-127, 127).to(torch.int8), scale)

    def dequantize(self) -> Tensor:
        """The float32 codes, of the shape of ``values``."""
        return self.values.to(torch.float32) * self.scale

    def nearest(self, x: Tensor, *, metric: str = "l2") -> tuple[Tensor, Tensor]:
        """:func:`vqkernels.nearest` among the dequantized codes."""
        return nearest(x, self.dequantize(), metric=metric)

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scale.nbytes


def compress(tensors: Mapping[str, Tensor], weights: str = "fp32", codebook: str = "fp32") -> dict[str, Tensor]:
    """A ``state_dict`` in fewer bytes, for using a model, not for training it further: statistics are left out.

    Args:
        tensors: name to tensor; codebooks are named ``codebook``.
        weights: "fp32", "fp16" or "bf16", for all floating tensors but codebooks.
        codebook: "fp32" or "int8".

    Returns:
        Name to tensor; an int8 codebook becomes ``codebook.int8`` and ``codebook.scale``.

    Raises:
        ValueError: a word is none of these, or a weight does not fit into fp16.
    """
    check_choice("weights", weights, tuple(WEIGHTS))
    check_choice("codebook", codebook, CODEBOOKS)
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        last = name.rpartition(".")[2]
        if last in _STATISTICS:
            continue
        if last == "codebook":
            if codebook == "int8":
                small = Int8Codebook.quantize(value)
                out |= {f"{name}.int8": small.values, f"{name}.scale": small.scale}
            else:
                out[name] = value
        elif value.is_floating_point():
            out[name] = value.to(WEIGHTS[weights])
            if not bool(out[name].isfinite().all()) and bool(value.isfinite().all()):
                raise ValueError(f"weights is {weights!r}, but {name} has values beyond its range; use 'bf16'")
        else:
            out[name] = value
    return out


def expand(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What :func:`compress` left, in the dtypes and with the names that a model expects.

    Args:
        tensors: name to tensor.
        expected: the model's ``state_dict``.

    Returns:
        Name to tensor; statistics are those of a codebook all of whose codes were used once.
    """
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith(".codebook.int8") and (scale := tensors.get(name[:-4] + "scale")) is not None:
            out[name[:-5]] = Int8Codebook(value, scale).dequantize()
        elif not name.endswith(".codebook.scale"):
            out[name] = value.to(expected[name].dtype) if name in expected and value.is_floating_point() else value
    for name in [n for n in out if n.rpartition(".")[2] == "codebook"]:
        prefix = name.removesuffix("codebook")
        statistics = {prefix + k: v for k, v in checkpoints.defaults(out[name], None).items()}
        statistics |= {prefix + k: expected[prefix + k] * 0 for k in ("code_counts", "steps") if prefix + k in expected}
        out |= {k: v for k, v in statistics.items() if k in expected and k not in out}
    return out
