"""``nearest`` on Triton kernels: exact, no N x K, no host synchronisation, so that it can be captured in a CUDA graph.

Called by ``dispatch``. Screen in float16 on the tensor cores with a rigorous bound, list the codes that the bound
cannot tell apart, decide those in float64. Codes are packed anew on every call, in three launches (docs/gpu.md counts
what a cache would save, and what it would cost).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqkernels import _triton, tuned
from vqkernels._triton import nearest_pack, nearest_search, selftest

# Elements of packed rows that are alive at a time: 128 MB in float16, whatever N is.
SCRATCH_ELEMENTS = 2**26
# Rows that are alive at a time: their lists and sort keys take some 130 bytes each.
CHUNK_ROWS = 2**20
# Candidates that a row can list; more, and it is scanned in float64.
CAPACITY = 16
# Up to this many dims, operands are kept in two parts: three times as many fit the 32 dims of the contraction.
SPLIT_DIMS = 10
METRICS = {"l2": 0, "cosine": 1, "dot": 2}
# Three dims of the contraction that are free hold the codes' bias, in a range for up to so many in all: one addition
# per pair less in the screen.
FOLDED_DIMS = 32
# Rows per program that lists candidates: no more, or the running positions of a tile spill registers.
COLLECT_ROWS = 32
# Rows that one program of the scan looks after: most of them need none.
SCAN_ROWS = 8
# Programs that fill a GPU about twice; below it the codes are split as well.
PROGRAMS = 264
MOST_SPLITS = 128
# Up to this many rows: no sort, splits merged where they are read, lists decided by one kernel. Four launches in all.
FEW_ROWS = 2048
# Codes that the centre is the mean of, and codes per program that measures them.
SAMPLE = 1024
STATS_CODES = 32
HALVES = (torch.float16, torch.bfloat16)
# Before it, "failed to translate module to LLVM IR": a sum beside a prefix sum in a branch of a loop (``collect``).
OLDEST_FOR_AMD = (3, 7)


def supports(x: Tensor, codebook: Tensor, metric: str, precision: str) -> str | None:
    """Every shape and stride; float32, float16 and bfloat16 on either side; sizes that 32-bit indices reach."""
    if (reason := _triton.unsupported_dtype(_triton.SCREEN_DTYPES, x=x, codebook=codebook)) is not None:
        return reason
    if torch.version.hip is not None and _triton.version() < OLDEST_FOR_AMD:
        found, needed = (".".join(map(str, v)) for v in (_triton.version(), OLDEST_FOR_AMD))
        return f"Triton {found} cannot translate the search for AMD GPUs; {needed} can"
    if x.shape[1] * x.shape[2] >= 2**30 or codebook.shape[1] >= 2**30:
        return f"{x.shape[1] * x.shape[2]} rows and {codebook.shape[1]} codes; row and code ids are 32-bit"
    return None


def describe(x: Tensor, codebook: Tensor, metric: str, precision: str) -> str:
    """What :func:`vqkernels.explain` adds to "chosen"."""
    plan = _plan(x, codebook)
    where = "interpreted" if _triton.interpreted() else "float16 screen"
    shape = f"tiles of {plan.config.block_m} rows x {plan.config.block_n} codes x {plan.config.block_d} dims"
    found = selftest.verdicts()
    verdicts = [found[x.device, probe] for probe in _probes(plan) if (x.device, probe) in found]
    if any(not verdict.holds for verdict in verdicts):
        return "float64 scan: the self-test of the tensor cores failed, the screen is off"
    return f"{where}, {shape}, self-test {'passed' if len(verdicts) == 2 else 'before the first search'}"


class _Plan(NamedTuple):
    config: tuned.Config
    split: bool
    folded: bool
    padded_dim: int
    block_d: int
    tiles: int
    chunk: int


def _plan(x: Tensor, codebook: Tensor) -> _Plan:
    h, b, s, d = x.shape
    split = d <= SPLIT_DIMS
    wanted = max(16, _triton.power_of_two(3 * d if split else d))
    config = tuned.nearest_config(wanted, tuned.device_name(x.device) if x.is_cuda else "")
    # Few rows: no more of them in a tile than there are, in the sizes that tensor cores have instructions for.
    config = config.with_rows(16 if b * s <= 16 else 64 if b * s <= 64 else config.block_m)
    block_d = min(config.block_d, wanted)
    dims = 3 * d if split else d
    padded_dim = _triton.ceil_div(dims, block_d) * block_d
    folded = block_d == padded_dim <= FOLDED_DIMS and dims + nearest_pack.BIAS_DIMS.value <= padded_dim
    tiles = _triton.ceil_div(codebook.shape[1], config.block_n)
    fit = min(SCRATCH_ELEMENTS // padded_dim, CHUNK_ROWS) // h
    fit = max(config.block_m, fit // config.block_m * config.block_m)
    return _Plan(config, split, folded, padded_dim, block_d, tiles, min(fit, b * s))


def _probes(plan: _Plan) -> tuple[selftest.Probe, selftest.Probe]:
    """The products of a search: the screen's and the collection's."""
    c, resident = plan.config, plan.block_d == plan.padded_dim
    return (
        selftest.Probe(c.block_m, c.block_n, plan.block_d, resident, plan.folded, c.num_warps, c.num_stages),
        selftest.Probe(COLLECT_ROWS, c.block_n, plan.block_d, resident, plan.folded, 8, 2),
    )


class _Codes(NamedTuple):
    centre: Tensor
    exponent: Tensor
    scan: Tensor
    norms: Tensor
    packed: Tensor
    bias: Tensor
    bounds: Tensor


def _measure(x: Tensor, codebook: Tensor, metric: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre, per code its largest element or mark, norms for "cosine", and per program the largest of all."""
    (h, k, d), device = codebook.shape, codebook.device
    strides = _triton.strides(codebook)
    centre = torch.empty((h, d), dtype=torch.float32, device=device)
    if metric == 0:
        every = _triton.ceil_div(k, SAMPLE)
        nearest_pack.code_centre[(_triton.ceil_div(d, 32), h)](
            codebook, *strides, centre, k, every, _triton.ceil_div(k, every), d,
            HALF=x.dtype in HALVES and codebook.dtype in HALVES, BLOCK_N=64, BLOCK_D=32, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    blocks = _triton.ceil_div(k, STATS_CODES)
    largest = torch.empty((h, k), dtype=torch.float32, device=device)
    norms = torch.empty((h, k if metric == 1 else 1), dtype=torch.float64, device=device)
    tops = torch.empty((h, blocks), dtype=torch.float32, device=device)
    nearest_pack.code_stats[(blocks, h)](
        codebook, *strides, centre, largest, norms, tops, k, d,
        METRIC=metric, BLOCK_N=STATS_CODES, BLOCK_D=min(64, _triton.power_of_two(d)), num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return centre, largest, norms, tops


def _pack(x: Tensor, codebook: Tensor, metric: int, plan: _Plan, keep: float) -> _Codes:
    (h, k, d), device = codebook.shape, codebook.device
    centre, largest, norms, tops = _measure(x, codebook, metric)
    exponent = torch.empty((h,), dtype=torch.int32, device=device)
    scan = torch.empty((h,), dtype=torch.int32, device=device)
    n = plan.config.block_n
    packed = torch.empty((h, plan.tiles * n, plan.padded_dim), dtype=torch.float16, device=device)
    bias = torch.empty((h, plan.tiles * n), dtype=torch.float32, device=device)
    bounds = torch.empty((h, plan.tiles, 3), dtype=torch.float32, device=device)
    nearest_pack.pack_codes[(plan.tiles, h)](
        codebook, *_triton.strides(codebook), centre, largest, norms, tops, exponent, scan, packed, bias, bounds,
        k, tops.shape[1], d, plan.padded_dim, plan.tiles, 2.0 * selftest.published(plan.padded_dim), keep,
        METRIC=metric, SPLIT=plan.split, FOLDED=plan.folded, BLOCK_N=n, BLOCK_D=min(32, plan.block_d), BLOCK=1024,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return _Codes(centre, exponent, scan, norms, packed, bias, bounds)


def run(x: Tensor, codebook: Tensor, metric: str, precision: str) -> tuple[Tensor, Tensor]:
    """Pack the codes, then chunks of rows that bound the scratch memory."""
    indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    score = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if indices.numel() > 0:
        _run_into(x, codebook, metric, precision, indices, score)
    return indices, score


def _run_into(x: Tensor, codebook: Tensor, metric: str, precision: str, indices: Tensor, score: Tensor) -> None:
    """``run`` with its results given, contiguous; there is at least one row."""
    with _triton.on_device(x):
        plan = _plan(x, codebook)
        if not selftest.holds(x.device, *_probes(plan)):
            _scan_all(x, codebook, METRICS[metric], indices, score)
            return
        keep = 1.0 if precision == "exact" else 0.0
        codes = _pack(x, codebook, METRICS[metric], plan, keep)
        for first in range(0, x.shape[1] * x.shape[2], plan.chunk):
            _search(x, codebook, METRICS[metric], plan, codes, keep, first, indices, score)


def _scan_all(x: Tensor, codebook: Tensor, metric: int, indices: Tensor, score: Tensor) -> None:
    """Every row against every code in float64: what is left where tensor cores cannot be trusted."""
    (h, b, s, d), k = x.shape, codebook.shape[1]
    norms = _measure(x, codebook, metric)[2]
    for first in range(0, b * s, CHUNK_ROWS):
        rows = min(CHUNK_ROWS, b * s - first)
        count = torch.full((h, rows), CAPACITY + 1, dtype=torch.int32, device=x.device)
        nearest_search.scan[(_triton.ceil_div(rows, SCAN_ROWS), h)](
            x, *_triton.strides(x), codebook, *_triton.strides(codebook), norms, count, indices, score,
            first, rows, b * s, s, k, d, 1, SCAN_ROWS,
            METRIC=metric, CAPACITY=CAPACITY, BLOCK=128, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def _search(
    x: Tensor,
    codebook: Tensor,
    metric: int,
    plan: _Plan,
    codes: _Codes,
    keep: float,
    first: int,
    indices: Tensor,
    score: Tensor,
) -> None:
    (h, b, s, d), k, device = x.shape, codebook.shape[1], x.device
    n = b * s
    rows = min(plan.chunk, n - first)
    c = plan.config
    packed = torch.empty((h, rows, plan.padded_dim), dtype=torch.float16, device=device)
    info = torch.empty((h, 5, rows), dtype=torch.float32, device=device)
    pack_block = 32
    nearest_pack.pack_rows[(_triton.ceil_div(rows, pack_block), h)](
        x, *_triton.strides(x), codes.centre, codes.exponent, codes.scan, packed, info, first, rows, n, s, d,
        plan.padded_dim, keep,
        METRIC=metric, SPLIT=plan.split, FOLDED=plan.folded, BLOCK_M=pack_block, BLOCK_D=min(32, plan.block_d),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip

    blocks = _triton.ceil_div(rows, c.block_m)
    splits = max(1, min(PROGRAMS // (blocks * h), MOST_SPLITS, plan.tiles))
    per_split = _triton.ceil_div(plan.tiles, splits)
    splits = _triton.ceil_div(plan.tiles, per_split)
    wide = _triton.power_of_two(splits)
    part = torch.empty((h, splits, 4, rows), dtype=torch.float32, device=device)
    shape = {
        "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_D": plan.block_d,
        "RESIDENT": plan.block_d == plan.padded_dim, "FOLDED": plan.folded,
    }  # fmt: skip
    nearest_search.screen[(blocks, splits, h)](
        packed, info, codes.packed, codes.bias, codes.bounds, part, rows, plan.padded_dim, plan.tiles, per_split,
        **shape, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip

    few = n <= FEW_ROWS
    if few:  # what only the sorted form reads is not there
        threshold, keys, order = part, part, part
    else:
        threshold = torch.empty((h, rows), dtype=torch.float32, device=device)
        key = torch.empty((h, rows), dtype=torch.int32, device=device)
        block = max(4, 128 // wide)
        nearest_search.merge[(_triton.ceil_div(rows, block), h)](
            part, info, threshold, key, rows, plan.tiles, splits, SPLITS=wide, BLOCK=block, num_warps=4
        )
        keys, order = key.sort(dim=1, stable=True)
    listed = torch.empty((h, splits, rows, CAPACITY), dtype=torch.int32, device=device)
    count = torch.empty((h, splits, rows), dtype=torch.int32, device=device)
    nearest_search.collect[(_triton.ceil_div(rows, COLLECT_ROWS), splits, h)](
        packed, info, codes.packed, codes.bias, codes.bounds, part, threshold, keys, order, listed, count, rows,
        plan.padded_dim, plan.tiles, per_split, splits,
        **(shape | {"BLOCK_M": COLLECT_ROWS}), SPLITS=wide if few else 0, CAPACITY=CAPACITY, num_warps=8, num_stages=2,
    )  # fmt: skip

    values = (x, *_triton.strides(x), codebook, *_triton.strides(codebook), codes.norms)
    sizes = (first, rows, n, s, k, d, splits)
    if few:
        lanes = wide * CAPACITY
        nearest_search.resolve[(rows, h)](
            *values, listed, count, indices, score, *sizes,
            METRIC=metric, CAPACITY=CAPACITY, BLOCK=max(128, lanes), num_warps=8 if lanes > 512 else 4,
            enable_fp_fusion=False,
        )  # fmt: skip
        return
    nearest_search.decide[(_triton.ceil_div(rows, 32), h)](
        *values, listed, count, indices, score, *sizes,
        METRIC=metric, CAPACITY=CAPACITY, BLOCK=32, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    nearest_search.scan[(_triton.ceil_div(rows, SCAN_ROWS), h)](
        *values, count, indices, score, *sizes, SCAN_ROWS,
        METRIC=metric, CAPACITY=CAPACITY, BLOCK=128, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
