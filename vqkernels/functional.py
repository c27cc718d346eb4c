"""The public functions: search, gather, per-code sums, and the differentiable quantizer built from them.

Called by users and by :mod:`vqkernels.nn`; calls the ops. Gradients are those of
:mod:`vqkernels._gradients`, outside the ops.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqkernels import _arguments as arguments
from vqkernels import _gradients, dispatch, ops

__all__ = [
    "Quantized",
    "VQOutput",
    "codebook_sum",
    "lookup",
    "nearest",
    "quantize_rows",
    "vector_quantize",
]


class VQOutput(NamedTuple):
    """What a quantizer returns.

    Attributes:
        quantized: the chosen codes, shape and dtype of the input; carries the gradient estimator's gradient.
        indices: int64, one per row; -1 where the row was masked.
        loss: ``codebook_loss + beta * commitment_loss`` (an EMA module: ``beta * commitment_loss``), 0-d.
        codebook_loss: mean |sg(z) - e|^2 per element; its gradient goes to the codebook only.
        commitment_loss: mean |z - sg(e)|^2 per element; its gradient goes to the input only.
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


def nearest(
    x: Tensor, codebook: Tensor, *, metric: str = "l2", backend: str = "auto", precision: str = "exact"
) -> tuple[Tensor, Tensor]:
    """The nearest code of every row, exactly; the lowest index on ties. Never builds an N x K matrix.

    The answer is the arg-min (arg-max) of the distance (similarity) between the *given* values, evaluated in float64:
    the same on every backend, batch split and thread count. Not differentiable: both results are detached.

    Args:
        x: rows (..., D), or (H, ..., D) with a codebook of H heads; float32, bfloat16, float16 or float64, any
            strides (a feature map passed as ``z.movedim(1, -1)`` is read where it is).
        codebook: (K, D) or (H, K, D), any of the same dtypes, not necessarily the same one.
        metric: ``"l2"`` squared distance, ``"cosine"`` x.e / |e|, ``"dot"`` x.e.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"reference"``; see :func:`vqkernels.use_backend`.
        precision: ``"exact"``, or ``"fast"`` to skip the certificate (a code within rounding of the best).

    Returns:
        ``indices`` int64 (...) and ``score`` float32 (...): the squared distance, or the similarity, of the chosen
        code. A row with NaN or Inf gets the code that compares best among the finite comparisons, 0 if there is none;
        other rows are not affected.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, metric, precision or backend are not as above.
        Unsupported: the backend that was asked for cannot run here.

    Example:
        >>> import torch, vqkernels
        >>> indices, score = vqkernels.nearest(torch.tensor([[0.9, 0.2], [0.0, 2.0]]), torch.eye(2))
        >>> indices.tolist(), [round(s, 2) for s in score.tolist()]
        ([0, 1], [0.05, 1.0])
    """
    arguments.check_choice("metric", metric)
    arguments.check_choice("precision", precision)
    if backend != "auto" and not torch.compiler.is_compiling():  # what context and environment ask for, the op reads
        dispatch.requested(backend)
    arguments.check_codebook(codebook)
    arguments.check_rows("x", x, codebook)
    rows = arguments.to_rows(_detached(x), codebook.dim() == 3)
    indices, score = ops.nearest(rows, arguments.to_codes(_detached(codebook)), metric, precision, backend)
    shape = x.shape[:-1]
    return indices.reshape(shape), score.reshape(shape)


def lookup(codebook: Tensor, indices: Tensor) -> Tensor:
    """The codes with the given indices; index -1 ("no code") gives zeros.

    Differentiable with respect to ``codebook``; the backward pass is deterministic (no float atomics). Inside of
    ``torch.func`` it is indexing, with its derivatives of any order.

    Args:
        codebook: (K, D), or (H, K, D) with heads.
        indices: integers in [-1, K), any shape (...), or (H, ...) with heads.

    Returns:
        values (..., D), or (H, ..., D), in the codebook's dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices are not as above, or an index is out of range (checked on CPU).

    Example:
        >>> import torch, vqkernels
        >>> vqkernels.lookup(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, -1])).tolist()
        [[3.0, 4.0], [0.0, 0.0]]
    """
    arguments.check_codebook(codebook)
    heads = codebook.dim() == 3
    positions = _positions(indices, codebook, heads, codebook.shape[0])
    values = lookup_rows(arguments.to_codes(codebook), positions, False)
    return values.reshape((*indices.shape, codebook.shape[-1]))


