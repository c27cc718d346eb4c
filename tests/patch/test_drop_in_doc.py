"""What docs/drop-in.md says is so: its examples, its options, its limits."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
import vector_quantize_pytorch as library
from diffusers.models.autoencoders.vq_model import VectorQuantizer
from torch.utils.checkpoint import checkpoint

import vqkernels

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "drop-in.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(2))
def test_example_runs(number: int) -> None:
    assert len(EXAMPLES) == 2
    exec(EXAMPLES[number], {})


def options_of(*names: str) -> set[str]:
    """Parameters of the constructors and of ``forward``, but for those of every module."""
    found: set[str] = set()
    for name in names:
        for method in ("__init__", "forward"):
            found |= set(inspect.signature(getattr(getattr(library, name), method)).parameters)
    return found - {"self", "x", "args", "kwargs", "vq_kwargs", "dim", "codebook_size"}


@pytest.mark.parametrize(
    ("document", "names"),
    [
        (DOCUMENT, ("VectorQuantize", "ResidualVQ", "GroupedResidualVQ", "SimVQ", "HierarchicalVQ")),
        (
            DOCUMENT.with_name("quantizers.md"),
            (
                "VectorQuantize",
                "ResidualVQ",
                "GroupedResidualVQ",
                "SimVQ",
                "HierarchicalVQ",
                "RandomProjectionQuantizer",
                "FSQ",
                "LFQ",
            ),
        ),
    ],
    ids=["patch", "modules"],
)
def test_every_option_of_the_library_has_a_row(document: Path, names: tuple[str, ...]) -> None:
    text = document.read_text()
    assert not sorted(name for name in options_of(*names) if not re.search(rf"\b{name}\b", text))


def test_what_a_patched_model_cannot_do() -> None:
    vq = VectorQuantizer(16, 4, beta=0.25, legacy=False)
    calls: list[torch.nn.Module] = []
    for module in (vq, vq.embedding):
        module.register_forward_hook(lambda module, *_: calls.append(module))
    vqkernels.patch(torch.nn.Sequential(vq))
    z = torch.randn(2, 4, 3, 3)
    calls.clear()
    want = vq(z)[0]
    assert calls == [vq]
    assert torch.equal(torch.func.functional_call(vq, dict(vq.named_parameters()), (z,))[0], want)
    assert torch.equal(checkpoint(vq, z, use_reentrant=False)[0], want)
