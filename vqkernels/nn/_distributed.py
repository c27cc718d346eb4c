"""The one collective that the modules use: a sum of several tensors over all processes, in one call; and FSDP.

Called by :mod:`vqkernels.nn`. Whether a process group exists is asked at every call, never remembered.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["all_reduce", "is_sharded", "rank_and_size"]


def rank_and_size(sync: bool = True) -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without a process group or with ``sync`` off."""
    if not sync or not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def all_reduce(tensors: Sequence[Tensor], sync: bool = True) -> list[Tensor]:
    """The sums of ``tensors`` (one dtype) over all processes: one collective, the same on every rank."""
    if rank_and_size(sync)[1] == 1:
        return list(tensors)
    packed = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(packed)
    parts = torch.split(packed, [t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP holds the module's parameters: in forward they are then copies, and writing there is lost."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))  # FSDP 1 and 2 set it, for Dynamo
