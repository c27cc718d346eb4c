"""The training app behind ``vqkernels train``: data, loop, evaluation, checkpoints and pictures.

Called by :mod:`vqkernels.cli.train` and from notebooks; its parts need ``pip install 'vqkernels[train]'``, importing
this package does not.
"""

from vqkernels.training.config import TrainConfig, TrainingError
from vqkernels.training.loop import train

__all__ = ["TrainConfig", "TrainingError", "train"]
