"""``explain``: which backend would run a call of a public function, and why not the others.

Called by users; puts public arguments into the shapes of the ops and asks ``dispatch``.
"""

from __future__ import annotations

from typing import Any

import torch

from vqkernels import _arguments as arguments
from vqkernels import dispatch

__all__ = ["explain"]

# Ops with a public function of the same name.
PUBLIC = ("nearest", "residual_nearest", "lookup", "codebook_sum")


def explain(op: str, *args: Any, backend: str = "auto", **options: Any) -> str:
    """Which backend runs a call, and why not the others, one line each.

    Args:
        op: ``"nearest"``, ``"residual_nearest"``, ``"lookup"``, ``"codebook_sum"``, ``"ema_update"``,
            ``"quantize_grad"``, ``"quantize_output"``, ``"soft_assign"`` or ``"soft_assign_grad"``.
        *args: what you would pass to the public function of that name (the op itself for the last five).
        backend: as in :func:`vqkernels.nearest`.
        **options: keyword arguments of the function, such as ``metric``.

    Raises:
        ValueError: there is no such op.

    Example:
        >>> import torch, vqkernels
        >>> print(vqkernels.explain("nearest", torch.zeros(4, 8), torch.zeros(16, 8), backend="reference"))
        ... # doctest: +ELLIPSIS
        nearest on cpu: reference
        ...
    """
    if op not in dispatch.OPS:
        raise ValueError(f"op is {op!r}; expected one of {', '.join(map(repr, dispatch.OPS))}")
    schema = getattr(torch.ops.vqkernels, op).default._schema.arguments[:-1]
    names = [a.name for a in schema]
    given = dict(zip(names, args, strict=False)) | options
    if unknown := [n for n in given if n not in names]:
        raise ValueError(f"{op} has no argument {unknown[0]!r}; it has {', '.join(names)}")
    if op in PUBLIC:  # the others take the shapes of the ops
        codebook = given.get("codebook")
        heads = codebook is not None and codebook.dim() == 3
        if codebook is not None:
            given["codebook"] = arguments.to_codes(codebook)
        if "codebooks" in given:
            given["codebooks"] = [arguments.to_codes(codes) for codes in given["codebooks"]]
        for name, canonical in (("x", arguments.to_rows), ("indices", arguments.to_positions)):
            if name in given:
                given[name] = canonical(given[name], heads)
    full = tuple(given.get(a.name, a.default_value) for a in schema)
    return dispatch.explain(op, full, backend)
