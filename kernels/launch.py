"""What every Triton launch needs: its tensors' device as the current one, where they start, and sizes of a grid."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor


def on_device(value: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; the stream is that device's current one, as torch's own ops use.

    By its number: to read one off a torch.device takes torch 1 µs.
    """
    return torch.cuda.device(value.device.index) if value.device.type == "cuda" else contextlib.nullcontext()


def capability(value: Tensor) -> int:
    """The compute capability of the value's device, 90 for an H100; that also where there is no GPU."""
    return _capability_of(value.device.index) if value.device.type == "cuda" else 90


@functools.cache
def _capability_of(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def cdiv(size: int, block: int) -> int:
    """The blocks that hold `size`. triton.cdiv and triton.next_power_of_2 take 1.4 µs of a launch's 8 each."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The next one from `size`, at least 1, on."""
    return 1 << (size - 1).bit_length()


def aligned(value: Any) -> Any:
    """A copy where a view starts off 16 bytes: the width of loads, and with it the order of sums, must not vary."""
    return value if value is None or value.data_ptr() % 16 == 0 else value.clone()
