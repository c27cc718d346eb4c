"""A quantizer of an imaginary library, and its adapter: what the core of ``patch`` is tested on."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import vqkernels
from vqkernels.recognisers import Adapter


class Codebook(nn.Module):
    def __init__(self, size: int = 7, dim: int = 3) -> None:
        super().__init__()
        self.register_buffer("embed", torch.randn(size, dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.embed).argmin(-1)  # type: ignore[arg-type]


class ToyQuantizer(nn.Module):
    def __init__(self, codebook: Codebook | None = None) -> None:
        super().__init__()
        self.codebook = codebook or Codebook()

    def search(self, x: Tensor) -> Tensor:
        found: Tensor = self.codebook(x)
        return found

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        indices = self.search(x)
        return scale * self.codebook.embed[indices], indices  # type: ignore[index]


class CodebookAdapter(Adapter):
    targets = ("*.toys.Codebook",)

    def forward(self, x: Tensor) -> Any:
        return vqkernels.nearest(x, self.embed)[0]  # type: ignore[arg-type]


class ToyAdapter(Adapter):
    targets = ("*.toys.ToyQuantizer",)
    relies_on = ("search",)
    signatures: ClassVar = {"forward": ("x", "scale")}
    parts: ClassVar = {"codebook": CodebookAdapter}
    available_fixes: ClassVar = {"scale": "use the scale for nothing"}

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        indices = self.codebook(x)
        scale = 1.0 if "scale" in self.fixes else scale
        return scale * vqkernels.lookup(self.codebook.embed, indices), indices  # type: ignore[arg-type, union-attr]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.quantizer = ToyQuantizer()
        self.again = self.quantizer
        self.sharing = ToyQuantizer(self.quantizer.codebook)

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        out: Tensor = z + (self.quantizer(z)[0] - z).detach() + self.sharing(z)[0]
        return out
