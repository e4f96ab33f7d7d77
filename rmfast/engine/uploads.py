"""Index arrays of a chunk, planned on the host and sent to the device in one copy that nothing waits for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes: the width of a load, and what Triton's kernels are specialised by


def sent(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays as tensors of their own dtypes and shapes on a device; on a CPU each is its array's own memory."""
    arrays = [np.ascontiguousarray(array) for array in arrays]
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return _in_one_copy(arrays, device)


@torch.inference_mode(False)
def _in_one_copy(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Views of one buffer. A copy of pageable memory would hold up the host until all kernels before it have run, once
    for each array. No tensors of inference mode, which do not say when they change: attention keeps what it works out
    of them for a chunk's other layers."""
    # Pinned memory is not given away before the copy is done: torch's allocator notes the stream that reads it.
    return _views(_joined(arrays, device).to(device, non_blocking=True), arrays)


class Buffer:
    """Memory of a device that arrays are copied into again and again, for graphs, which read where they once read.

    Args:
        arrays: the first of them; all others have their dtypes and sizes.

    Attributes:
        tensors: as `sent` gives them.
    """

    @torch.inference_mode(False)
    def __init__(self, arrays: Sequence[np.ndarray], device: torch.device):
        self._bytes = torch.empty(_starts(arrays)[-1], dtype=torch.uint8, device=device)
        self.tensors = _views(self._bytes, arrays)
        self.fill(arrays)

    def fill(self, arrays: Sequence[np.ndarray]) -> None:
        """Copies arrays in, in one copy that nothing waits for."""
        arrays = [np.ascontiguousarray(array) for array in arrays]
        for array, there in zip(arrays, self.tensors, strict=True):
            if array.shape != there.shape or _dtype(array) != there.dtype:
                want = f"{there.dtype} of shape {tuple(there.shape)}"
                raise ValueError(f"Expected {want}, got {_dtype(array)} of {array.shape}")
        self._bytes.copy_(_joined(arrays, self._bytes.device), non_blocking=True)


def _starts(arrays: Sequence[np.ndarray]) -> list[int]:
    """Where each array's bytes begin in one buffer, and behind them where it ends."""
    return np.cumsum([0, *(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays)]).tolist()


def _joined(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """The arrays' bytes on the host, (n,) uint8; pinned where they go to a GPU."""
    starts = _starts(arrays)
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    bytes_of = buffer.numpy()
    for array, start in zip(arrays, starts):
        bytes_of[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    return buffer


def _views(buffer: Tensor, arrays: Sequence[np.ndarray]) -> list[Tensor]:
    return [
        buffer[start : start + array.nbytes].view(_dtype(array)).view(array.shape)
        for array, start in zip(arrays, _starts(arrays))
    ]


def _dtype(array: np.ndarray) -> torch.dtype:
    return torch.from_numpy(array[:0]).dtype


class Uploads:
    """Index arrays that a plan names before it runs: `add` each, `send` all, then read them by the number of each."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._tensors: list[Tensor] = []

    def add(self, array: np.ndarray) -> int:
        self._arrays.append(array)
        return len(self._arrays) - 1

    def send(self, device: torch.device) -> None:
        self._tensors = sent(self._arrays, device)

    def __getitem__(self, index: int) -> Tensor:
        return self._tensors[index]
