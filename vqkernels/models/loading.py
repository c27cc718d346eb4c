"""Any saved model from its folder, whichever class wrote it.

Used by the tools that tokenise and evaluate.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from vqkernels.models.pretrained import CONFIG_NAME
from vqkernels.models.tokens import TokenModel
from vqkernels.models.vqgan import VQGAN
from vqkernels.models.vqvae import VQVAE
from vqkernels.models.vqvae2 import VQVAE2

__all__ = ["load_model"]

CLASSES: dict[str, type[TokenModel]] = {c.__name__: c for c in (VQVAE, VQGAN, VQVAE2)}


def load_model(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> TokenModel:
    """Load what ``save_pretrained`` of any model wrote: ``from_pretrained`` of the class that the folder names.

    Raises:
        ImportError, FileNotFoundError: as in ``from_pretrained``.
        ValueError: as there, or no class here wrote the folder.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no model: {CONFIG_NAME} is missing")
    try:
        name = json.loads(path.read_text())["model"]
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{path} is damaged: {e}") from e
    if name not in CLASSES:
        raise ValueError(f"{folder} holds a {name!r}; expected one of {', '.join(CLASSES)}")
    return CLASSES[name].from_pretrained(folder, device)
