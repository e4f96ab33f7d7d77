"""Arithmetic that several Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def inverse_root(b_x):
    """1 / sqrt(b_x) in fp32, off by less than 2 units in its last place: the hardware's estimate and a step of
    Newton's, where a square root and a division rounded to nearest are 50 instructions and more with branches."""
    b_y = tl.rsqrt(b_x)
    b_error = tl.fma(-b_x * b_y, b_y, tl.full(b_x.shape, 1.0, tl.float32))
    b_better = tl.fma(0.5 * b_y, b_error, b_y)
    return tl.where(b_y == 0.0, 0.0, b_better)  # of infinity, where the step gives NaN
