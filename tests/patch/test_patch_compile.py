"""``torch.compile`` after patching: one class of each family, two training steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from pairs import close, pair, run, same_buffers, tensors
from table import ROWS, batch, build, group_for

pytestmark = pytest.mark.slow

# The others hold the same ops around code of their own (VAR's bicubic upsampling alone compiles for half a minute).
INDUCTOR = ("vector_quantize_pytorch", "transformers_audio", "taming", "codecs")


@pytest.fixture(params=[name for name, row in ROWS.items() if row.speaks])
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    with group_for(request.param):
        yield str(request.param)


def test_compiled_equals_eager(name: str) -> None:
    row = ROWS[name]
    _, patched = pair(build(name).train())
    twin = copy.deepcopy(patched)
    torch._dynamo.reset()
    compiled = torch.compile(row.call, backend="inductor" if row.family in INDUCTOR else "aot_eager")
    for step in range(2):
        (expected, expected_grads), (out, grads) = (
            run(module, call, batch(name, step), True) for module, call in ((patched, row.call), (twin, compiled))
        )
        for a, b in zip([*tensors(expected), *expected_grads], [*tensors(out), *grads], strict=True):
            close(a, b)
        same_buffers(patched, twin)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
