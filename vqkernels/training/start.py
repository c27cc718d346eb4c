"""Weights to start from: a saved model, or the model of another run.

Called by :mod:`vqkernels.training.loop` before the first step of a run with ``init_from``.
"""

from __future__ import annotations

from pathlib import Path

from vqkernels.models import TokenModel, load_model
from vqkernels.models.pretrained import load_weights
from vqkernels.training.config import TrainingError

__all__ = ["load_weights_of"]


def load_weights_of(folder: str, model: TokenModel) -> None:
    """Copy weights, codebooks and their statistics.

    Args:
        folder: of a saved model, or of a run (its last model is taken).
        model: of the same class and sizes.

    Raises:
        TrainingError: there is no model, or it does not fit.
    """
    root = Path(folder)
    path = root / "model" if (root / "model" / "config.json").is_file() else root
    try:
        found = load_model(path)
        if type(found) is not type(model):
            raise ValueError(f"{path} holds a {type(found).__name__}, this run trains a {type(model).__name__}")
        load_weights(model, found.state_dict(), str(path))
    except (OSError, ValueError) as e:
        raise TrainingError(f"init_from: {e}") from e
