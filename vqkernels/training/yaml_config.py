"""Options from a YAML file and from ``--set``, in the order file, ``--set``, flags; later ones win.

Called by :mod:`vqkernels.cli.train`; OmegaConf reads, resolves references and parses values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vqkernels.training.config import TrainConfig, TrainingError, merged, require
from vqkernels.training.recipes import recipe
from vqkernels.training.suggest import unknown_key

__all__ = ["merge_options"]


def merge_options(
    base: Mapping[str, Any], file: str | None, settings: Sequence[str], flags: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields of :class:`TrainConfig`, merged.

    Args:
        base: of the run that is resumed, or nothing.
        file: YAML with fields by name; a ``config.json`` of a run is fine, too.
        settings: "field=value" or "field.key=value"; values are YAML.
        flags: fields given as options of their own.

    Raises:
        TrainingError: the file cannot be read, or a name is unknown; the message names the nearest one.
    """
    values = {**_read(base, file, settings), **flags}
    # A resumed run has its recipe in its config already.
    return values if base else merged(recipe(values.get("preset")), values)


def _read(base: Mapping[str, Any], file: str | None, settings: Sequence[str]) -> dict[str, Any]:
    if file is None and not settings:
        return dict(base)
    omega = require("omegaconf").OmegaConf
    tree = omega.create(dict(base))
    try:
        if file is not None:
            loaded = omega.load(file)
            if not omega.is_dict(loaded):
                raise TrainingError(f"config {file} is no table of options")
            loaded.pop("format", None)  # of a run's config.json
            _check(omega.to_container(loaded), f"config {file}: ")
            tree = omega.merge(tree, loaded)
        for setting in settings:
            name, separator, _ = setting.partition("=")
            if not separator or not name:
                raise TrainingError(f"--set {setting}: expected NAME=VALUE")
            _check({name.partition(".")[0]: None}, "--set: ")
        tree = omega.merge(tree, omega.from_dotlist(list(settings)))
        values: dict[str, Any] = omega.to_container(tree, resolve=True)
    except TrainingError:
        raise
    except FileNotFoundError as e:
        raise TrainingError(f"there is no config {file}") from e
    except Exception as e:  # yaml's and OmegaConf's own types
        where = f"config {file}" if file is not None else "--set"
        raise TrainingError(f"{where} cannot be read ({Path(file).suffix if file else 'YAML'}): {e}") from e
    return values


def _check(values: Mapping[str, Any], where: str) -> None:
    if wrong := unknown_key(values, TrainConfig):
        raise TrainingError(where + wrong)
