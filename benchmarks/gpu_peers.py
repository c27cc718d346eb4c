"""The contestants on a GPU: every backend of ours that runs there, and what people use today, each optional.

Called by ``gpu_stages``. A peer that is missing or cannot run a case raises ``Unavailable`` with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.baselines import Contestant, Unavailable, Work
from benchmarks.cases import Case

__all__ = ["backends", "rows_per_chunk", "search", "train", "update"]

# The share of the free memory that an N x K matrix of a peer may take; beyond it the peer works in chunks of rows.
SHARE = 0.25


def backends(device: torch.device) -> list[str]:
    """Ours that can run there, in the order of dispatch; the reference is the oracle, not a contestant."""
    from vqkernels import dispatch

    return [b.name for b in dispatch.BACKENDS if b.name != "reference" and b.probe(device.type) is None]


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**31


def rows_per_chunk(case: Case, device: torch.device, bytes_per_pair: float) -> int:
    """As many rows as fit; all of them where the whole matrix does."""
    return max(1, min(case.rows, int(SHARE * _free(device) / (bytes_per_pair * case.codes))))


def with_backend(name: str, work: Work) -> Work:
    """``work`` with a backend asked for by environment: backward passes on CUDA run in a thread of their own."""

    def call() -> Tensor:
        before = os.environ.get("VQKERNELS_BACKEND")
        os.environ["VQKERNELS_BACKEND"] = name
        try:
            return work()
        finally:
            if before is None:
                del os.environ["VQKERNELS_BACKEND"]
            else:
                os.environ["VQKERNELS_BACKEND"] = before

    return call


def _ours(backend: str) -> Contestant:
    def make(case: Case, z: Tensor, codebook: Tensor) -> Work:
        import vqkernels

        rows = case.rows_of(z)
        return lambda: vqkernels.nearest(rows, codebook, metric=case.metric, backend=backend)[0].reshape(-1)

    return Contestant(f"vqkernels-{backend}", f"vqkernels ({backend})", make)


def _flat(case: Case, z: Tensor) -> Tensor:
    return case.rows_of(z).reshape(-1, case.dim)


def _chunked(search: Callable[[Tensor, Tensor], Tensor], bytes_per_pair: float) -> Callable[..., Work]:
    def make(case: Case, z: Tensor, codebook: Tensor) -> Work:
        step = rows_per_chunk(case, z.device, bytes_per_pair)

        def work() -> Tensor:
            rows = _flat(case, z)
            if step >= len(rows):
                return search(rows, codebook)
            return torch.cat([search(part, codebook) for part in rows.split(step)])

        return work

    return make


def _tf32(allowed: bool, function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def call(x: Tensor, codebook: Tensor) -> Tensor:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = allowed
        try:
            return function(x, codebook)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return call


def _cdist(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(x, codebook).argmin(1)


def _addmm(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2).argmin(1)


def _compile(case: Case, z: Tensor, codebook: Tensor) -> Work:
    torch._dynamo.reset()
    compiled = torch.compile(_addmm, dynamic=False, fullgraph=True)
    work: Work = _chunked(_tf32(True, compiled), 4.0)(case, z, codebook)
    try:
        work()
    except Exception as e:
        raise Unavailable(f"torch.compile failed here: {type(e).__name__}: {str(e)[:120]}") from e
    return work


def _flash_kmeans(dtype: torch.dtype | None) -> Callable[..., Work]:
    def make(case: Case, z: Tensor, codebook: Tensor) -> Work:
        try:
            from flash_kmeans.assign_euclid_triton import euclid_assign_triton
        except Exception as e:
            raise Unavailable(f"flash-kmeans cannot be imported ({type(e).__name__}: {str(e)[:80]})") from e
        if not z.is_cuda:
            raise Unavailable("flash-kmeans needs a GPU")

        def work() -> Tensor:
            # Its callers pass |x|^2 in; the conversion to 16 bits is inside the time, as everyone's copies are.
            x, codes = _flat(case, z), codebook
            if dtype is not None:
                x, codes = x.to(dtype), codes.to(dtype)
            square = x.float().square().sum(-1)
            indices: Tensor = euclid_assign_triton(x[None], codes[None], square[None])
            return indices[0].long()

        return _tried(work)

    return make


def _flashlib(module: str, function: str, dtype: torch.dtype | None) -> Callable[..., Work]:
    def make(case: Case, z: Tensor, codebook: Tensor) -> Work:
        import importlib

        try:
            assign = getattr(importlib.import_module(f"flashlib.primitives.kmeans.{module}"), function)
        except Exception as e:
            raise Unavailable(f"flashlib cannot be imported ({type(e).__name__}: {str(e)[:80]})") from e
        if not z.is_cuda:
            raise Unavailable("flashlib needs a GPU")

        def work() -> Tensor:
            x, codes = _flat(case, z), codebook
            if dtype is not None:
                x, codes = x.to(dtype), codes.to(dtype)
            indices: Tensor = assign(x[None], codes[None])
            return indices.reshape(-1).long()

        return _tried(work)

    return make


def _tried(work: Work) -> Work:
    try:
        work()
    except Exception as e:
        raise Unavailable(f"does not run this case: {type(e).__name__}: {str(e)[:120]}") from e
    return work


def search(device: torch.device) -> list[Contestant]:
    """Ours first."""
    half, bf16 = torch.float16, torch.bfloat16
    return [
        *map(_ours, backends(device)),
        Contestant("cdist", "torch.cdist + argmin", _chunked(_tf32(False, _cdist), 4.3)),
        Contestant("addmm", "addmm + argmin, fp32", _chunked(_tf32(False, _addmm), 4.0)),
        Contestant("addmm-tf32", "addmm + argmin, TF32", _chunked(_tf32(True, _addmm), 4.0)),
        Contestant("compile", "torch.compile(addmm + argmin), TF32", _compile),
        Contestant("flash-kmeans", "flash-kmeans, TF32", _flash_kmeans(None)),
        Contestant("flash-kmeans-fp16", "flash-kmeans, fp16", _flash_kmeans(half)),
        Contestant("flashlib", "flashlib Triton, TF32", _flashlib("triton.assign", "euclid_assign_triton", None)),
        Contestant("flashlib-fp16", "flashlib Triton, fp16", _flashlib("triton.assign", "euclid_assign_triton", half)),
        Contestant("flashlib-cute", "flashlib CuTe, bf16", _flashlib("cutedsl.assign", "cutedsl_assign_euclid", bf16)),
    ]


def train(device: torch.device) -> list[Contestant]:
    """A training step with an EMA codebook: ours by backend, then vector-quantize-pytorch."""
    peer = baselines.TRAIN["vqtorch-ema"]
    return [*(_training(name) for name in backends(device)), peer]


def _training(backend: str) -> Contestant:
    def make(case: Case, z: Tensor, codebook: Tensor) -> Work:
        return with_backend(backend, baselines.TRAIN["vqkernels-ema"].make(case, z, codebook))

    return Contestant(f"vqkernels-{backend}", f"vqkernels ({backend}), EMA codebook", make)


def update(device: torch.device) -> list[tuple[str, str, Callable[[Case, Tensor, Tensor, Tensor], Work]]]:
    """Sums per code and the moving averages, from given indices: name, title, and what builds the work."""

    def state(case: Case, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = torch.ones(1, case.codes, device=codebook.device)
        return size, codebook.float()[None].clone(), codebook.float()[None].clone()

    def ours(backend: str) -> Callable[[Case, Tensor, Tensor, Tensor], Work]:
        def make(case: Case, z: Tensor, codebook: Tensor, indices: Tensor) -> Work:
            from vqkernels import ops

            rows, index, (size, average, codes) = _flat(case, z)[None, None], indices[None, None], state(case, codebook)

            def work() -> Tensor:
                sums, counts = ops.codebook_sum(rows, index, case.codes, backend)
                ops.ema_update(size, average, codes, counts, sums, 0.99, 1e-5, False, backend)
                return sums[0]

            return work

        return make

    def finish(counts: Tensor, sums: Tensor, size: Tensor, average: Tensor, codes: Tensor) -> None:
        size.mul_(0.99).add_(counts, alpha=0.01)
        average.mul_(0.99).add_(sums, alpha=0.01)
        total = size.sum(-1, keepdim=True)
        smoothed = (size + 1e-5) / (total + size.shape[-1] * 1e-5) * total
        torch.div(average, smoothed.unsqueeze(-1), out=codes)

    def index_add(case: Case, z: Tensor, codebook: Tensor, indices: Tensor) -> Work:
        rows, (size, average, codes) = _flat(case, z).float(), state(case, codebook)

        def work() -> Tensor:
            sums = torch.zeros(case.codes, case.dim, device=z.device).index_add_(0, indices, rows)
            finish(torch.bincount(indices, minlength=case.codes).float()[None], sums[None], size, average, codes)
            return sums

        return work

    def one_hot(case: Case, z: Tensor, codebook: Tensor, indices: Tensor) -> Work:
        if 8.0 * case.rows * case.codes > SHARE * _free(z.device):
            raise Unavailable("the one-hot matrix does not fit into memory")
        rows, (size, average, codes) = _flat(case, z).float(), state(case, codebook)

        def work() -> Tensor:
            matrix = torch.zeros(case.rows, case.codes, device=z.device).scatter_(1, indices[:, None], 1.0)
            sums = matrix.T @ rows
            finish(matrix.sum(0)[None], sums[None], size, average, codes)
            return sums

        return work

    found: list[Any] = [(f"vqkernels-{name}", f"vqkernels ({name})", ours(name)) for name in backends(device)]
    found.append(("index-add", "index_add_ + bincount (atomics: not deterministic)", index_add))
    found.append(("one-hot", "one-hot matrix product", one_hot))
    return found
