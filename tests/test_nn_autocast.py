"""Autocast around quantizers: what they switch off stays off, also compiled, and meta tensors know no autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_nn_without_values import MAKERS, described

from vqkernels import _arguments as arguments

NAMES = ("orthogonal", "multi scale", "sim", "random projection", "lfq", "projected")


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_with_the_numbers_of_eager(name: str) -> None:
    make, shape = MAKERS[name]
    torch.manual_seed(0)
    module, z = make().eval(), torch.randn(shape)
    torch._dynamo.reset()

    def run(z: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(z)

    want, got = run(z), torch.compile(run, fullgraph=True, backend="aot_eager")(z)
    assert described(got) == described(want)
    for a, b in zip(*(torch.utils._pytree.tree_leaves(t) for t in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_blocks_and_what_autocast_would_do() -> None:
    x = torch.ones(2, 2)
    assert arguments.autocast_dtype(x) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert arguments.autocast_dtype(x) == (x @ x).dtype == torch.bfloat16
        assert arguments.autocast_dtype(x.to("meta")) is None
        with arguments.without_autocast(x):
            assert (x @ x).dtype == torch.float32
        with arguments.without_autocast(x.to("meta")):
            assert (x.to("meta") @ x.to("meta")).dtype == torch.float32
