"""What taming-transformers and its descendants return: one loss, and indices that may be positions in a list of codes.

Called by the families beside this file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqkernels.recognisers._feature_maps import QuantizedMap

__all__ = ["remap_to_used", "shaped_indices", "weighted_loss"]


def remap_to_used(module: Any, indices: Tensor) -> Tensor:
    """Positions of indices in ``used`` by a table of O(K), where the original compares every index with every entry."""
    if indices.dim() < 2:
        raise AssertionError(f"inds has shape {tuple(indices.shape)}; expected at least two dims")
    rows = indices.reshape(indices.shape[0], -1)
    used = module.used.to(rows)
    unknown_place, outside = len(used), module.embedding.num_embeddings
    # Two entries more than codes: one for entries of `used` that are no index, one for indices that are none.
    table = used.new_full((outside + 2,), unknown_place)
    valid = (used >= 0) & (used < outside)
    places = torch.arange(len(used), device=used.device, dtype=used.dtype)
    table.scatter_reduce_(0, torch.where(valid, used, outside), places, "amin")  # the first place of a duplicate
    table[outside:] = unknown_place
    new: Tensor = table[torch.where((rows >= 0) & (rows < outside), rows, outside + 1)]
    unknown = new == unknown_place
    if module.unknown_index == "random":
        # Drawn as the original draws, on the CPU and by count: the same seed gives the same indices.
        new[unknown] = torch.randint(0, module.re_embed, size=new[unknown].shape).to(device=new.device)
    else:
        new[unknown] = module.unknown_index
    return new.reshape(indices.shape)


def weighted_loss(module: Any, out: QuantizedMap) -> Tensor:
    """The sum of both losses, ``beta`` at the codebook's if ``legacy`` and at the commitment's otherwise."""
    loss: Tensor
    if module.legacy:
        loss = out.commitment_loss + module.beta * out.codebook_loss
    else:
        loss = module.beta * out.commitment_loss + out.codebook_loss
    return loss


def shaped_indices(module: Any, indices: Tensor, z: Tensor) -> Tensor:
    """Remapped where the module asks for it, then in the shape of the map ``z`` if ``sane_index_shape``."""
    if module.remap is not None:
        indices = module.remap_to_used(indices.reshape(z.shape[0], -1)).reshape(-1, 1)
    return indices.reshape(z.shape[0], *z.shape[2:]) if module.sane_index_shape else indices
