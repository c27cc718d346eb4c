"""Save a model as config.json + model.safetensors and load it again, with one clear error per kind of damage.

Used by every class in :mod:`vqkernels.models` (as a mixin) and by the checkpoints of :mod:`vqkernels.training`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from vqkernels._files import replace_file
from vqkernels.models.compression import compress, expand

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "Pretrained", "load_weights"]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

Model = TypeVar("Model", bound="Pretrained")


class _Config(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


def safetensors_torch() -> ModuleType:
    """``safetensors.torch``, or an ImportError that says what to install."""
    try:
        import safetensors.torch
    except ImportError as e:
        raise ImportError("saving and loading models needs safetensors: pip install 'vqkernels[train]'") from e
    module: ModuleType = safetensors.torch
    return module


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy ``tensors`` into ``model`` after checking every name, shape and dtype.

    Args:
        model: its ``state_dict`` names what is expected.
        tensors: name to tensor; nothing is copied unless all of them fit.
        source: where they come from, for the error.

    Raises:
        ValueError: names are missing or unknown, or a shape or dtype differs; the model is left as it was.
    """
    expected = model.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        parts = [
            f"{what}: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
            for what, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise ValueError(f"{source} does not fit this model ({'; '.join(parts)})")
    for name, want in expected.items():
        got = tensors[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            raise ValueError(
                f"{source} does not fit this model: {name} is {tuple(got.shape)} {_dtype(got)}, "
                f"expected {tuple(want.shape)} {_dtype(want)}"
            )
    model.load_state_dict(dict(tensors))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class Pretrained(nn.Module):
    """A module with a ``config`` that can be saved to a folder and loaded from it."""

    config: Any
    config_class: type[Any]

    def save_pretrained(self, folder: str | os.PathLike[str], *, weights: str = "fp32", codebook: str = "fp32") -> None:
        """Write ``config.json`` and ``model.safetensors`` to ``folder`` (made if needed), each in one step.

        Args:
            folder: where to.
            weights: "fp32", or "fp16" or "bf16" for a smaller file; :meth:`from_pretrained` gives float32 again.
            codebook: "fp32" or "int8" (:class:`vqkernels.models.Int8Codebook`). Anything but "fp32" in both leaves the
                statistics of training out, so training cannot go on as if nothing had happened.

        Raises:
            ImportError: safetensors is not installed.
            ValueError: ``weights`` or ``codebook`` is none of these, or a weight does not fit into fp16.
            OSError: the folder cannot be written.
        """
        safetensors = safetensors_torch()
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu() for name, t in self.state_dict().items()}
        config = {"model": type(self).__name__, **self.config.to_dict()}
        if (weights, codebook) != ("fp32", "fp32"):
            tensors = compress(tensors, weights, codebook)
            config["compression"] = {"weights": weights, "codebook": codebook}
        tensors = {name: t.contiguous() for name, t in tensors.items()}
        replace_file(path / WEIGHTS_NAME, safetensors.save(tensors, metadata={"format": "pt"}))
        replace_file(path / CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(cls: type[Model], folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> Model:
        """Load what :meth:`save_pretrained` wrote.

        Args:
            folder: with ``config.json`` and ``model.safetensors``.
            device: where to put the model.

        Returns:
            The model, in evaluation mode.

        Raises:
            ImportError: safetensors is not installed.
            FileNotFoundError: one of the two files is missing.
            ValueError: a file is damaged, or the weights do not fit the config.
        """
        safetensors = safetensors_torch()
        path = Path(folder)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (path / name).is_file():
                raise FileNotFoundError(f"{path} holds no {cls.__name__}: {name} is missing")
        try:
            values = json.loads((path / CONFIG_NAME).read_text())
            found = values.pop("model", cls.__name__)
            compressed = values.pop("compression", None) is not None
        except (ValueError, AttributeError) as e:
            raise ValueError(f"{path / CONFIG_NAME} is damaged: {e}") from e
        if found != cls.__name__:
            raise ValueError(f"{path} holds a {found}, not a {cls.__name__}")
        model = cls(cls.config_class.from_dict(values))
        try:
            tensors = safetensors.load((path / WEIGHTS_NAME).read_bytes())
        except Exception as e:  # safetensors raises its own type, which only exists where it is installed
            raise ValueError(f"{path / WEIGHTS_NAME} is damaged: {e}") from e
        if compressed:
            tensors = expand(tensors, model.state_dict())
        load_weights(model, tensors, str(path / WEIGHTS_NAME))
        return model.to(device).eval()
