"""``nearest`` in pure PyTorch: any device, exact, O(N + K*D) memory. The fallback, and written to be read.

Called by ``dispatch``. Two stages, as on every backend. *Screen*: a matmul in floating point, with a rigorous bound
on its error. *Decide*: the few codes that the bound cannot tell apart, in float64 in one fixed order.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Elements that a temporary may hold, whatever N and K are: 8 MB in float64, a few such arrays at once.
CHUNK_ELEMENTS = 2**20


def supports(x: Tensor, codebook: Tensor, metric: str, precision: str) -> str | None:
    """Everything."""
    return None


def run(x: Tensor, codebook: Tensor, metric: str, precision: str) -> tuple[Tensor, Tensor]:
    """See the contract in the package docstring; ``precision="fast"`` runs the exact search too."""
    h, b, s, d = x.shape
    device = x.device
    indices = torch.empty((h, b, s), dtype=torch.int64, device=device)
    score = torch.empty((h, b, s), dtype=torch.float32, device=device)
    rows = max(1, CHUNK_ELEMENTS // max(codebook.shape[1], d))
    for head in range(h):
        codes = _Codes(codebook[head], metric)
        for image in range(0, b, images := max(1, rows // max(s, 1))):
            for begin in range(0, s, rows):
                here = (head, slice(image, image + images), slice(begin, begin + rows))
                part = x[here]
                found, value = _search(part.reshape(-1, d).double(), codes)
                indices[here], score[here] = found.view(part.shape[:2]), value.view(part.shape[:2])
    return indices, score


class _Codes:
    """One head's codes (K, D) in float64, and what the screen needs of them.

    The screen maximises t = x'.e' - h with |computed t - t| <= eps. For "l2" x' and e' are x and e less the mean code
    (distances do not change, and without a common offset there is far less to cancel) and h = |e'|^2 / 2; for
    "cosine" e' = e / |e|; else nothing changes.
    """

    def __init__(self, codebook: Tensor, metric: str) -> None:
        self.metric = metric
        self.values = codebook.double()
        k, d = codebook.shape
        self.norms = _norms(self.values) if metric == "cosine" else None
        self.centre = torch.zeros(d, dtype=torch.float64, device=codebook.device)
        self.half = torch.zeros(k, dtype=torch.float64, device=codebook.device)
        if metric == "l2":
            kept = self.values[self.values.isfinite().all(1)]
            self.centre = kept.mean(0) if len(kept) else self.centre
            self.target = self.values - self.centre
            self.half = self.target.square().sum(1) / 2
        elif self.norms is not None:
            self.target = self.values / torch.where(self.norms > 0, self.norms, 1.0)[:, None]
        else:
            self.target = self.values
        reach = self.target.norm(dim=1)
        largest = self.values.abs().amax(1)
        # Squares beyond the range of float64 defeat the bound: such codes, and codes that are not finite, are decided
        # for every row. t = -inf keeps them out of the screen.
        extreme = (largest > 1e140) | ((largest > 0) & (largest < 1e-140))
        unsafe = extreme | ~(reach.isfinite() & self.half.isfinite())
        self.unsafe = unsafe.nonzero().squeeze(1)
        self.target = torch.where(unsafe[:, None], 0.0, self.target).T
        self.half = torch.where(unsafe, torch.inf, self.half)
        self.reach = torch.where(unsafe, 0.0, reach).amax()
        self.most_half = torch.where(unsafe, 0.0, self.half).amax()
        # Matmul in any order of summation, centring and h included; twice the textbook bound for safety.
        self.unit = 2.0 * (d + 8) * 2.0**-53


def _search(x: Tensor, codes: _Codes) -> tuple[Tensor, Tensor]:
    """``x`` (n, D) float64 against all codes: indices and scores (n,)."""
    n, k = x.shape[0], codes.values.shape[0]
    shifted = x - codes.centre
    t = torch.addmm(-codes.half, shifted, codes.target)
    length = shifted.norm(dim=1)
    eps = codes.unit * ((length + codes.centre.norm()) * codes.reach + codes.most_half + length.square()) + 1e-290
    # A row without a bound (not finite, or products beyond the range of float64) is decided against every code.
    safe = length < 1e140 if codes.metric == "l2" else (length < 1e140) & (length > 1e-140)
    threshold = torch.where(safe, t.amax(1) - 2 * eps, -torch.inf)
    row, code = (~(t < threshold[:, None])).nonzero(as_tuple=True)
    winner = _Winner(n, k, x.device)
    step = max(1, CHUNK_ELEMENTS // x.shape[1])
    for begin in range(0, len(row), step):
        part = slice(begin, begin + step)
        winner.add(_decide(x, codes, row[part], code[part]), row[part], code[part])
    every = torch.arange(n, device=x.device)
    for unsafe in codes.unsafe.split(max(1, step // n)):
        row, code = torch.cartesian_prod(every, unsafe).unbind(1)
        winner.add(_decide(x, codes, row, code), row, code)
    indices = winner.indices()
    value = _decide(x, codes, every, indices)
    return indices, (value if codes.metric == "l2" else -value).float()


def _norms(codes: Tensor) -> Tensor:
    """|e| of every code, summed in ascending d."""
    total = torch.zeros(codes.shape[0], dtype=torch.float64, device=codes.device)
    for column in codes.unbind(1):
        total = total + column * column
    if total.device.type != "cpu":
        return total.sqrt()
    # torch's CPU sqrt is MKL's, which misses the correctly rounded result in some last bits; the contract needs it.
    return torch.from_numpy(np.sqrt(total.numpy()))


def _decide(x: Tensor, codes: _Codes, row: Tensor, code: Tensor) -> Tensor:
    """The value to minimise for each pair (row, code), in the one order that every backend uses."""
    a, e = x[row], codes.values[code]
    terms = (a - e).square_() if codes.metric == "l2" else a.mul_(e)
    total = torch.zeros(row.shape[0], dtype=torch.float64, device=x.device)
    for term in terms.T.contiguous():
        total += term
    if codes.norms is not None:
        length = codes.norms[code]
        total = torch.where(length > 0, total / length, torch.where(total.isnan(), total, 0.0 * total))
    return total if codes.metric == "l2" else -total


class _Winner:
    """Per row the lowest code with the smallest value so far; NaN and +inf never win; 0 if nothing can."""

    def __init__(self, rows: int, num_codes: int, device: torch.device) -> None:
        self.least = torch.full((rows,), torch.inf, dtype=torch.float64, device=device)
        self.index = torch.full((rows,), num_codes, dtype=torch.int64, device=device)
        self.none = num_codes

    def add(self, value: Tensor, row: Tensor, code: Tensor) -> None:
        """Pairs in any order; a pair may come twice."""
        value = torch.where(value.isnan(), torch.inf, value)
        least = self.least.scatter_reduce(0, row, value, "amin")
        self.index = torch.where(least < self.least, self.none, self.index)
        wins = (value == least[row]) & (value < torch.inf)
        self.index.scatter_reduce_(0, row, torch.where(wins, code, self.none), "amin")
        self.least = least

    def indices(self) -> Tensor:
        """(rows,) int64."""
        return torch.where(self.index == self.none, 0, self.index)
