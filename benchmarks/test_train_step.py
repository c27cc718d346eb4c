"""pytest-benchmark statistics of a training step: ``python -m pytest benchmarks/test_train_step.py --benchmark-only``.

Forward, backward with a gradient from the decoder, codebook update. ``-k`` selects cases and contestants,
``VQKERNELS_BENCH_QUICK=1`` shrinks the cases.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from benchmarks import baselines, cases, memory, stages

QUICK = os.environ.get("VQKERNELS_BENCH_QUICK", "") not in ("", "0")


@pytest.mark.parametrize("peer", list(baselines.TRAIN))
@pytest.mark.parametrize("name", cases.TRAIN)
def test_train_step(benchmark: Any, name: str, peer: str) -> None:
    case = cases.shrink(cases.BY_NAME[name]) if QUICK else cases.BY_NAME[name]
    contestant = baselines.TRAIN[peer]
    if contestant.needs(case) > 0.6 * memory.available():
        pytest.skip("does not fit into memory")
    z, codebook = case.make()
    try:
        step = contestant.make(case, z, codebook)
    except baselines.Unavailable as e:
        pytest.skip(str(e))
    chosen, expected = stages.oracle(case, z, codebook)
    wrong = int((step()[chosen] != expected).sum())
    if peer.startswith("vqkernels"):
        assert wrong == 0
    benchmark.group = f"training step, {case.title}: {case.size}, {case.metric}"
    benchmark.extra_info["wrong_rows_percent"] = 100 * wrong / len(chosen)
    benchmark.pedantic(step, rounds=7, warmup_rounds=1)
