"""Every op but the search, alone, on every backend of ours: what the table that ``backend="auto"`` goes by is made of.

Called by ``gpu_stages``; ``gpu_record`` writes the table. Nothing is timed before it agreed with the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import gpu_cases, gpu_peers
from benchmarks.cases import Case

if TYPE_CHECKING:
    from benchmarks.gpu_stages import Bench, Record

__all__ = ["OPS", "SOFT_OPS", "arguments", "ops"]

OPS = ("lookup", "codebook_sum", "ema_update", "quantize_grad", "quantize_output")
SOFT_OPS = ("soft_assign", "soft_assign_grad")


def arguments(op: str, case: Case, z: Tensor, codebook: Tensor) -> tuple[Any, ...]:
    """What a training step hands to ``op`` on this case, without ``backend``."""
    x = case.rows_of(z)
    x = x[None, None] if x.dim() == 2 else x.flatten(1, -2)[None]
    codes = codebook.float()[None]
    generator = torch.Generator().manual_seed(3)
    indices = torch.randint(case.codes, x.shape[:-1], generator=generator).to(z.device)
    one = torch.ones((), device=z.device)
    if op in SOFT_OPS:
        # A loss of the entropies of rows and of the batch. Scores of some units, as after training.
        rows, weight = x.flatten(1, -2), torch.full((1, case.rows), 1.0 / case.rows, device=z.device)
        says = (torch.ones(1, device=z.device), torch.linspace(-1.0, 1.0, case.codes, device=z.device)[None])
        said = (*says, None, None) if op == "soft_assign_grad" else ()
        return rows, codes, weight, *said, True, float(case.dim)
    if op == "lookup":
        return codes, indices, case.channel_first, x.dtype
    if op == "codebook_sum":
        return x, indices, case.codes
    if op == "ema_update":
        counts = torch.bincount(indices.flatten(), minlength=case.codes).float()[None]
        return counts + 1, codes.clone(), codes.clone(), counts, codes.clone(), 0.99, 1e-5, False
    if op == "quantize_grad":
        return torch.ones_like(x), x, codes, indices, one, "straight_through", case.channel_first
    assert op == "quantize_output", op
    return x, codes, indices, torch.ones(indices.shape, device=z.device), False, case.channel_first


def _results(op: str, backend: str, given: tuple[Any, ...]) -> list[Tensor]:
    """The results of one call on copies of what it writes to."""
    from vqkernels import ops

    given = tuple(a.clone() if op == "ema_update" and isinstance(a, Tensor) else a for a in given)
    found = getattr(ops, op)(*given, backend)
    if found is None:  # in place
        return [a for a in given[:3] if isinstance(a, Tensor)]
    return [found] if isinstance(found, Tensor) else list(found)


def _agree(found: list[Tensor], expected: list[Tensor]) -> bool:
    for a, b in zip(found, expected, strict=True):
        scale = float(b.double().abs().amax()) if b.numel() else 0.0
        if a.dtype != b.dtype or not torch.allclose(a.double(), b.double(), rtol=1e-3, atol=2e-5 * max(scale, 1e-30)):
            return False
    return True


def ops(bench: Bench) -> Iterator[Record]:
    """Every op at the sizes of ``gpu_cases.OPS``, those of a softmax at the sizes of ``gpu_cases.SOFT``."""
    from vqkernels import Unsupported
    from vqkernels import ops as functions

    for name, of_case in [(n, OPS) for n in gpu_cases.OPS] + [(n, SOFT_OPS) for n in gpu_cases.SOFT]:
        if bench.left() < 5:
            return
        case, z, codebook = bench.make(gpu_cases.BY_NAME[name])
        for op in of_case:
            given = arguments(op, case, z, codebook)
            expected = _results(op, "reference", given)
            work: dict[str, Callable[[], object]] = {}
            skipped: dict[str, str] = {}
            # Of a softmax the reference is a candidate too: whether kernels beat it was counted, not measured.
            ours = gpu_peers.backends(bench.device)
            for backend in dict.fromkeys((*ours, "reference") if op in SOFT_OPS else ours):
                key = f"vqkernels-{backend}"
                try:
                    right = _agree(_results(op, backend, given), expected)
                except Exception as e:
                    skipped[key] = f"{type(e).__name__}: {str(e)[:160]}"
                    if not isinstance(e, Unsupported):
                        bench.failed.append(f"{op} by {key} on {name}: {skipped[key]}")
                    continue
                if not right:
                    skipped[key] = "NOT REPORTED: differs from the reference"
                    bench.failed.append(f"{op} by {key} on {name}: differs from the reference")
                    continue
                work[key] = partial(getattr(functions, op), *given, backend)
            timed = bench.timed(work, 0.5) if work else {}  # type: ignore[arg-type]
            yield {
                "case": f"{op} {name}",
                "op": op,
                "size": name,
                "rows": 0 if op == "ema_update" else case.rows,
                "codes": case.codes,
                "dim": case.dim,
                "results": {key: {"title": key, "ms": series.summary()} for key, series in timed.items()},
                "skipped": skipped,
            }