def codebook_sum(x: Tensor, indices: Tensor, num_codes: int, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Per code, the sum and the number of the rows that chose it; the same bits in every run.

    Not differentiable: both results are detached.

    Args:
        x: rows (N, D) or (..., D) with ``indices`` (...).
        indices: integers in [-1, num_codes), shape ``x.shape[:-1]``; -1 rows are skipped.
        num_codes: K.
        mask: bool, shape ``x.shape[:-1]``; False rows are skipped.

    Returns:
        ``sums`` (K, D) float32 (float64 for float64 ``x``) and ``counts`` (K,) float32.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices are not as above, or an index is out of range (checked on CPU).

    Example:
        >>> import torch, vqkernels
        >>> sums, counts = vqkernels.codebook_sum(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0, 2, 0]), 3)
        >>> sums.tolist(), counts.tolist()
        ([[5.0], [0.0], [2.0]], [2.0, 0.0, 1.0])
    """
    arguments.check_float_tensor("x", x)
    if x.dim() < 1:
        raise ValueError(f"x has shape {arguments.shape_of(x)}; expected (..., D)")
    arguments.check_count("num_codes", num_codes)
    positions = _positions(indices, x, False, None)
    if indices.shape != x.shape[:-1]:
        raise ValueError(
            f"indices has shape {arguments.shape_of(indices)}; expected {tuple(x.shape[:-1])}, one per row of x"
        )
    if mask is not None:
        arguments.check_mask(mask, x.shape[:-1], x, False)
        positions = torch.where(arguments.to_positions(mask, False), positions, -1)
    sums, counts = ops.codebook_sum(arguments.to_rows(_detached(x), False), positions, num_codes)
    return sums.squeeze(0), counts.squeeze(0)


def vector_quantize(
    z: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    beta: float = 0.25,
    gradient: str = "straight_through",
    mask: Tensor | None = None,
) -> VQOutput:
    """Quantize rows: search, gather, both loss terms and their gradients, without an N x K matrix.

    Equivalent to::

        e = codebook[nearest(z, codebook, metric=metric)[0]]
        codebook_loss, commitment_loss = F.mse_loss(e, z.detach()), F.mse_loss(z, e.detach())
        quantized = z + (e - z).detach()        # returned as the code itself, without the rounding of z + (e - z)

    Both losses compare the raw ``z`` with the raw codes whatever the metric is; normalise first (or use
    :class:`vqkernels.VectorQuantizer`) for unit vectors. The backward pass is one pass over ``z`` and one
    deterministic sum per code; gradients of gradients are not implemented and raise. Inside of ``torch.func``, and for
    forward-mode derivatives, all but the search is what is written above, with derivatives of any order.

    Args:
        z: rows (..., D), or (H, ..., D) with heads; any strides.
        codebook: (K, D) or (H, K, D).
        metric: ``"l2"``, ``"cosine"`` or ``"dot"``, as in :func:`nearest`.
        beta: weight of the commitment loss in ``loss``; non-negative.
        gradient: what ``quantized`` passes back to ``z``: ``"straight_through"`` (van den Oord et al. 2017) the
            gradient itself, ``"rotation"`` (Fifty et al. 2024) rotated and scaled as z onto its code, ``"none"``.
        mask: bool (...), True for valid rows. Masked rows get index -1, zeros, no loss and no gradient; the losses
            are means over the valid rows.

    Returns:
        :class:`VQOutput`; losses are float32 0-d tensors (float64 for float64 ``z``), 0 when there is no valid row.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options are not as above.

    Example:
        >>> import torch, vqkernels
        >>> out = vqkernels.vector_quantize(torch.tensor([[0.5, 0.0]]), torch.eye(2))
        >>> out.quantized.tolist(), out.indices.tolist(), out.loss.item()
        ([[1.0, 0.0]], [0], 0.15625)
    """
    arguments.check_choice("metric", metric)
    arguments.check_choice("gradient", gradient)
    arguments.check_number("beta", beta)
    arguments.check_codebook(codebook)
    arguments.check_rows("z", z, codebook)
    heads = codebook.dim() == 3
    valid = None
    if mask is not None:
        arguments.check_mask(mask, z.shape[:-1], z, heads)
        valid = arguments.to_positions(mask.expand(z.shape[:-1]), heads)
    out = quantize_rows(
        arguments.to_rows(z, heads), arguments.to_codes(codebook), metric=metric, gradient=gradient, mask=valid
    )
    return VQOutput(
        out.quantized.reshape(z.shape),
        out.indices.reshape(z.shape[:-1]),
        torch.add(out.codebook_loss, out.commitment_loss, alpha=beta),
        out.codebook_loss,
        out.commitment_loss,
    )


class Quantized(NamedTuple):
    """What :func:`quantize_rows` returns: (H, B, S, D), (H, B, S), (H, B, S), and two 0-d losses."""

    quantized: Tensor
    indices: Tensor
    score: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


def quantize_rows(
    z: Tensor,
    codebook: Tensor,
    *,
    metric: str,
    gradient: str,
    mask: Tensor | None = None,
    search: tuple[Tensor, Tensor] | None = None,
    live: Tensor | None = None,
    chosen: Tensor | None = None,
) -> Quantized:
    """:func:`vector_quantize` on the canonical shapes (H, B, S, D), (H, K, D) and mask (H, B, S), unchecked.

    ``search`` are the rows and codes to compare if they are not ``z`` and ``codebook`` themselves (the cosine module
    compares what it was given and quantizes unit vectors). ``live`` is what ``codebook`` was copied from, because it is
    about to change: it is what is searched, for a search finds by address what it packed. ``chosen`` (H, B, S) skips
    the search, and the score is 0.
    """
    rows, codes = search or (z, codebook if live is None else live)
    if chosen is None:
        indices, score = ops.nearest(_detached(rows), _detached(codes), metric)
    else:
        indices, score = chosen, torch.zeros_like(chosen, dtype=torch.float32)
    if mask is not None:
        indices = torch.where(mask, indices, -1)
        score = torch.where(mask, score, 0.0)
    # The search already measured |z - e|^2, rounded once from float64; only float64 callers want more digits.
    measured = metric == "l2" and search is None and chosen is None
    distance = score if measured and z.dtype != torch.float64 else None
    quantized, codebook_loss, commitment_loss = _gradients.quantize(
        z, codebook, indices, distance, mask is not None, gradient
    )
    return Quantized(quantized, indices, score, codebook_loss, commitment_loss)


def _detached(x: Tensor) -> Tensor:
    # A tensor inside of torch.func tells what the innermost transform alone wants.
    return x.detach() if x.requires_grad or torch._C._are_functorch_transforms_active() else x


def lookup_rows(codebook: Tensor, indices: Tensor, channel_first: bool) -> Tensor:
    """:func:`lookup` on the canonical shapes: (H, K, D) and (H, B, S) to (H, B, S, D), laid out as asked."""
    return _gradients.lookup(codebook, indices, channel_first)


def _positions(indices: Tensor, like: Tensor, heads: bool, num_heads: int | None) -> Tensor:
    """Checked indices as (H, B, S) int64."""
    arguments.check_indices(indices)
    if indices.device != like.device:
        raise ValueError(f"indices is on {indices.device}, the other argument on {like.device}; expected one device")
    if heads and (indices.dim() < 1 or indices.shape[0] != num_heads):
        raise ValueError(
            f"indices has shape {arguments.shape_of(indices)}; expected (H, ...) with H = {num_heads} heads"
        )
    return arguments.to_positions(indices.long(), heads)
