"""The final norm's pieces: its kinds, 1 / norm, and γ as it is applied."""

from __future__ import annotations

import triton
import triton.language as tl

from . import reference

NONE = tl.constexpr(reference.NONE)
GEMMA_RMS = tl.constexpr(reference.GEMMA_RMS)
LAYER = tl.constexpr(reference.LAYER)


@triton.jit
def inverse_norm(b_n2, d: tl.constexpr, eps: tl.constexpr):
    if b_n2.dtype == tl.float64:
        return 1.0 / tl.sqrt(b_n2 / d + eps)
    else:
        # The plain `/` and `sqrt` are approximations of 2 ulp in fp32.
        b_d = tl.full(b_n2.shape, d, tl.float32)
        return tl.div_rn(tl.full(b_n2.shape, 1.0, tl.float32), tl.sqrt_rn(tl.div_rn(b_n2, b_d) + eps))


@triton.jit
def load_gain(p_gain, o_d, m_d, NORM: tl.constexpr):
    b_gain = tl.load(p_gain + o_d, mask=m_d, other=0.0)
    if NORM == GEMMA_RMS:
        b_gain = b_gain + 1.0
    return b_gain
