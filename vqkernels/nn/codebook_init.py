"""First values of a codebook: two random distributions, and k-means on a batch.

Called by :class:`vqkernels.nn.VectorQuantizer`. k-means is built on ``nearest`` and ``codebook_sum``: never N x K,
and the same codes on every process.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vqkernels import ops
from vqkernels.nn._distributed import all_reduce, rank_and_size

__all__ = ["INITS", "kmeans", "random_codes_"]

INITS = ("uniform", "normal", "kmeans")


def random_codes_(codebook: Tensor, init: str) -> None:
    """Fill (..., K, D) in place: N(0, 1) for ``"normal"``, else U(-1/K, 1/K) as van den Oord et al. (2017) do."""
    with torch.no_grad():
        if init == "normal":
            codebook.normal_()
        else:
            codebook.uniform_(-1.0 / codebook.shape[-2], 1.0 / codebook.shape[-2])


def kmeans(
    rows: Tensor,
    num_codes: int,
    *,
    valid: Tensor | None = None,
    metric: str = "l2",
    normalize: bool = False,
    iterations: int = 10,
    seed: int = 0,
    sync: bool = True,
) -> tuple[Tensor, Tensor] | None:
    """Lloyd's algorithm from distinct random rows; a function of the data and ``seed`` only.

    A code that loses all its rows starts again from another row; after the last iteration it stays where it is.

    Args:
        rows: (H, B, S, D), any strides and floating dtype; rows with NaN or Inf are left out.
        num_codes: K; with fewer rows than codes some codes coincide.
        valid: bool (H, B, S), rows to use.
        metric: how rows choose their code, ``"l2"`` or ``"cosine"`` (``"dot"`` clusters by ``"l2"``).
        normalize: keep the codes on the unit sphere.
        iterations: of Lloyd's algorithm; 0 takes the random rows themselves.
        seed: of the choice of rows.
        sync: use the rows of all processes; every process must call.

    Returns:
        ``codes`` (H, K, D) float32 and their ``counts`` (H, K) float32, or ``None`` if no process has a row.

    Example:
        >>> import torch
        >>> codes, counts = kmeans(torch.tensor([0.0, 1.0, 10.0, 11.0]).view(1, 1, 4, 1), 2)
        >>> sorted(codes.flatten().tolist()), counts.tolist()
        ([0.5, 10.5], [[2.0, 2.0]])
    """
    with torch.no_grad():
        usable = rows.isfinite().all(-1)
        usable = usable if valid is None else usable & valid
        draw = _sampler(rows, usable, num_codes, seed, sync)
        if draw is None:
            return None
        metric = metric if metric == "cosine" else "l2"
        codes = F.normalize(draw(), dim=-1) if normalize else draw()
        counts = codes.new_ones(codes.shape[:-1])
        for i in range(iterations):
            indices, _ = ops.nearest(rows, codes, metric)
            sums, counts = ops.codebook_sum(rows, torch.where(usable, indices, -1), num_codes)
            sums, counts = all_reduce([sums.float(), counts], sync)
            # Drawn on every process in every iteration, needed or not: the collectives must match.
            spare = draw() if i + 1 < iterations else codes
            codes = torch.where(counts[..., None] > 0, sums / counts[..., None].clamp(min=1), spare)
            codes = F.normalize(codes, dim=-1) if normalize else codes
        return codes, counts


def _sampler(rows: Tensor, usable: Tensor, num_codes: int, seed: int, sync: bool) -> Callable[[], Tensor] | None:
    """A function that draws K rows (H, K, D) of all processes' rows, the same on each; distinct if there are enough."""
    h, _, s, d = rows.shape
    ids = usable.all(0).flatten().nonzero().squeeze(1)
    rank, size = rank_and_size(sync)
    sizes = torch.zeros(size, dtype=torch.int64, device=rows.device)
    sizes[rank] = len(ids)
    (sizes,) = all_reduce([sizes], sync)
    total, begin = int(sizes.sum()), int(sizes[:rank].sum())
    if total == 0:
        return None
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        picks = torch.randperm(total, generator=generator)[:num_codes]
        if total < num_codes:
            picks = torch.cat([picks, torch.randint(total, (num_codes - total,), generator=generator)])
        mine = picks.to(rows.device) - begin
        own = (mine >= 0) & (mine < len(ids))
        row = ids[mine[own]]
        values = torch.zeros((h, num_codes, d), device=rows.device)
        values[:, own] = rows[:, row // s, row % s].float()
        return all_reduce([values], sync)[0]

    return draw
