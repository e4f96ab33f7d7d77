"""Products on the tensor cores that keep the accuracy of fp32: operands as sums of terms that they take."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def tf32(b_x):
    """fp32 rounded to the 10 bits of a tf32, which the tensor cores then take as it is."""
    b_round = ((b_x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(b_x == b_x, b_round, b_x)  # rounding a NaN's bits may give a zero


@triton.jit
def high_low(b_x, dtype: tl.constexpr):
    """fp32 as the sum of two numbers that the tensor cores take: two tf32, bf16 or fp16."""
    if dtype == tl.float32:
        b_high = tf32(b_x)
        return b_high, tf32(b_x - b_high)
    else:
        b_high = b_x
        if dtype == tl.float16:
            b_high = tl.minimum(tl.maximum(b_high, -65504.0), 65504.0)
        b_high = b_high.to(dtype)
        return b_high, (b_x - b_high.to(tl.float32)).to(dtype)


@triton.jit
def dot(b_x, b_y, b_acc):
    if INTERPRETED:
        # The interpreter multiplies the bit patterns of bf16.
        return tl.dot(b_x.to(tl.float32), b_y.to(tl.float32), b_acc)
    else:
        return tl.dot(b_x, b_y, b_acc, input_precision="tf32")


@triton.jit
def matmul(b_x, b_y, b_acc):
    """b_acc [M, N] + b_x [M, D] @ b_y [D, N] with the accuracy of the accumulation dtype.

    fp32: both operands in two tf32 parts, without low times low; see `many_config`. The sum with b_acc is made outside
    of the tensor cores, whose additions truncate.
    """
    if b_x.dtype == tl.float64:
        return b_acc + tl.sum(b_x[:, :, None] * b_y[None, :, :], 1)
    else:
        b_x_high, b_x_low = high_low(b_x, tl.float32)
        b_y_high, b_y_low = high_low(b_y, tl.float32)
        b_part = dot(b_x_low, b_y_high, tl.zeros(b_acc.shape, tl.float32))
        b_part = dot(b_x_high, b_y_low, b_part)
        return b_acc + dot(b_x_high, b_y_high, b_part)
