"""The contestants: vqkernels, and what people use today for the same job, each on the same inputs.

Used by ``run``, ``memory`` and the pytest-benchmark files. Every peer is an optional import: where it is missing,
``Unavailable`` says why. A search takes the latents as the encoder leaves them and returns the indices; what real code
does first (move the channels last, flatten) is inside the call, for us and for the peers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case

__all__ = ["ISAS", "SEARCH", "TRAIN", "Contestant", "Unavailable", "search_peers", "train_peers"]

ISAS = ("scalar", "avx2", "avx512", "avx512bf16", "amx")
BETA, DECAY, LEARNING_RATE = 0.25, 0.99, 1e-3

Work = Callable[[], Tensor]


class Unavailable(RuntimeError):
    """A contestant cannot run here or on this case; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """One way to do the job.

    Attributes:
        name: what ``--peer`` takes.
        title: what tables and charts show.
        make: builds the work of one call from the case, the latents and the codebook; the work returns the indices.
        bytes_per_pair: measured memory per (row, code) pair, to refuse what would not fit; 0 = no N x K.
        bytes_per_pair_cosine: the same where the metric is cosine, if it differs.
    """

    name: str
    title: str
    make: Callable[[Case, Tensor, Tensor], Work]
    bytes_per_pair: float = 0.0
    bytes_per_pair_cosine: float | None = None

    def needs(self, case: Case) -> float:
        """Bytes beyond inputs and outputs, roughly."""
        each = self.bytes_per_pair
        if case.metric == "cosine" and self.bytes_per_pair_cosine is not None:
            each = self.bytes_per_pair_cosine
        return each * case.rows * case.codes


def _flat(case: Case, z: Tensor) -> Tensor:
    return case.rows_of(z).reshape(-1, case.dim)


def ours(isa: str = "auto", backend: str = "auto", precision: str = "exact") -> Contestant:
    """``vqkernels.nearest``, with one instruction set forced or the best of the machine."""

    def make(case: Case, z: Tensor, codebook: Tensor) -> Work:
        import vqkernels
        from vqkernels import _native

        if isa != "auto" and (_native.unavailable() or isa not in _native.supported()):
            raise Unavailable(f"this machine or build has no {isa} kernels")
        rows = case.rows_of(z)

        def search() -> Tensor:
            os.environ["VQKERNELS_ISA"] = "" if isa == "auto" else isa
            indices, _ = vqkernels.nearest(rows, codebook, metric=case.metric, backend=backend, precision=precision)
            return indices.reshape(-1)

        return search

    if backend != "auto":
        return Contestant(backend, f"vqkernels ({backend})", make)
    name = "vqkernels" if isa == "auto" else f"vqkernels-{isa}"
    return Contestant(name, "vqkernels" if isa == "auto" else f"vqkernels ({isa} forced)", make)


def _cdist(case: Case, z: Tensor, codebook: Tensor) -> Work:
    # Rows and codes of a cosine case are of unit length: the nearest is the most similar.
    return lambda: torch.cdist(_flat(case, z), codebook).argmin(1)


def _addmm_argmin(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2).argmin(1)


def _addmm(case: Case, z: Tensor, codebook: Tensor) -> Work:
    return lambda: _addmm_argmin(_flat(case, z), codebook)


def _compile(case: Case, z: Tensor, codebook: Tensor) -> Work:
    # Shapes of other cases would count as recompilations and end in eager mode.
    torch._dynamo.reset()
    compiled = torch.compile(_addmm_argmin, dynamic=False, fullgraph=True)
    try:
        compiled(_flat(case, z), codebook)
    except Exception as e:
        raise Unavailable(f"torch.compile failed here: {type(e).__name__}") from e
    return lambda: compiled(_flat(case, z), codebook)


def _faiss(case: Case, z: Tensor, codebook: Tensor) -> Work:
    try:
        import faiss
    except ImportError as e:
        raise Unavailable("faiss is not installed (pip install faiss-cpu)") from e
    faiss.omp_set_num_threads(torch.get_num_threads())
    # Squared L2 also where the metric is cosine (unit length: the same answer): only L2 has faiss' fused top-1 kernel.
    # The index is built once: a training step would have to build it each time.
    index = faiss.IndexFlatL2(case.dim)
    index.add(codebook.numpy())

    # Below N * D = 128000 faiss compares row by row: good for single frames, far slower than its own fused search at
    # LlamaGen's size. It gets the better of the two on this case.
    def search(threshold: int) -> Tensor:
        faiss.cvar.distance_compute_blas_threshold = threshold
        _, indices = index.search(_flat(case, z).numpy(), 1)
        return torch.from_numpy(indices[:, 0])

    def seconds(threshold: int) -> float:
        search(threshold)
        start = time.perf_counter()
        search(threshold)
        return time.perf_counter() - start

    fastest = min((128000, 1), key=seconds)
    return lambda: search(fastest)


