"""What a search and a training step add to the peak of resident memory, measured in a process of their own (Linux)."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vqkernels import _native

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc (Linux)"
)
needs_native = pytest.mark.skipif(_native.unavailable() is not None, reason="the reference needs minutes at this size")

# VmHWM, not ru_maxrss: a child starts with the ru_maxrss of its parent, and the parent is a test suite.
SETUP = """
import json, re, sys
from pathlib import Path
import torch, vqkernels

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024

def added(work):
    "MB by which work() raises the peak, results included."
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = work()
    return status("VmHWM") - before

torch.manual_seed(0)
found = {}
"""

SEARCH = """
for metric in ("l2", "cosine", "dot"):
    vqkernels.nearest(torch.randn(8, 8), torch.randn(8, 8), metric=metric)
x, codebook = torch.randn(65536, 8), torch.randn(16384, 8)
for metric in ("l2", "cosine", "dot"):
    found[metric] = added(lambda: vqkernels.nearest(x, codebook, metric=metric))
half = x.bfloat16()
found["bfloat16"] = added(lambda: vqkernels.nearest(half, codebook))
maps = torch.randn(16, 8, 64, 64)
found["channel-first map"] = added(lambda: vqkernels.nearest(maps.permute(0, 2, 3, 1), codebook))
heads, codebooks = torch.randn(4, 16384, 8), torch.randn(4, 4096, 8)
found["heads"] = added(lambda: vqkernels.nearest(heads, codebooks))
same = torch.zeros(16384, 8)
found["equal codes"] = added(lambda: vqkernels.nearest(x, same))
grid, ties = torch.randint(-1, 2, (2000, 8)) / 2, torch.randint(-1, 2, (16384, 8)).float()
found["ties"] = added(lambda: vqkernels.nearest(grid, ties))
found["N x K in float32"] = added(lambda: x[:8192] @ codebook[:8192].T)
"""

REFERENCE = """
vqkernels.nearest(torch.randn(8, 8), torch.randn(8, 8), backend="reference")
x, codebook = torch.randn(8192, 8), torch.randn(8192, 8)
for metric in ("l2", "cosine", "dot"):
    found[metric] = added(lambda: vqkernels.nearest(x, codebook, metric=metric, backend="reference"))
x, same = torch.randn(2000, 8), torch.zeros(8192, 8)
found["equal codes"] = added(lambda: vqkernels.nearest(x, same, backend="reference"))
"""

TRAIN = """
def step(vq, z, optimizer):
    out = vq(z)
    (out.quantized.square().mean() + out.loss).backward()
    optimizer.step()
    return out

for name, options in {
    "gradient": {}, "EMA": {"decay": 0.99}, "EMA, cosine": {"decay": 0.99, "metric": "cosine"},
    "rotation": {"gradient": "rotation"}, "EMA, dead codes": {"decay": 0.99, "dead_code_ratio": 0.1},
}.items():
    for n, k in ((2, 8), (16, 16384)):
        z = torch.randn(n, 8, 64, 64, requires_grad=True)
        z.grad = torch.zeros_like(z)
        vq = vqkernels.VectorQuantizer(k, 8, **options)
        for parameter in vq.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.SGD([z, *vq.parameters()], lr=0.1)
        found[name] = added(lambda: step(vq, z, optimizer))
"""


FAMILY = """
from vqkernels import nn as vnn

def step(vq, z):
    out = vq(z)
    (out.quantized.square().mean() + out.loss).backward()
    return out

def sizes(make, shape):
    for n in (1, shape[0]):
        z = torch.randn(n, *shape[1:], requires_grad=True)
        z.grad = torch.zeros_like(z)
        vq = make()
        for parameter in vq.parameters():
            parameter.grad = torch.zeros_like(parameter)
        size = added(lambda: step(vq, z))
    return size

found["residual"] = sizes(lambda: vnn.ResidualVectorQuantizer(16384, 8, 2, decay=0.9), (4, 8, 4096))
found["SimVQ"] = sizes(lambda: vnn.SimVQ(16384, 8), (4, 8, 4096))
found["multi-scale"] = sizes(lambda: vnn.MultiScaleVectorQuantizer(16384, 8, [1, 64]), (4, 8, 64, 64))
found["LFQ"] = sizes(lambda: vnn.LFQ(14, groups=1), (4, 14, 4096))
found["orthogonality"] = sizes(lambda: vqkernels.VectorQuantizer(16384, 8, orthogonal_weight=1.0), (4, 8, 4096))
found["entropies"] = sizes(lambda: vqkernels.VectorQuantizer(16384, 8, batch_entropy_weight=1.0), (4, 8, 256))
found["sampling"] = sizes(lambda: vqkernels.VectorQuantizer(16384, 8, sample_temperature=1.0), (4, 8, 256))
"""


@functools.cache
def measured(script: str) -> dict[str, float]:
    """MB by name. Freed memory goes back at once, so that it cannot hide a later allocation."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", SETUP + script + "print(json.dumps(found))"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    sizes: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return sizes


@needs_native
@pytest.mark.parametrize(
    "name", ["l2", "cosine", "dot", "bfloat16", "channel-first map", "heads", "equal codes", "ties"]
)
def test_a_search_of_65536_rows_and_16384_codes_adds_less_than_64_mb(name: str) -> None:
    assert measured(SEARCH)[name] < 64


@needs_native
def test_a_matrix_of_scores_would_be_seen() -> None:
    assert measured(SEARCH)["N x K in float32"] >= 256


@pytest.mark.parametrize("name", ["l2", "cosine", "dot", "equal codes"])
def test_the_reference_adds_less_than_100_mb(name: str) -> None:
    """8192 x 8192: scores in float64 would be 512 MB."""
    assert measured(REFERENCE)[name] < 100


@needs_native
@pytest.mark.parametrize("name", ["gradient", "EMA", "EMA, cosine", "rotation", "EMA, dead codes"])
def test_a_training_step_of_65536_rows_and_16384_codes_adds_less_than_200_mb(name: str) -> None:
    assert measured(TRAIN)[name] < 200


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("name", ["residual", "SimVQ", "multi-scale", "LFQ", "orthogonality", "entropies", "sampling"])
def test_a_step_of_the_family_with_16384_codes_adds_less_than_160_mb(name: str) -> None:
    """16384 rows: an N x K or K x K matrix in float32 would be 1 GB (64 MB for the 1024 rows of the last two)."""
    assert measured(FAMILY)[name] < (60 if name in ("entropies", "sampling") else 160)
