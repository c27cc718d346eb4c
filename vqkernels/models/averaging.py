"""Moving averages of a model's weights, by torch's own ``AveragedModel``.

Called by the training loop after every step; evaluation uses the averaged copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vqkernels.models.config import check_number

__all__ = ["average_of", "averaged"]


def averaged(model: nn.Module, decay: float = 0.999) -> AveragedModel:
    """A copy of ``model`` whose parameters follow the moving average of its parameters.

    Call ``update_parameters(model)`` after every optimiser step; the first call copies. Buffers, and so an EMA codebook
    with its statistics, are copied each time: they are averages already, and indices must fit them.

    Args:
        model: any module.
        decay: in [0, 1].

    Returns:
        The copy; ``.module`` is the model itself, ready for evaluation or saving.

    Raises:
        ValueError: ``decay`` is out of range.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> average = averaged(model, decay=0.9)
        >>> average.update_parameters(model)
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(1)
        >>> average.update_parameters(model)
        >>> round((model.weight - average.module.weight).item(), 4)
        0.9
    """
    check_number("decay", decay, 0.0, 1.0)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def average_of(model: nn.Module, average: AveragedModel) -> Iterator[None]:
    """``model`` with the averaged parameters and buffers for the duration of the block; exactly its own afterwards."""
    own = {name: t.detach().clone() for name, t in model.state_dict().items()}
    model.load_state_dict(average.module.state_dict())
    try:
        yield
    finally:
        with torch.no_grad():
            model.load_state_dict(own)
