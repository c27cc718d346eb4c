"""``nearest`` in pure PyTorch: any device, exact, O(N + K*D) memory. The fallback, and written to be read.

Called by ``dispatch``. Two stages, as on every backend. *Screen*: a matmul in floating point, with a rigorous bound
on its error. *Decide*: the few codes that the bound cannot tell apart, in float64 in one fixed order.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Scores that a chunk of rows may hold at a time: 16 MB in float32, whatever N and K are.
CHUNK_ELEMENTS = 2**22


def supports(x: Tensor, codebook: Tensor, metric: str, precision: str) -> str | None:
    """Everything."""
    return None


def run(x: Tensor, codebook: Tensor, metric: str, precision: str) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring; ``precision="fast"`` runs the exact search too."""
    h, b, s, d = x.shape
    device = x.device
    if device.type == "mps":  # no float64 there
        indices, score = run(x.cpu(), codebook.cpu(), metric, precision)
        return indices.to(device), score.to(device)
    indices = torch.empty((h, b, s), dtype=torch.int64, device=device)
    score = torch.empty((h, b, s), dtype=torch.float32, device=device)
    for head in range(h):
        _search(x[head].reshape(b * s, d), codebook[head], metric, indices[head].view(-1), score[head].view(-1))
    return indices, score


def _search(x: Tensor, codebook: Tensor, metric: str, indices: Tensor, score: Tensor) -> None:
    """One head: ``x`` (N, D), ``codebook`` (K, D); writes ``indices`` and ``score`` (N,)."""
    n, d = x.shape
    k = codebook.shape[0]
    codes = codebook.double()
    norms = _norms(codes) if metric == "cosine" else None

    # Screen: a similarity t to maximise, and |computed t - t| <= eps. Distances do not change when the mean code is
    # subtracted from both sides, and without a common offset there is far less to cancel.
    finite = codes.isfinite().all(1)
    if metric == "l2":
        kept = codes[finite]
        centre = kept.mean(0) if len(kept) else torch.zeros(d, dtype=torch.float64, device=x.device)
        target = codes - centre
        half = target.square().sum(1) / 2
    else:
        centre = torch.zeros(d, dtype=torch.float64, device=x.device)
        target = codes if norms is None else codes / torch.where(norms > 0, norms, 1.0)[:, None]
        half = torch.zeros(k, dtype=torch.float64, device=x.device)
    reach = target.norm(dim=1)
    # float64 matmul in any order of summation, centring and h included; twice the textbook gamma for safety.
    unit = 2.0 * (d + 8) * 2.0**-53

    rows = max(1, CHUNK_ELEMENTS // max(k, 1))
    for begin in range(0, n, rows):
        part = x[begin : begin + rows].double()
        shifted = part - centre
        t = shifted @ target.T - half
        length = shifted.norm(dim=1)
        eps = unit * (length[:, None] * reach + half + length.square()[:, None]) + 1e-300
        best = (t - eps).nan_to_num(nan=-torch.inf, posinf=-torch.inf).amax(1, keepdim=True)
        # A row or a code that is not finite has no bound: all its pairs are decided in float64.
        row, code = ((t + eps >= best) | ~(t + eps).isfinite()).nonzero(as_tuple=True)
        value = _decide(part, codes, norms, row, code, metric)
        stop = begin + part.shape[0]
        indices[begin:stop] = _winner(value, row, code, part.shape[0], k)
        every = torch.arange(part.shape[0], device=x.device)
        chosen = _decide(part, codes, norms, every, indices[begin:stop], metric)
        score[begin:stop] = (chosen if metric == "l2" else -chosen).float()


def _norms(codes: Tensor) -> Tensor:
    """|e| of every code, summed in ascending d."""
    total = torch.zeros(codes.shape[0], dtype=torch.float64, device=codes.device)
    for column in codes.unbind(1):
        total = total + column * column
    if total.device.type != "cpu":
        return total.sqrt()
    # torch's CPU sqrt is MKL's, which misses the correctly rounded result in some last bits; the contract needs it.
    return torch.from_numpy(np.sqrt(total.numpy()))


def _decide(x: Tensor, codes: Tensor, norms: Tensor | None, row: Tensor, code: Tensor, metric: str) -> Tensor:
    """The value to minimise for each pair (row, code), in the one order that every backend uses."""
    total = torch.zeros(row.shape[0], dtype=torch.float64, device=x.device)
    for i in range(x.shape[1]):
        a, e = x[:, i][row], codes[:, i][code]
        if metric == "l2":
            difference = a - e
            total = total + difference * difference
        else:
            total = total + a * e
    if norms is not None:
        length = norms[code]
        total = torch.where(length > 0, total / length, torch.where(total.isnan(), total, 0.0 * total))
    return total if metric == "l2" else -total


def _winner(value: Tensor, row: Tensor, code: Tensor, n: int, k: int) -> Tensor:
    """Per row the lowest code with the smallest value; NaN and +inf never win; 0 if nothing can."""
    value = torch.where(value.isnan(), torch.inf, value)
    least = torch.full((n,), torch.inf, dtype=torch.float64, device=value.device)
    least.scatter_reduce_(0, row, value, "amin")
    wins = (value == least[row]) & (value < torch.inf)
    index = torch.full((n,), k, dtype=torch.int64, device=value.device)
    index.scatter_reduce_(0, row, torch.where(wins, code, k), "amin")
    return torch.where(index == k, 0, index)
