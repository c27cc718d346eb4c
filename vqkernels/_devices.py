"""What devices lack: Apple's GPUs ("mps") and some of Intel's have no float64.

Called by ``dispatch``, and by whatever adds up many numbers in float64.
"""

from __future__ import annotations

import functools

import torch

__all__ = ["lacks_float64", "widest"]


def lacks_float64(device: torch.device) -> bool:
    """Whether a float64 tensor on this device is an error."""
    return device.type == "mps" or (device.type == "xpu" and not _xpu_has_float64(device))


@functools.cache
def _xpu_has_float64(device: torch.device) -> bool:
    return bool(getattr(torch.xpu.get_device_properties(device), "has_fp64", True))


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 where a device has none."""
    return torch.float32 if lacks_float64(device) else torch.float64
