"""Copies of repository classes that somebody extended: left alone, with the name of what was added."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from restated import Descript, EncodecCodebook, LlamaGen, MoshiCodebook, Taming1, Taming2, TamingEma, stands_for
from torch import Tensor, nn

import vqkernels

K, D = 12, 4


@stands_for("their.modules.vqvae.quantize.VectorQuantizer2")
class UnitTaming2(Taming2):
    """A copy with an option of its own."""

    def __init__(self) -> None:
        super().__init__(K, D, 0.25)
        self.unit_vectors = True

    def forward(self, z: Tensor, temp: Any = None, rescale_logits: bool = False, return_logits: bool = False) -> Any:
        if self.unit_vectors:
            z = nn.functional.normalize(z, dim=1)
        return Taming2.forward(self, z, temp, rescale_logits, return_logits)


@stands_for("their.quantization.core_vq.EuclideanCodebook")
class ScaledCodebook(EncodecCodebook):
    """A copy with a buffer of its own."""

    def __init__(self) -> None:
        super().__init__(D, K)
        self.register_buffer("scale", torch.ones(D))

    def quantize(self, x: Tensor) -> Tensor:
        return EncodecCodebook.quantize(self, x * self.scale)


@pytest.mark.parametrize(("make", "added"), [(UnitTaming2, "unit_vectors"), (ScaledCodebook, "scale")])
def test_a_copy_with_an_option_of_its_own_keeps_its_code(make: Any, added: str) -> None:
    module = make()
    report = vqkernels.patch(module)
    assert not report.replaced
    assert f"self.{added}" in report.skipped[0].reason
    assert type(module) is make
    with pytest.raises(ValueError, match=rf"self\.{added}"):
        vqkernels.patch(module, strict=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Taming2(K, D, 0.25),
        lambda: Taming1(K, D, 0.25),
        lambda: TamingEma(K, D, 0.25),
        lambda: LlamaGen(K, D, 0.25, 0.0, True, True),
        lambda: Descript(5, K, D),
        lambda: EncodecCodebook(D, K),
        lambda: MoshiCodebook(D, K),
    ],
)
def test_an_unchanged_copy_elsewhere_is_recognised(make: Any) -> None:
    module = make()
    last_two = ".".join(type(module).__module__.split(".")[-2:])
    elsewhere = type(type(module).__name__, type(module).__bases__, dict(vars(type(module))))
    elsewhere.__module__ = f"their_project.{last_two}"
    module.__class__ = elsewhere
    assert vqkernels.patch(module, strict=True).replaced
    vqkernels.unpatch(module)
    assert type(module) is elsewhere
