"""Loading a ``state_dict`` into a ``VectorQuantizer``: foreign layouts translated, and all of it or nothing.

Called by :class:`vqkernels.nn.VectorQuantizer` only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vqkernels.nn import checkpoints

__all__ = ["load"]


def load(
    module: nn.Module,
    default: Callable[..., None],
    state_dict: Mapping[str, Any],
    prefix: str,
    args: tuple[Any, ...],
) -> None:
    """``Module._load_from_state_dict`` with translation and a check of every shape before the first copy.

    Args:
        module: the quantizer.
        default: torch's own method, bound.
        state_dict, prefix: as torch passes them.
        args: local_metadata, strict, missing_keys, unexpected_keys, error_msgs.
    """
    own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
    target = {k: v for k, v in module.state_dict().items() if "." not in k}  # children check their own
    if "codebook" not in own and (translated := checkpoints.translate(own)) is not None:
        found, understood = translated
        found = {k: _without_head(v, target[k]) if k in target else v for k, v in found.items()}
        complete = checkpoints.defaults(found["codebook"], found.get("cluster_size")) | found
        # Where the codes are: a module on meta takes these as they are (``assign=True``).
        device = found["codebook"].device
        counters = {k: torch.zeros_like(target[k], device=device) for k in ("code_counts", "steps")}
        rest = {k: v for k, v in own.items() if k not in understood}
        own = rest | {k: v for k, v in complete.items() if k in target} | counters
    errors = [
        f"size mismatch for {prefix}{k}: the checkpoint has {tuple(own[k].shape)}, this quantizer has {tuple(v.shape)}"
        for k, v in target.items()
        if k in own and own[k].shape != v.shape
    ]
    if errors:
        args[-1].extend(errors)
        return
    if args[0].get("assign_to_params_buffers"):  # no copy that would widen them; see LearnedCodebook._apply
        halves = (torch.float16, torch.bfloat16)
        own = {k: v.detach().float() if k in target and v.dtype in halves else v for k, v in own.items()}
    default({prefix + k: v for k, v in own.items()}, prefix, *args)


def _without_head(x: Tensor, like: Tensor) -> Tensor:
    """(1, K, ...) as (K, ...) where there is one head."""
    return x.squeeze(0) if x.dim() == like.dim() + 1 and x.shape[0] == 1 else x
