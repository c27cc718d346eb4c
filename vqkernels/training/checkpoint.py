"""One file holds everything needed to go on: weights, optimiser, step, history; safetensors, no pickle.

Called by :mod:`vqkernels.training.loop`. A single file renamed into place cannot be half new and half old, and a digest
of the tensors finds damage that the format itself does not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqkernels._files import replace_file
from vqkernels.models.pretrained import load_weights
from vqkernels.training.config import TrainingError, require

__all__ = ["FORMAT", "load_checkpoint", "optimizer_tensors", "restore_model", "restore_optimizer", "save_checkpoint"]

FORMAT = "vqkernels-checkpoint-1"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        if t.numel():
            digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint in one step.

    Args:
        path: final name.
        tensors: any device; names are prefixed by what they belong to ("model.", "optimizer.", ...).
        state: json values: step, config, history.

    Raises:
        OSError: the folder cannot be written; an older checkpoint is untouched.
    """
    on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {"format": FORMAT, "sha256": _digest(on_cpu), "state": json.dumps(state)}
    replace_file(path, require("safetensors.torch").save(on_cpu, metadata=metadata))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify what :func:`save_checkpoint` wrote.

    Args:
        path: the file.

    Returns:
        Tensors on the CPU, and the json state.

    Raises:
        TrainingError: there is no such file, it is damaged, or something else wrote it.
    """
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except FileNotFoundError as e:
        raise TrainingError(f"there is no checkpoint {path}") from e
    except Exception as e:  # safetensors' own type, OSError, ...: whatever damage leads to
        raise TrainingError(f"checkpoint {path} is damaged: {e}") from e
    if metadata.get("format") != FORMAT:
        raise TrainingError(f"{path} is no checkpoint of vqkernels train (format {metadata.get('format')!r})")
    if metadata.get("sha256") != _digest(tensors):
        raise TrainingError(f"checkpoint {path} is damaged: its contents do not match their checksum")
    try:
        return tensors, dict(json.loads(metadata["state"]))
    except (KeyError, ValueError, TypeError) as e:
        raise TrainingError(f"checkpoint {path} is damaged: its state cannot be read ({e})") from e


def _strip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def restore_model(model: torch.nn.Module, tensors: Mapping[str, Tensor], path: Path, prefix: str = "model") -> None:
    """Put the weights of a checkpoint into ``model``.

    Raises:
        TrainingError: the checkpoint is of a model of other sizes; ``model`` is unchanged.
    """
    try:
        load_weights(model, _strip(tensors, f"{prefix}."), f"checkpoint {path}")
    except ValueError as e:
        raise TrainingError(str(e)) from e


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], prefix: str = "optimizer"
) -> dict[str, Tensor]:
    """The optimiser's state by parameter name.

    Args:
        optimizer: its per-parameter state consists of tensors, as Adam's does.
        names: of the parameters.
    """
    return {
        f"{prefix}.{key}.{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    tensors: Mapping[str, Tensor],
    path: Path,
    prefix: str = "optimizer",
) -> None:
    """Put :func:`optimizer_tensors` back.

    Raises:
        TrainingError: a parameter has no state in the checkpoint, or one of another shape.
    """
    by_name: dict[str, dict[str, Tensor]] = {}
    for full, value in _strip(tensors, f"{prefix}.").items():
        key, _, name = full.partition(".")
        by_name.setdefault(name, {})[key] = value
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        state = by_name.get(names[parameter])
        fits = state and all(v.dim() == 0 or v.shape == parameter.shape for v in state.values())
        if not state or not fits:
            raise TrainingError(f"checkpoint {path} does not fit this model: optimizer state of {names[parameter]}")
        # Step counters stay on the CPU, where the optimiser made them; moments follow their parameter.
        optimizer.state[parameter] = {k: v if v.dim() == 0 else v.to(parameter.device) for k, v in state.items()}
