"""The final norm's pieces: its kinds, 1 / norm, and γ as it is applied."""

from __future__ import annotations

import triton
import triton.language as tl

from rmfast.kernels.arithmetic import inverse_root

from . import reference

NONE = tl.constexpr(reference.NONE)
GEMMA_RMS = tl.constexpr(reference.GEMMA_RMS)
LAYER = tl.constexpr(reference.LAYER)


@triton.jit
def inverse_norm(b_n2, d: tl.constexpr, eps):
    """eps comes in fp64, so that sums in fp64 have all of its digits."""
    if b_n2.dtype == tl.float64:
        return 1.0 / tl.sqrt(b_n2 / d + eps)
    else:
        return inverse_root(b_n2 * (1.0 / d) + tl.cast(eps, tl.float32))


@triton.jit
def load_gain(p_gain, o_d, m_d, NORM: tl.constexpr):
    b_gain = tl.load(p_gain + o_d, mask=m_d, other=0.0)
    if b_gain.dtype != tl.float64:
        b_gain = b_gain.to(tl.float32)
    if NORM == GEMMA_RMS:
        b_gain = b_gain + 1.0
    return b_gain