SEARCH: dict[str, Contestant] = {
    c.name: c
    for c in (
        Contestant("cdist", "torch.cdist + argmin", _cdist, 4.3),
        Contestant("addmm", "torch.addmm + argmin", _addmm, 4.0),
        Contestant("compile", "torch.compile(addmm + argmin)", _compile, 4.0),
        Contestant("faiss", "faiss-cpu IndexFlatL2", _faiss),
        ours(backend="reference"),
        ours(),
        *(ours(isa) for isa in ISAS),
    )
}


def search_peers(names: list[str] | None, isas: list[str]) -> list[Contestant]:
    """Ours first, then forced instruction sets, then the peers asked for (by default all but ``reference``)."""
    chosen = ["cdist", "addmm", "compile", "faiss"] if names is None else names
    return [ours(), *(ours(isa) for isa in isas if isa != "auto"), *(SEARCH[name] for name in chosen)]


def _step(quantize: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], z: Tensor, optimizer: Any) -> Work:
    """Forward, backward with a gradient from the decoder, update."""
    z = z.clone().requires_grad_()
    gradient = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z.device)
    one = torch.ones((), device=z.device)

    def step() -> Tensor:
        z.grad = None
        quantized, indices, loss = quantize(z)
        torch.autograd.backward([quantized, loss], [gradient, one])
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return indices.reshape(-1)

    return step


def _ours_training(learnable: bool) -> Callable[[Case, Tensor, Tensor], Work]:
    def make(case: Case, z: Tensor, codebook: Tensor) -> Work:
        import vqkernels

        os.environ["VQKERNELS_ISA"] = ""
        vq = vqkernels.VectorQuantizer(
            case.codes,
            case.dim,
            commitment_cost=BETA,
            decay=None if learnable else DECAY,
            metric=case.metric,
            channel_dim=1 if case.channel_first else -1,
        ).to(z.device)
        with torch.no_grad():
            vq.codebook.copy_(codebook.view_as(vq.codebook))
            if not learnable:
                vq.embed_avg.copy_(codebook.view_as(vq.embed_avg))
                vq.cluster_size.fill_(1.0)
        vq.train()
        optimizer = torch.optim.Adam(vq.parameters(), lr=LEARNING_RATE) if learnable else None

        def quantize(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            out = vq(z)
            return out.quantized, out.indices, out.loss

        return _step(quantize, z, optimizer)

    return make


def _vqtorch_training(learnable: bool) -> Callable[[Case, Tensor, Tensor], Work]:
    def make(case: Case, z: Tensor, codebook: Tensor) -> Work:
        try:
            from vector_quantize_pytorch import VectorQuantize
        except ImportError as e:
            raise Unavailable("vector-quantize-pytorch is not installed (pip install vector-quantize-pytorch)") from e
        if learnable and case.metric == "cosine":
            raise Unavailable("vector-quantize-pytorch has no learnable codebook with cosine similarity")
        vq = VectorQuantize(
            dim=case.dim,
            codebook_size=case.codes,
            decay=DECAY,
            commitment_weight=BETA,
            use_cosine_sim=case.metric == "cosine",
            rotation_trick=False,  # plain straight-through, as ours
            ema_update=not learnable,
            learnable_codebook=learnable,
            accept_image_fmap=case.channel_first and len(case.shape) == 3,
            channel_last=not (case.channel_first and len(case.shape) == 2),
        ).to(z.device)
        with torch.no_grad():
            vq._codebook.embed.copy_(codebook[None])
            vq._codebook.embed_avg.copy_(codebook[None])
        vq.train()
        optimizer = torch.optim.Adam(vq.parameters(), lr=LEARNING_RATE) if learnable else None
        return _step(vq, z, optimizer)

    return make


TRAIN: dict[str, Contestant] = {
    c.name: c
    for c in (
        Contestant("vqkernels-ema", "vqkernels, EMA codebook", _ours_training(False)),
        Contestant("vqtorch-ema", "vector-quantize-pytorch, EMA codebook", _vqtorch_training(False), 24.2, 16.2),
        Contestant("vqkernels-learn", "vqkernels, learned codebook (Adam)", _ours_training(True)),
        Contestant("vqtorch-learn", "vector-quantize-pytorch, learned codebook (Adam)", _vqtorch_training(True), 24.2),
    )
}


def train_peers(case: Case) -> list[tuple[Contestant, Contestant]]:
    """Pairs (ours, theirs) with the same settings."""
    pairs = [(TRAIN["vqkernels-ema"], TRAIN["vqtorch-ema"])]
    if case.metric != "cosine":
        pairs.append((TRAIN["vqkernels-learn"], TRAIN["vqtorch-learn"]))
    return pairs
