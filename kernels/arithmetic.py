"""Arithmetic that several Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def inverse_root(b_x):
    """1 / sqrt(b_x) in fp32, off by less than 2 units in its last place: the hardware's estimate and a step of
    Newton's, where a square root and a division rounded to nearest are 50 instructions and more with branches."""
    b_y = tl.rsqrt(b_x)
    b_error = tl.fma(-b_x * b_y, b_y, tl.full(b_x.shape, 1.0, tl.float32))
    b_better = tl.fma(0.5 * b_y, b_error, b_y)
    return tl.where(b_y == 0.0, 0.0, b_better)  # of infinity, where the step gives NaN


@triton.jit
def fast_exp2(b_x):
    """2^b_x in fp32, off by at most 2 units in its last place, and 0 below the normal numbers: one instruction, where
    `tl.exp2` is four."""
    if INTERPRETED:
        return tl.exp2(b_x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [b_x], tl.float32, True, 1)


@triton.jit
def fast_inverse(b_x):
    """1 / b_x in fp32, off by at most 1 unit in its last place, and 0 above 2^126: one instruction, where a division is
    up to nine."""
    if INTERPRETED:
        return 1.0 / b_x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [b_x], tl.float32, True, 1)
