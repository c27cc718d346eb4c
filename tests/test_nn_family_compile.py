"""The quantizer family under torch.compile: one graph, no recompiles over N, the numbers of eager."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vqkernels.nn import FSQ, LFQ, MultiScaleVectorQuantizer, ResidualVectorQuantizer, SimVQ, VectorQuantizer

D = 6
MODULES: dict[str, Any] = {
    "residual": lambda: ResidualVectorQuantizer(16, D, 2, init="normal", gradient="rotation"),
    "residual shared": lambda: ResidualVectorQuantizer(16, D, 2, decay=0.9, shared_codebook=True, init="normal"),
    "residual dropout": lambda: ResidualVectorQuantizer(
        16, D, 2, decay=0.9, dead_code_ratio=0.3, dropout="batch", init="normal"
    ),
    "residual chained": lambda: ResidualVectorQuantizer(16, D, 2, level_dim=3, dropout="sample", init="normal"),
    "multi-scale": lambda: MultiScaleVectorQuantizer(16, D, [1, 3, 4], init="normal"),
    "simvq": lambda: SimVQ(16, D),
    "fsq": lambda: FSQ([5] * D),
    "lfq": lambda: LFQ(D),
    "entropies": lambda: VectorQuantizer(
        16, D, init="normal", sample_entropy_weight=0.2, batch_entropy_weight=0.3, entropy_temperature=0.5
    ),
    "softmax": lambda: VectorQuantizer(16, D, init="normal", gradient="softmax", metric="dot"),
    "softmax of angles": lambda: VectorQuantizer(
        16,
        D // 2,
        init="normal",
        gradient="softmax",
        metric="cosine",
        normalize=False,
        heads=2,
        batch_entropy_weight=0.1,
    ),
    "affine": lambda: VectorQuantizer(16, D, decay=0.9, affine=True, input_dim=D, init="normal"),
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
        results = [t for item in out for t in (item if isinstance(item, tuple) else (item,))]
        found += [*(t.detach() for t in results), z.grad]
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
        got += run(twin, compiled, [5, 4], shape)
    want = run(module, module, [3, 5, 4], shape)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(twin.state_dict().values(), module.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
