"""The quantizer family under torch.compile: one graph, no recompiles over N, the numbers of eager."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vqkernels.nn import ResidualVectorQuantizer

D = 6
MODULES: dict[str, Any] = {
    "residual": lambda: ResidualVectorQuantizer(16, D, 3, init="normal"),
    "residual ema": lambda: ResidualVectorQuantizer(16, D, 3, decay=0.9, dead_code_ratio=0.3, init="normal"),
    "residual rotation": lambda: ResidualVectorQuantizer(16, D, 3, gradient="rotation", init="normal"),
    "residual shared": lambda: ResidualVectorQuantizer(16, D, 3, decay=0.9, shared_codebook=True, init="normal"),
    "residual dropout": lambda: ResidualVectorQuantizer(16, D, 3, decay=0.9, dropout="batch", init="normal"),
    "residual per level": lambda: ResidualVectorQuantizer(16, D, 2, level_dim=3, dropout="sample", init="normal"),
}


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(module: nn.Module, call: Any, sizes: list[int], shape: tuple[int, ...]) -> list[Tensor]:
    found = []
    for n in sizes:
        torch.manual_seed(n)
        z = torch.randn(n, *shape, requires_grad=True)
        out = call(z)
        module.zero_grad()
        (out.loss + out.quantized.sin().sum()).backward()
        found += [*(t.detach() for t in out if isinstance(t, Tensor)), z.grad]
        found += [p.grad.clone() for p in module.parameters() if p.grad is not None]
    return found


@pytest.mark.parametrize("name", MODULES)
def test_one_graph_without_recompiles_over_n(name: str) -> None:
    torch.manual_seed(0)
    module = MODULES[name]()
    shape = (D, 5) if name.startswith("residual") else (D, 4, 4)
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager", dynamic=True)
    got = run(twin, compiled, [3], shape)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got += run(twin, compiled, [5, 4, 7], shape)
    want = run(module, module, [3, 5, 4, 7], shape)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(twin.state_dict().values(), module.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
