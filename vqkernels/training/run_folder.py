"""The run folder: names of its files, who may write into it, and what a resumed run may change.

Called by :mod:`vqkernels.training.loop` and :mod:`vqkernels.cli.train` before anything is written.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from vqkernels._files import replace_file, sweep
from vqkernels.training.config import FREE_ON_RESUME, TrainConfig, TrainingError

__all__ = ["RunFolder", "check_output", "write_json"]

FORMAT = "vqkernels-train-1"


class RunFolder:
    """Paths of one run.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.metrics = self.path / "metrics.json"
        self.samples = self.path / "samples.png"
        self.curves = self.path / "curves.png"
        self.model = self.path / "model"
        self.best = self.path / "best"
        self.tensorboard = self.path / "tensorboard"

    def read_config(self) -> TrainConfig:
        """The config of the run that lives here.

        Raises:
            TrainingError: there is none, or it is damaged.
        """
        try:
            values = json.loads(self.config.read_text())
        except FileNotFoundError as e:
            raise TrainingError(f"there is no run in {self.path} (no config.json)") from e
        except (OSError, ValueError) as e:
            raise TrainingError(f"{self.config} is damaged: {e}") from e
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise TrainingError(f"{self.config} is not a config of vqkernels train")
        try:
            return TrainConfig.from_dict(values, str(self.config))
        except TypeError as e:
            raise TrainingError(f"{self.config} is damaged: {e}") from e

    def write_config(self, config: TrainConfig) -> None:
        """Write config.json in one step."""
        write_json(self.config, {"format": FORMAT, **config.to_dict()})

    def check_free(self, config: TrainConfig, overwrite: bool) -> None:
        """Refuse to mix two runs in one folder.

        A finished run with exactly this config may be repeated: it leads to the same files.

        Raises:
            TrainingError: the path is a file, or another or an unfinished run lives here.
        """
        check_output(self.path)
        if overwrite or not (self.config.exists() or self.checkpoint.exists()):
            return
        hint = "use --output for another folder, --resume to go on, or --overwrite to start again"
        try:
            same = self.read_config() == config
        except TrainingError:
            same = False
        if not same:
            raise TrainingError(f"{self.path} already holds a run with another config: {hint}")
        if not self._finished():
            raise TrainingError(f"{self.path} already holds this run, not finished: {hint}")

    def _finished(self) -> bool:
        try:
            return bool(json.loads(self.metrics.read_text())["finished"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def check_resume(self, config: TrainConfig) -> None:
        """Refuse to go on with something else.

        Raises:
            TrainingError: there is no run here, or ``config`` differs where it must not.
        """
        check_output(self.path)
        old, new = self.read_config().to_dict(), config.to_dict()
        changed = [name for name in old if old[name] != new[name] and name not in FREE_ON_RESUME]
        if changed:
            details = ", ".join(f"{name} {old[name]!r} -> {new[name]!r}" for name in changed)
            raise TrainingError(f"cannot resume {self.path} with other options ({details}); use another --output")

    def sweep(self) -> None:
        """Remove the temporary files of a process that was killed while it wrote."""
        for folder in (self.path, self.model, self.best):
            sweep(folder)

    def start(self, config: TrainConfig) -> None:
        """Make the folder, remove what an earlier run left (only files of ours), write the config.

        Raises:
            TrainingError: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for file in (self.checkpoint, self.metrics, self.samples, self.curves):
                file.unlink(missing_ok=True)
            for folder in (self.model, self.best, self.tensorboard):
                shutil.rmtree(folder, ignore_errors=True)
            self.sweep()
            self.write_config(config)
        except OSError as e:
            raise TrainingError(f"output {self.path} cannot be written: {e.strerror or e}") from e


def check_output(folder: Path) -> None:
    """Refuse what no command could write to, or read again.

    Raises:
        TrainingError: it is a file or cannot be written, or its path is no UTF-8, which safetensors asks for.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError as e:
        raise TrainingError(f"output {folder} is no UTF-8, so safetensors cannot read what is written there") from e
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"output {folder} is a file, not a folder")
    if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
        raise TrainingError(f"output {folder} cannot be written: it is read-only, or another user's")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented json in one step."""
    replace_file(path, (json.dumps(value, indent=2) + "\n").encode())
