"""All levels of a residual search: ours in one call and level by level, plain torch and vector-quantize-pytorch.

Called by ``gpu_stages``. Nothing of ours is timed before checked rows agreed with the reference at every level.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import gpu_cases, gpu_peers
from benchmarks.baselines import Unavailable, Work
from benchmarks.cases import Case
from benchmarks.gpu_timing import captured
from benchmarks.timing import quartiles, ratios

if TYPE_CHECKING:
    from benchmarks.gpu_stages import Bench, Record

__all__ = ["residual"]

CHECKED = 512
# Up to so many rows an eager caller's time and that of a graph are measured too.
FEW = 64


def _op(x: Tensor, codebooks: list[Tensor], backend: str) -> Tensor:
    from vqkernels import ops

    indices: Tensor = ops.residual_nearest(x, codebooks, False, backend)[0]
    return indices


def _levels(x: Tensor, codebooks: list[Tensor], backend: str) -> Tensor:
    """What callers did before there was one op for it."""
    from vqkernels import ops

    residual, total, found = x.float(), torch.zeros_like(x, dtype=torch.float32), []
    for codes in codebooks:
        indices, _ = ops.nearest(residual, codes, "l2", "exact", backend)
        chosen = ops.lookup(codes, indices, False, torch.float32, backend)
        residual, total = residual - chosen, total + chosen
        found.append(indices)
    return torch.stack(found)


def _torch(x: Tensor, codebooks: list[Tensor], search: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    residual, total, found = x[0, 0], torch.zeros_like(x[0, 0]), []
    for codes in codebooks:
        indices = search(residual, codes[0])
        chosen = codes[0][indices]
        residual, total = residual - chosen, total + chosen
        found.append(indices)
    return torch.stack(found)[:, None, None]


def _vqtorch(x: Tensor, codebooks: list[Tensor]) -> Work:
    try:
        from vector_quantize_pytorch import ResidualVQ
    except ImportError as e:
        raise Unavailable("vector-quantize-pytorch is not installed (pip install vector-quantize-pytorch)") from e
    k, d = codebooks[0].shape[1:]
    vq = ResidualVQ(dim=d, codebook_size=k, num_quantizers=len(codebooks)).to(x.device).eval()
    for layer, codes in zip(vq.layers, codebooks, strict=True):
        layer._codebook.embed.data.copy_(codes)

    @torch.no_grad()
    def work() -> Tensor:
        indices: Tensor = vq(x[0])[1]
        return indices.movedim(-1, 0)[:, None]

    return work


def _contestants(bench: Bench, x: Tensor, codebooks: list[Tensor]) -> list[tuple[str, str, Callable[[], Work]]]:
    found: list[tuple[str, str, Callable[[], Work]]] = []
    names = gpu_peers.backends(bench.device)
    for name in names:
        found.append((f"vqkernels-{name}", f"vqkernels ({name})", partial(partial, _op, x, codebooks, name)))
    for name in names:
        title = f"vqkernels ({name}), level by level"
        found.append((f"levels-{name}", title, partial(partial, _levels, x, codebooks, name)))
    cdist, addmm = gpu_peers._tf32(False, gpu_peers._cdist), gpu_peers._tf32(True, gpu_peers._addmm)
    found.append(("cdist", "torch.cdist + argmin, level by level", lambda: partial(_torch, x, codebooks, cdist)))
    found.append(("addmm-tf32", "addmm + argmin, TF32, level by level", lambda: partial(_torch, x, codebooks, addmm)))
    found.append(("vqtorch", "vector-quantize-pytorch ResidualVQ", lambda: _vqtorch(x, codebooks)))
    return found


def _graph(work: Work, bench: Bench) -> Record:
    if bench.device.type != "cuda":
        return {}
    try:
        replay = captured(work)
        return {"graph_us": 1e6 * statistics.median(bench.clock.once(replay) for _ in range(9))}
    except Exception as e:
        return {"no_graph": f"{type(e).__name__}: {str(e)[:120]}"}


def residual(bench: Bench) -> Iterator[Record]:
    """Every case of ``gpu_cases.RESIDUAL``."""
    for given, count in gpu_cases.RESIDUAL:
        if bench.left() < 0.2 * bench.seconds:
            return
        levels = min(count, 3) if bench.quick else count
        case, z, codes = bench.make(given)
        x = case.rows_of(z).reshape(-1, case.dim)[None, None]
        # Other codes at every level, that shrink as residuals do.
        order = [torch.randperm(case.codes, generator=torch.Generator().manual_seed(q)) for q in range(levels)]
        codebooks = [codes[o.to(bench.device)][None] * 0.7**q for q, o in enumerate(order)]
        yield _measure(bench, case, x, codebooks)


def _measure(bench: Bench, case: Case, x: Tensor, codebooks: list[Tensor]) -> Record:
    from vqkernels import Unsupported

    chosen = torch.randperm(case.rows, generator=torch.Generator().manual_seed(2))[:CHECKED].to(bench.device)
    expected = _op(x[:, :, chosen], codebooks, "reference")
    work: dict[str, Work] = {}
    wrong: dict[str, float] = {}
    skipped: dict[str, str] = {}
    titles: dict[str, str] = {}
    for name, title, make in _contestants(bench, x, codebooks):
        ours = name.startswith(("vqkernels", "levels"))
        try:
            function = make()
            found = function()[:, :, 0][..., chosen]
        except Exception as e:
            skipped[name] = str(e) if isinstance(e, Unavailable) else f"{type(e).__name__}: {str(e)[:160]}"
            if ours and not isinstance(e, Unsupported):
                bench.failed.append(f"{name} on {case.name}: {skipped[name]}")
            continue
        # A row that took another code once is another row from there on.
        wrong[name] = 100.0 * float((found != expected[:, :, 0]).any(0).double().mean())
        if ours and wrong[name]:
            skipped[name] = f"NOT REPORTED: {wrong[name]:.3g} % of the checked rows are wrong"
            bench.failed.append(f"{name} on {case.name}: wrong rows")
            continue
        work[name], titles[name] = function, title
    timed = bench.timed(work, 4.0)
    results: dict[str, Any] = {}
    for name, series in timed.items():
        results[name] = {"title": titles[name], "ms": series.summary(), "wrong_rows_percent": wrong[name]}
        if case.rows <= FEW:
            calls = 2 if bench.quick else 20
            wall = statistics.median(bench.clock.wall(work[name], calls) for _ in range(3))
            device = 1e6 * quartiles(series.seconds)["median"]
            results[name] |= {"device_us": device, "eager_us": 1e6 * wall, **_graph(work[name], bench)}
    first = next((name for name in timed if name.startswith("vqkernels")), None)
    return {
        "case": case.name,
        "op": "residual_nearest",
        "title": case.title,
        "rows": case.rows,
        "codes": sum(codes.shape[1] for codes in codebooks),  # as dispatch counts them
        "dim": case.dim,
        "levels": len(codebooks),
        "size": f"{case.rows} x {len(codebooks)} x {case.codes} x {case.dim}",
        "results": results,
        "speedup": {} if first is None else {k: ratios(timed[first], timed[k]) for k in timed if k != first},
        "skipped": skipped,
    }
