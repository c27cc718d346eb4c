"""``torch.export`` without our ops, ONNX, and ``torch.jit.trace`` of quantizers in eval mode and a patched model."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_nn_without_values import MAKERS, tensors
from torch import Tensor, nn

import vqkernels
from vqkernels.export import decompositions

sys.path.insert(0, str(Path(__file__).resolve().parent / "patch"))

from whole_models import make

NAMES = ["gradient", "projected", "residual", "random projection", "fsq"]
BATCH = torch.export.Dim("batch", min=1, max=64)


class Sample(nn.Module):
    """The part of a diffusers model's output that is a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        sample: Tensor = self.model(x).sample
        return sample


def case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model in eval mode, an input, and another one with a batch of another size."""
    torch.manual_seed(0)
    if name == "patched VQModel":
        model, x = make("diffusers VQModel")
        assert vqkernels.patch(model, strict=True).replaced
        return Sample(model), x, torch.rand(3, *x.shape[1:]) * 2 - 1
    made, shape = MAKERS[name]
    return made().eval(), torch.randn(shape), torch.randn(3, *shape[1:])


def exported(name: str, model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    """Without ops of ours; the batch may have any size, which a model of diffusers does not take."""
    shapes = None if name.startswith("patched") else ({0: BATCH},)
    return torch.export.export(model, (x,), dynamic_shapes=shapes).run_decompositions(decompositions())


def assert_same(got: Any, want: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for a, b in zip(tensors(got), tensors(want), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("name", "grads"), [*((name, False) for name in NAMES), ("patched VQModel", True)])
def test_decomposed_programs_hold_no_op_of_ours_and_give_the_same(name: str, grads: bool) -> None:
    model, x, other = case(name)
    with torch.set_grad_enabled(grads):
        program = exported(name, model, x)
        assert not [node for node in program.graph.nodes if "vqkernels" in str(node.target)]
        for z in (x,) if name.startswith("patched") else (x, other):
            assert_same(program.module()(z), model(z))


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_the_decomposed_search_treats_odd_rows_and_codes_alike(metric: str) -> None:
    x, codes = torch.randn(2, 3, 5, 4), torch.randn(2, 7, 4)
    x[0, 0, 0, 0], codes[1, 3] = torch.nan, 0.0
    search = decompositions()[vqkernels.ops.nearest]
    for a, b in zip(search(x, codes, metric), vqkernels.ops.nearest(x, codes, metric), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    ties = torch.zeros(1, 1, 2, 4), torch.ones(1, 3, 4)
    assert search(*ties, metric)[0].tolist() == [[[0, 0]]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gradient", "residual", "patched VQModel"])
def test_onnx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x, other = case(name)
    with torch.no_grad():
        program = exported(name, model, x)
        other = x if name.startswith("patched") else other
        torch.onnx.export(program, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
        session = runtime.InferenceSession(tmp_path / "model.onnx")
        (given,) = session.get_inputs()
        found = [torch.from_numpy(t) for t in session.run(None, {given.name: other.numpy()})]
        assert_same(found, model(other), 1e-4, 1e-4)  # its convolutions sum in another order


@pytest.mark.parametrize("name", [*NAMES, "patched VQModel"])
def test_a_trace_is_saved_loaded_and_takes_another_batch(name: str) -> None:
    model, x, other = case(name)
    with torch.no_grad():
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(model, (x,)), file)
        file.seek(0)
        loaded = torch.jit.load(file)
        for z in (x, other):
            assert_same(loaded(z), model(z))


def test_a_trace_with_gradients_is_refused_by_torch() -> None:
    vq, x, _ = case("gradient")
    with pytest.raises(RuntimeError, match="Could not export Python function call '_Quantize'"):
        torch.jit.save(torch.jit.trace(vq, (x,), check_trace=False), io.BytesIO())
