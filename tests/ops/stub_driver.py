"""Triton's driver without a GPU: launches go all of its way on the host but compiling, and are written down.

A device of torch's has another number in the driver, so that what is kept for real ones stays theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor
from triton.backends.compiler import GPUTarget

from rmfast.kernels.suffix_attention import triton as suffix_attention
from rmfast.kernels.topk_encode import triton as topk_encode

_FIRST = 1000


@dataclass(frozen=True)
class Launch:
    kernel: str
    device: int
    stream: int
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


@dataclass
class Driver:
    capability: int
    device: int = 0  # the current one
    compiled: list[triton.JITFunction] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)

    def get_current_device(self) -> int:
        return _FIRST + self.device

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def exchange(self, device: int) -> int:
        """As torch.cuda's own: the device before; a negative one changes nothing."""
        before, self.device = self.device, self.device if device < 0 else device
        return before


@dataclass(frozen=True)
class _Kernel:
    """What Triton calls of a compiled one."""

    name: str
    driver: Driver
    function: None = None
    packed_metadata: None = None

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments: Any) -> None:
        device = self.driver.device
        self.driver.launches.append(Launch(self.name, device, stream - _FIRST, (x, y, z), arguments))


@contextmanager
def stubbed(capability: int = 90) -> Iterator[Driver]:
    """Launches of CUDA tensors, which may be fake, on GPUs of that capability that are not there."""
    driver = Driver(capability)

    def compile(self, key, signature, device, *rest):
        driver.compiled.append(self)
        assert self.cache_key  # what a compilation reads of its globals, each launch compares
        kernel = self.device_caches[device][0][key] = _Kernel(self.__name__, driver)
        return kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", driver)
        patch.setattr(triton.JITFunction, "_do_compile", compile)
        patch.setattr(torch.cuda, "_exchange_device", driver.exchange)
        patch.setattr(torch.cuda, "_maybe_exchange_device", driver.exchange)
        patch.setattr(FakeTensor, "data_ptr", lambda self: 4096 + self.storage_offset() * self.itemsize)
        for module in (suffix_attention, topk_encode):
            patch.setattr(module, "capability", lambda value: capability)
        try:
            yield driver
        finally:
            for kernel in driver.compiled:
                for device in [number for number in kernel.device_caches if number >= _FIRST]:
                    del kernel.device_caches[device]
