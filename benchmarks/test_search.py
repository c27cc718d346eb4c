"""pytest-benchmark statistics of the search: ``python -m pytest benchmarks/test_search.py --benchmark-only``.

Contestants run one after the other here; ratios are better read from ``benchmarks.run``, which lets them take turns.
``-k`` selects (``-k "llamagen and faiss"``), ``VQKERNELS_BENCH_QUICK=1`` shrinks the cases.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from benchmarks import baselines, cases, memory, stages

QUICK = os.environ.get("VQKERNELS_BENCH_QUICK", "") not in ("", "0")


@pytest.mark.parametrize("peer", ["vqkernels", "cdist", "addmm", "compile", "faiss"])
@pytest.mark.parametrize("name", cases.SEARCH)
def test_search(benchmark: Any, name: str, peer: str) -> None:
    case = cases.shrink(cases.BY_NAME[name]) if QUICK else cases.BY_NAME[name]
    contestant = baselines.SEARCH[peer]
    if contestant.needs(case) > 0.6 * memory.available():
        pytest.skip("does not fit into memory")
    z, codebook = case.make()
    try:
        work = contestant.make(case, z, codebook)
    except baselines.Unavailable as e:
        pytest.skip(str(e))
    chosen, expected = stages.oracle(case, z, codebook)
    wrong = int((work()[chosen] != expected).sum())
    if peer == "vqkernels":
        assert wrong == 0
    benchmark.group = f"search, {case.title}: {case.size}, {case.metric}"
    benchmark.extra_info["wrong_rows_percent"] = 100 * wrong / len(chosen)
    benchmark.pedantic(work, rounds=7, warmup_rounds=1)
