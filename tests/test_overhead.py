"""How many operators a call runs: each is a launch on a GPU, and most of the time of a call on few rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from on_device import DEVICE

import vqkernels
from vqkernels import dispatch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import overhead

NATIVE = DEVICE == "cpu" and dispatch.BACKENDS[0].probe("cpu") is None
pytestmark = pytest.mark.skipif(not NATIVE, reason="counts are those of the native backend on the CPU")

# Operators that compute, at most. To raise a number takes a reason.
MOST = {
    "op nearest": 1,
    "nearest": 1,
    "lookup": 1,
    "codebook_sum": 1,
    "vector_quantize": 3,
    "VectorQuantizer, inference": 3,
    "VectorQuantizer, eval": 3,
    "training step, gradient": 23,
    "training step, moving averages": 18,
    "training step, and dead codes": 48,
}


@pytest.mark.parametrize("name", MOST)
def test_a_call_runs_no_more_operators_than_it_did(name: str) -> None:
    found = overhead.count(overhead.calls(5, 3, codes=7)[name]).compute
    # tests/conftest.py fills every new tensor of ours with NaN.
    found = [operator for operator in found if not operator.startswith("aten.fill_")]
    assert len(found) <= MOST[name], found


def test_every_call_of_the_benchmark_is_counted() -> None:
    assert set(overhead.calls(2, 3, codes=5)) - set(MOST) == {"the search's C function"}


def test_operators_inside_of_our_ops_count() -> None:
    x, codebook = torch.randn(1, 1, 4, 3), torch.randn(1, 5, 3)
    indices, distance = vqkernels.ops.nearest(x, codebook)
    with overhead.Operators() as found:
        vqkernels.ops.quantize_output(x, codebook, indices, distance, False, False, "reference")
    assert found.every[0] == "vqkernels.quantize_output.default"
    assert "aten.sum.default" in found.compute
    assert "aten.empty.memory_format" in set(found.every) - set(found.compute)


def test_no_gradient_that_nobody_sent_is_made_of_zeros() -> None:
    z = torch.randn(5, 3, requires_grad=True)
    codebook = torch.randn(4, 3, requires_grad=True)
    out = vqkernels.vector_quantize(z, codebook)
    with overhead.Operators() as found:
        grad, of_codes = torch.autograd.grad(out.quantized.sum(), (z, codebook), retain_graph=True)
    assert grad.equal(torch.ones(5, 3))
    assert not of_codes.any()
    assert "vqkernels.codebook_sum.default" not in found.every
    grad, of_codes = torch.autograd.grad(out.codebook_loss, (z, codebook), retain_graph=True)
    assert not grad.any()
    assert of_codes.any()
    (grad,) = torch.autograd.grad(out.commitment_loss, z)
    torch.testing.assert_close(grad, 2 / 15 * (z - out.quantized).detach())


def test_the_benchmark_prints_a_line_per_call_and_a_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, record = Path(overhead.__file__).resolve().parent.parent, tmp_path / "overhead.json"
    arguments = ["--rows", "1", "--dim", "3", "--rounds", "1", "--against", str(root), "--json", str(record)]
    assert overhead.main(arguments) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[-4:] == ["operators", "1", "x", "3"]
    assert len(lines) == len(overhead.calls(1, 3))
    assert all(0.1 < float(line.split()[-1].rstrip("x")) < 10 for line in lines)
    found = json.loads(record.read_text())
    assert found["against"] == root.name
    assert [entry["call"] for entry in found["entries"]] == list(overhead.calls(1, 3))
    assert all(entry["microseconds"] > 0 for entry in found["entries"])


def test_another_version_must_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        overhead.main(["--against", str(tmp_path)])
    assert "expected a folder with the package `vqkernels` in it" in capsys.readouterr().err


def test_inference_gives_what_training_gives() -> None:
    # Without a gradient to prepare for, no autograd.Function is called: the same numbers must come out.
    vq: Any = vqkernels.VectorQuantizer(7, 3, channel_dim=-1).eval()
    z = torch.randn(5, 3)
    with torch.no_grad():
        plain = vq(z)
    for a, b in zip(plain, vq(z.clone().requires_grad_()), strict=True):
        assert a.equal(b)
        assert not a.requires_grad
