"""Between host and device with as little waiting as can be: one copy each way, whatever the number of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["read_back", "to_device"]

_ALIGNMENT = 8


@torch.inference_mode(False)  # a layout that is kept may be of use in training
def to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Arrays as tensors on a device, views of one buffer there; the host does not wait for the copy."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    starts = np.cumsum([0, *(_padded(array.nbytes) for array in arrays)]).tolist()
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda", device="cpu")
    held = buffer.numpy()
    for array, start in zip(arrays, starts, strict=False):
        held[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    there = buffer.to(device, non_blocking=True)
    kinds = [torch.from_numpy(np.empty(0, array.dtype)).dtype for array in arrays]
    return [
        there[start : start + array.nbytes].view(kind).view(array.shape)
        for array, start, kind in zip(arrays, starts, kinds, strict=False)
    ]


def _padded(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT


def read_back(values: Sequence[Tensor]) -> list[Tensor]:
    """Boolean tensors on the CPU; the host waits once for those that are on a device."""
    waiting = [value for value in values if value.device.type != "cpu"]
    if not waiting:
        return list(values)
    together = waiting[0][None].cpu()[0] if len(waiting) == 1 else torch.cat([v.flatten() for v in waiting]).cpu()
    parts = iter(torch.split(together.flatten(), [value.numel() for value in waiting]))
    return [value if value.device.type == "cpu" else next(parts).view(value.shape) for value in values]
