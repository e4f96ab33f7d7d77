"""What every Triton launch needs of its tensors: their device as the current one, and where they start."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor


def on_device(value: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; the stream is that device's current one, as torch's own ops use."""
    return torch.cuda.device(value.device) if value.device.type == "cuda" else contextlib.nullcontext()


def capability(value: Tensor) -> int:
    """The compute capability of the value's device, 90 for an H100; that also where there is no GPU."""
    return _capability_of(value.device.index) if value.device.type == "cuda" else 90


@functools.cache
def _capability_of(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def aligned(value: Any) -> Any:
    """A copy where a view starts off 16 bytes: the width of loads, and with it the order of sums, must not vary."""
    return value if value is None or value.data_ptr() % 16 == 0 else value.clone()
