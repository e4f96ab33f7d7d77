"""Few dots of a row by FMAs, and the tiles for them.

A thread holds VEC = 16 bytes of neighbouring columns of a row as tiles [BM, G, VEC], G = BD / VEC, in parts of
VA columns, 16 bytes of the accumulation dtype: then loads of rows and of dots are both 16 bytes wide and need no
exchange between threads, and the sum over a part is VA FMAs in a thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rmfast.kernels.launch import power_of_2

# Dots of a row of 32 bits by FMAs.
FEW = 8


def few_dots(dtype: torch.dtype) -> int:
    """The most dots of a row of a dtype that go by FMAs.

    On sm_90 a number of a row costs 3.8 instructions of a lane and 1.3 for each dot. An H200's multiprocessor gets 10.4
    numbers of 16 bits a clock from memory, and starts 128 instructions of a lane: 12.3 for each, less than 7 dots take.
    """
    return 6 if dtype.itemsize == 2 else FEW


def padded(count: int) -> int:
    """The directions, or heads, that kernels are compiled for where they take a number of them: a power of 2, or 0."""
    return power_of_2(count) if count else 0


@triton.jit
def part(b_x, PART: tl.constexpr, VA: tl.constexpr):
    """Part PART of the last axis, [..., VEC] -> [..., VA]."""
    if b_x.shape[2] == VA:
        return b_x
    else:
        tl.static_assert(b_x.shape[2] == 2 * VA)
        b_x = tl.reshape(b_x, [b_x.shape[0], b_x.shape[1], 2, VA])
        b_low, b_high = tl.split(tl.permute(b_x, [0, 1, 3, 2]))
        if PART == 0:
            return b_low
        else:
            return b_high


@triton.jit
def whole(b_parts):
    """`part` undone: 1 or 2 tiles [..., VA] -> [..., VEC]."""
    if len(b_parts) == 1:
        return b_parts[0]
    else:
        b_x = tl.permute(tl.join(b_parts[0], b_parts[1]), [0, 1, 3, 2])
        return tl.reshape(b_x, [b_x.shape[0], b_x.shape[1], 2 * b_x.shape[3]])


@triton.jit
def fma_dot(b_x, b_a, b_acc):
    """b_acc [BM, G] + Σ_v b_x [BM, G, v] b_a [1 or BM, G, v], one FMA after the other."""
    if b_x.shape[2] == 1:
        b_a = tl.broadcast_to(tl.reshape(b_a, [b_a.shape[0], b_a.shape[1]]), b_acc.shape)
        return tl.fma(tl.reshape(b_x, b_acc.shape), b_a, b_acc)
    else:
        b_x0, b_x1 = tl.split(tl.reshape(b_x, [b_x.shape[0], b_x.shape[1], b_x.shape[2] // 2, 2]))
        b_a0, b_a1 = tl.split(tl.reshape(b_a, [b_a.shape[0], b_a.shape[1], b_a.shape[2] // 2, 2]))
        return fma_dot(b_x1, b_a1, fma_dot(b_x0, b_a0, b_acc))


@triton.jit
def replace(b_all, INDEX: tl.constexpr, b_new):
    """The tuple with element INDEX replaced."""
    b_out = ()
    for i in tl.static_range(len(b_all)):
        if i == INDEX:
            b_out = b_out + (b_new,)  # type: ignore[assignment]  # noqa: RUF005
        else:
            b_out = b_out + (b_all[i],)  # type: ignore[assignment]  # noqa: RUF005
    return b_out


def part_width(vec: int, dtype: torch.dtype) -> int:
    """VA: the columns of a part."""
    return min(vec, 2 if dtype == torch.float64 else 4)
