"""What every Triton launch needs of its tensors: their device as the current one, and where they start."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def on_device(value: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; the stream is that device's current one, as torch's own ops use."""
    return torch.cuda.device(value.device) if value.device.type == "cuda" else contextlib.nullcontext()


def aligned(value: Any) -> Any:
    """A copy where a view starts off 16 bytes: the width of loads, and with it the order of sums, must not vary."""
    return value if value is None or value.data_ptr() % 16 == 0 else value.clone()
