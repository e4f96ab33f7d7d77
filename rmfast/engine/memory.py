"""Memory of a run: how much is free, when it ran out, and what malloc keeps."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

import torch


@cache
def reuse_freed_memory() -> None:
    """Has glibc's malloc keep what is freed for the next allocation, as PyTorch does on a GPU.

    By its defaults the large outputs of every layer go back to the system and fault in again page by page, which takes
    10 to 14% of a run on two cores. It holds for the process from the first packed run on; RMFAST_MALLOC=0 leaves
    malloc as it is, and other allocators (jemalloc, tcmalloc) are not touched.
    """
    if not sys.platform.startswith("linux") or os.environ.get("RMFAST_MALLOC") == "0":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 1 << 25)  # the most that older versions take
        mallopt(trim_threshold, 2**31 - 1)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; 4 GiB where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            found = dict(line.split(":") for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 4 << 30


def out_of_memory(error: RuntimeError) -> bool:
    """The CPU's allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
