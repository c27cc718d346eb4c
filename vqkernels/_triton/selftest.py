"""Whether this GPU's tensor cores add as the bound of the search assumes: worst-case vectors, once per configuration.

Called by ``ops/nearest/triton.py`` before its first screen, by ``info`` and by ``vqkernels info --self-test``. The
models of tensor cores behind the bound are published measurements of other people's chips (docs/gpu.md): this one is
asked itself, and where it adds worse, the screen is turned off and every row is compared in float64.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch

__all__ = ["Probe", "Verdict", "holds", "published", "verdicts"]


class Probe(NamedTuple):
    """What decides which tensor-core instruction a product compiles to, and in which order it adds."""

    block_m: int
    block_n: int
    block_d: int
    resident: bool
    folded: bool
    num_warps: int
    num_stages: int


class Verdict(NamedTuple):
    """The largest error seen, as a share of the published bound, and whether it stays below it."""

    holds: bool
    share: float


_verdicts: dict[tuple[torch.device, Probe], Verdict] = {}


def published(padded_dim: int) -> float:
    """The bound on the error of a sum of ``padded_dim`` float16 products, relative to |a| |b|.

    Ampere's constants, the larger of those published: steps of 8 products are aligned to the largest, cut off below
    2^-24 of it, and added to the accumulator with one truncation (design of the bound: docs/gpu.md).
    """
    return padded_dim // 8 * (9 * 2.0**-24 + 2.0**-23) * (1 + 2.0**-20)


def verdicts() -> dict[tuple[torch.device, Probe], Verdict]:
    """What has been found out in this process."""
    return dict(_verdicts)


def holds(device: torch.device, *probes: Probe) -> bool:
    """Whether the screen may be trusted with these launch configurations; measures those that are new.

    Raises:
        RuntimeError: a CUDA graph is being captured and a configuration is new; measuring has to wait for the device.
    """
    good = True
    for probe in probes:
        verdict = _verdicts.get((device, probe))
        if verdict is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "vqkernels: the first search of this size on a GPU checks its tensor cores and compiles kernels; a "
                    "CUDA graph cannot capture that, so run it once before the capture"
                )
            verdict = _verdicts[device, probe] = _measure(device, probe)
            if not verdict.holds:
                name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
                warnings.warn(
                    f"vqkernels: the tensor cores of {name} add with {verdict.share:.2f} times the error that the "
                    f"search allows for ({probe}); the float16 screen is turned off there, results stay exact and "
                    "searches become slow. Please report this with the output of `vqkernels info --self-test`.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        good &= verdict.holds
    return good


def _vectors(count: int, dim: int, generator: torch.Generator) -> torch.Tensor:
    """One large element, elsewhere small ones whose low bits an accumulator aligned to the large one cuts off."""
    row = torch.arange(count)
    power = 8 + row % 6
    small = torch.exp2(14.0 - power)[:, None] * (1 + torch.randint(0, 2, (count, dim), generator=generator) / 1024)
    small[1::4] *= torch.where(torch.rand(len(small[1::4]), dim, generator=generator) < 0.5, -1.0, 1.0)
    small[row, row // 2 % 2 * (dim - 1)] = 2.0**14
    small[3::4] = torch.randn(len(small[3::4]), dim, generator=generator) * 2.0**12
    return small.half()


def _measure(device: torch.device, probe: Probe) -> Verdict:
    """Products of worst-case vectors by the very function that the screen calls, against float64."""
    from vqkernels import _triton
    from vqkernels._triton import nearest_search

    dim = probe.block_d if probe.resident else 4 * probe.block_d
    generator = torch.Generator().manual_seed(0)
    a, b = _vectors(probe.block_m, dim, generator), _vectors(probe.block_n, dim, generator)
    b[1] = a[0].abs()  # all that is cut off has one sign
    scores = torch.empty((probe.block_m, probe.block_n), dtype=torch.float32, device=device)
    zeros, ones = torch.zeros(probe.block_n, device=device), torch.ones(probe.block_m, device=device)
    with _triton.on_device(scores):
        nearest_search.probe[(1,)](
            a.to(device), b.to(device), zeros, ones, scores, dim,
            BLOCK_M=probe.block_m, BLOCK_N=probe.block_n, BLOCK_D=probe.block_d, RESIDENT=probe.resident,
            FOLDED=probe.folded, num_warps=probe.num_warps, num_stages=probe.num_stages,
        )  # fmt: skip
    wide = a.double(), b.double()  # sums of 22-bit products within 46 bits: float64 has no rounding here
    error = (scores.cpu().double() - wide[0] @ wide[1].T).abs()
    bound = published(dim) * wide[0].norm(dim=1)[:, None] * wide[1].norm(dim=1)[None, :]
    share = float((error / bound).nan_to_num(float("inf")).amax())
    return Verdict(share <= 1.0, share)
