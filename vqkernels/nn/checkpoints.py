"""Other libraries' names and shapes for a codebook in a ``state_dict``, translated into ours.

Called by :meth:`vqkernels.nn.VectorQuantizer.load_state_dict`. Layouts (keys below the quantizer's own prefix):

* ``embedding.weight`` (K, D): taming-transformers, LDM, LlamaGen, diffusers, transformers' Chameleon/Janus, VAR
* ``embeddings.weight`` (K, D): tutorials
* ``_embedding.weight`` (K, D), with a moving average ``_ema_cluster_size`` and ``_ema_w`` (K, D): the VQ-VAE notebook
  of zalandoresearch/pytorch-vq-vae and its many copies
* ``codebook.weight`` (K, D): descript-audio-codec and transformers' DAC
* ``_codebook.embed`` (H, K, D), ``.cluster_size``, ``.embed_avg``, ``.initted``: vector-quantize-pytorch
* ``embed`` (K, D), ``cluster_size``, ``embed_avg``, ``inited``, also below ``codebook.`` or ``_codebook.``: EnCodec
* ``embed`` (D, K), ``cluster_size``, ``embed_avg`` (D, K), no flag: rosinality's vq-vae-2-pytorch
* levels as ``vq.layers.{i}`` (EnCodec, Moshi) or ``quantizers.{i}`` with ``in_proj``/``out_proj`` (DAC, also weight
  normalised), ``input_proj``/``output_proj`` (Mimi, Moshi), for the residual quantizers
* ``embed_sum`` or ``embedding_sum``, ``cluster_usage``, ``initialized``, below the same prefixes: Mimi, Moshi
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["rename_levels", "rename_parts", "translate"]

_WEIGHTS = ("embedding.weight", "embeddings.weight", "_embedding.weight", "codebook.weight")
_NOTEBOOK = {"cluster_size": "_ema_cluster_size", "embed_avg": "_ema_w"}
_PREFIXES = ("", "_codebook.", "codebook.")
_FLAGS = ("initted", "inited", "initialized", "_initialized")
# Counters of the last tokens seen, which mean nothing here.
_DROPPED = ("codebook_used", "used")


def translate(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]] | None:
    """Read a foreign layout.

    Args:
        state: the entries below the quantizer's prefix, without it.

    Returns:
        ``codebook`` and what else there is of ``cluster_size``, ``embed_avg`` and ``initialized``, and the keys that
        were understood; ``None`` if this is no layout of the list above.
    """
    dropped = [key for key in _DROPPED if key in state]
    for key in _WEIGHTS:
        if key in state:
            averages = {name: k for name, k in _NOTEBOOK.items() if k in state}
            found = {"codebook": state[key]} | {name: state[k] for name, k in averages.items()}
            return found, [key, *averages.values(), *dropped]
    for prefix in _PREFIXES:
        names = {name: prefix + name for name in ("cluster_size", "embed_avg") if prefix + name in state}
        flag = next((prefix + name for name in _FLAGS if prefix + name in state), None)
        if (key := prefix + "embed") in state:
            found = {"codebook": state[key]} | {name: state[k] for name, k in names.items()}
            keys = [key, *names.values()]
            if flag is None and not prefix:
                found = {n: t.transpose(-1, -2) if n != "cluster_size" else t for n, t in found.items()}
        elif total := next((prefix + n for n in ("embed_sum", "embedding_sum") if prefix + n in state), None):
            size = state[prefix + "cluster_usage"]
            codes = state[total] / size.clamp(min=1e-5).unsqueeze(-1)
            found = {"codebook": codes, "cluster_size": size, "embed_avg": state[total]}
            keys = [total, prefix + "cluster_usage"]
        else:
            continue
        if flag is not None:
            found["initialized"] = state[flag].reshape(-1)[:1].bool().squeeze()
            keys.append(flag)
        return found, [*keys, *dropped]
    return None


def defaults(codebook: Tensor, cluster_size: Tensor | None) -> dict[str, Tensor]:
    """Statistics that agree with the codes, for a layout that has none."""
    size = torch.ones(codebook.shape[:-1], device=codebook.device) if cluster_size is None else cluster_size
    return {
        "cluster_size": size,
        "embed_avg": codebook.float() * size.unsqueeze(-1),
        "initialized": torch.ones((), dtype=torch.bool, device=codebook.device),
    }


# Names of other libraries' containers and projections: (pattern, replacement), applied below a quantizer's prefix.
_LEVEL_NAMES = (
    (r"^(?:vq\.|model\.)?layers\.(\d+)\.", r"layers.\1."),
    (r"^quantizers\.(\d+)\.", r"layers.\1."),
    (r"^input_proj\.", "project_in."),
    (r"^output_proj\.", "project_out."),
    (r"^(layers\.\d+)\.in_proj\.", r"\1.project_in."),
    (r"^(layers\.\d+)\.out_proj\.", r"\1.project_out."),
)


def rename_levels(state_dict: dict[str, Any], prefix: str, shared_codebook: bool) -> None:
    """Moshi's, DAC's and Mimi's names of levels and projections become ours, in place, before children load.

    A shared codebook is one module here: copies under ``layers.1`` and so on (vector-quantize-pytorch) are dropped.
    """
    for key in [k for k in state_dict if k.startswith(prefix)]:
        name = key[len(prefix) :]
        for pattern, replacement in _LEVEL_NAMES:
            name = re.sub(pattern, replacement, name)
        value = state_dict.pop(key)
        if not (shared_codebook and re.match(r"layers\.[1-9]\d*\.", name)):
            state_dict[prefix + name] = value


def rename_parts(state_dict: dict[str, Any], prefix: str, names: Mapping[str, str]) -> None:
    """Children under other names, as ``{"rvq_first.": "semantic."}``, become ours, in place, before they load."""
    for old, new in names.items():
        for key in [k for k in state_dict if k.startswith(prefix + old)]:
            state_dict[prefix + new + key[len(prefix + old) :]] = state_dict.pop(key)
