"""Rows of lengths that fill no vector, at the end of mapped memory: no op reads past them."""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch
from torch import Tensor
from ways import backends_of

import rmfast
from rmfast.ops import gated_activation, reward_head, rms_norm, rotary, suffix_attention

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KERNELS = [param for param in backends_of("rms_norm") if param.values[0][1] == "cpp"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mprotect as Linux has it")


class Ends:
    """Tensors whose last byte is the last of their mapping: what lies behind can't be read."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self.libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.held: list[tuple[int, int]] = []

    def __call__(self, value: Tensor) -> Tensor:
        page, size = mmap.PAGESIZE, value.nbytes
        room = -(-size // page) * page
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        start = self.libc.mmap(None, room + page, mmap.PROT_READ | mmap.PROT_WRITE, kind, -1, 0)
        assert self.libc.mprotect(start + room, page, 0) == 0
        self.held.append((start, room + page))
        memory = (ctypes.c_char * size).from_address(start + room - size)
        return torch.frombuffer(memory, dtype=value.dtype).view(value.shape).copy_(value)

    def free(self) -> None:
        for start, size in self.held:
            assert self.libc.munmap(start, size) == 0


@pytest.fixture
def at_the_end():
    made = Ends()
    yield made
    made.free()


def calls(d: int, dtype: torch.dtype, end) -> list[Tensor]:
    """What the ops make of rows of d values, each argument passed through `end`."""
    draw = torch.Generator().manual_seed(d)

    def rows(*shape: int) -> Tensor:
        return end(torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype))

    out = [rms_norm(rows(3, d), rows(d), eps=1e-5)]
    out += rms_norm(rows(3, d), rows(d), residual=rows(3, d), post_weight=rows(d), eps=1e-5)
    out.append(gated_activation(rows(3, d), rows(3, d), kind="silu"))
    out += rotary(rows(3, 2, d + 1), rows(3, 1, d + 1), rows(3, d - d % 2), rows(3, d - d % 2)) if d > 1 else []
    out.append(reward_head(rows(1, 3, d), rows(2, d), norm="rms", norm_weight=rows(d), eps=1e-5))
    if d % 8 == 0:
        ends = torch.tensor([0, 1, 3], dtype=torch.int32)
        out += suffix_attention(rows(3, 2, d), rows(3, 1, d), rows(3, 1, d), ends)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_rows_at_the_end_of_mapped_memory(backend, dtype, at_the_end, use_backend):
    use_backend(backend)
    with torch.inference_mode():
        for d in range(1, 34):
            with rmfast.backend("eager"):
                want = calls(d, dtype, lambda value: value)
            for got, truth in zip(calls(d, dtype, at_the_end), want, strict=True):
                near = 8 * torch.finfo(dtype).eps * float(truth.double().abs().max().clamp(min=1))
                torch.testing.assert_close(got.double(), truth.double(), rtol=0, atol=near)
