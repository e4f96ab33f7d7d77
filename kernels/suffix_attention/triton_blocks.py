"""Blocks of keys: one loop of attention by online softmax, whose programs differ in which rows they take."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(b_x, b_y, b_acc):
    """b_acc [M, N] + b_x [M, K] @ b_y [K, N].

    tf32x3 keeps 22 bits of fp32 operands; b_acc is added outside of the tensor cores, whose additions truncate.
    """
    if b_x.dtype == tl.float64:
        return tl.dot(b_x, b_y, b_acc, out_dtype=tl.float64)
    elif b_x.dtype == tl.float32:
        return b_acc + tl.dot(b_x, b_y, input_precision="tf32x3")
    elif INTERPRETED:
        # The interpreter multiplies the bit patterns of bf16.
        return tl.dot(b_x.to(tl.float32), b_y.to(tl.float32), b_acc)
    else:
        return tl.dot(b_x, b_y, b_acc)


@triton.jit
def _next(b_p, b_z, coefficient: tl.constexpr):
    """A step of Horner's rule: b_p b_z + coefficient."""
    return tl.fma(b_p, b_z, tl.full(b_z.shape, coefficient, b_z.dtype))


@triton.jit
def _tanh(b_x):
    """By series below 0.625, where 1 − 2 / (e^2x + 1) would cancel."""
    b_z = b_x * b_x
    b_e = tl.exp2(tl.minimum(tl.abs(b_x), 20.0) * (2 * LOG2E))
    b_large = 1.0 - 2.0 / (b_e + 1.0)
    b_large = tl.where(b_x < 0, -b_large, b_large)
    if b_x.dtype == tl.float64:
        # The large form is off by 1e-16 / 2^-7 here; the series' next term by 2^-77.
        b_p = tl.full(b_z.shape, -929569.0 / 638512875, tl.float64)
        b_p = _next(_next(b_p, b_z, 21844.0 / 6081075), b_z, -1382.0 / 155925)
        b_p = _next(_next(b_p, b_z, 62.0 / 2835), b_z, -17.0 / 315)
        b_p = _next(_next(b_p, b_z, 2.0 / 15), b_z, -1.0 / 3)
        return tl.where(tl.abs(b_x) < 0.0078125, tl.fma(b_x * b_z, b_p, b_x), b_large)
    else:
        b_p = tl.full(b_z.shape, -5.70498872745e-3, tl.float32)
        b_p = _next(_next(b_p, b_z, 2.06390887954e-2), b_z, -5.37397155531e-2)
        b_p = _next(_next(b_p, b_z, 1.33314422036e-1), b_z, -3.33332819422e-1)
        return tl.where(tl.abs(b_x) < 0.625, tl.fma(b_x * b_z, b_p, b_x), b_large)


@triton.jit
def _rows(o_n, split, from_pool, stride_pool, from_own, stride_own, VEC: tl.constexpr, POOL: tl.constexpr):
    """Offsets of the rows at positions o_n, [BN]."""
    o_row = from_own + o_n.to(tl.int64) * stride_own
    if POOL:
        o_row = tl.where(o_n < split, from_pool + o_n.to(tl.int64) * stride_pool, o_row)
        # Each is a sum of multiples of VEC, which the compiler does not see through the choice.
        o_row = tl.multiple_of(o_row, VEC)
    return o_row


@triton.jit
def attend(
    p_q, m_m, b_q, b_o, b_max, b_sum, p_k, p_v, from_pk, stride_pk, from_k, stride_k, from_pv, stride_pv, from_v,
    stride_v, split, o_own, o_d, b_slope, i_first, i_last, window, scale: tl.constexpr, softcap: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, DQ: tl.constexpr, VEC: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr, POOL: tl.constexpr, BIASED: tl.constexpr, WHOLE: tl.constexpr, o_end=None,
):  # fmt: skip
    """Online softmax over the keys at positions [i_first, i_last), of which those before `split` lie in the pool.

    WHOLE: these are whole blocks, and every row sees all of their keys; with o_end [BM] those before it, and what a row
    does not see does not change it, NaN included.

    b_q [BM, BD] at p_q [BM], b_o [BM, BD], b_max and b_sum [BM], o_own [BM] the rows' positions. `scale`, `softcap`
    and b_slope [BM] give logits in base 2.
    """
    for i_n in range(i_first, i_last, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = (o_n < i_last)[:, None]
        m_k = m_n & (o_d[None, :] < D)
        if WHOLE:
            m_n = tl.full([BN, 1], 1, tl.int1)
            m_k = tl.broadcast_to(o_d[None, :] < D, [BN, o_d.shape[0]])
        p_row = p_k + _rows(o_n, split, from_pk, stride_pk, from_k, stride_k, VEC, POOL)[:, None]
        b_s = tl.zeros([b_o.shape[0], BN], b_sum.dtype)
        if o_d.shape[0] == DQ:
            if WHOLE and D == DQ:
                b_k = tl.load(p_row + o_d[None, :])  # [BN, BD]
            else:
                b_k = tl.load(p_row + o_d[None, :], mask=m_k, other=0.0)
            b_s = dot(b_q, tl.trans(b_k), b_s)
        else:
            # Q as a whole would fill the registers: parts of it are read again, from L1. The mask keeps the reads here.
            for i_d in tl.static_range(0, D, DQ):
                o_p = i_d + tl.arange(0, DQ)
                m_p = o_p[None, :] < D
                b_part = tl.load(p_q[:, None] + o_p[None, :], mask=m_m[:, None] & m_p & (i_n < i_last), other=0.0)
                b_k = tl.load(p_row + o_p[None, :], mask=m_n & m_p, other=0.0)  # [BN, DQ]
                b_s = dot(b_part, tl.trans(b_k), b_s)
        b_s *= scale  # [BM, BN]
        o_row = _rows(o_n, split, from_pv, stride_pv, from_v, stride_v, VEC, POOL)
        if WHOLE and o_d.shape[0] == D:
            b_v = tl.load(p_v + o_row[:, None] + o_d[None, :])
        else:
            b_v = tl.load(p_v + o_row[:, None] + o_d[None, :], mask=m_k, other=0.0)
        if CAPPED:
            b_s = softcap * _tanh(b_s)
        if BIASED:
            # Counted from the query, where it is 0: softmax is the same, and near keys' logits stay small.
            b_s += b_slope[:, None] * (o_n[None, :] - o_own[:, None]).to(b_s.dtype)
        if not WHOLE:
            m_s = (o_n < i_last)[None, :]
            if CAUSAL:
                m_s = m_s & (o_n[None, :] <= o_own[:, None])
                if WINDOWED:
                    m_s = m_s & (o_n[None, :] > o_own[:, None] - window)
            elif WINDOWED:
                m_s = m_s & (tl.abs(o_n[None, :] - o_own[:, None]) <= window)
            b_s = tl.where(m_s, b_s, -float("inf"))
        elif o_end is not None:
            m_row = i_n < o_end
            b_s = tl.where(m_row[:, None], b_s, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_alpha = tl.exp2(b_max - b_safe)
        b_p = tl.exp2(b_s - b_safe[:, None])
        b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
        if o_end is None:
            b_o = dot(b_p.to(b_v.dtype), b_v, b_o * b_alpha[:, None])
        else:
            b_o = tl.where(m_row[:, None], dot(b_p.to(b_v.dtype), b_v, b_o * b_alpha[:, None]), b_o)
        b_max = b_new
    return b_o, b_max, b_sum


@triton.jit
def beginning(p_sinks, p_alibi, o_own, o_head, acc: tl.constexpr):
    """The rows' slopes, what positions add to their logits, and maximum and sum before any key: [BM] each."""
    b_slope = tl.zeros(o_own.shape, acc)
    if p_alibi is not None:
        b_slope = tl.load(p_alibi + o_head) * LOG2E
    b_shift = b_slope * o_own.to(acc)
    b_max = tl.full(o_own.shape, -float("inf"), acc)
    b_sum = tl.zeros(o_own.shape, acc)
    if p_sinks is not None:
        b_max = tl.load(p_sinks + o_head) * LOG2E - b_shift
        b_sum = tl.full(o_own.shape, 1.0, acc)
    return b_slope, b_shift, b_max, b_sum


@triton.jit
def aligned_stride(stride, VEC: tl.constexpr):
    return tl.multiple_of(tl.cast(stride, tl.int64), VEC)


@triton.jit
def shared_keys(p_start, o_s, S, prefix, rows, window, BN: tl.constexpr, WINDOWED: tl.constexpr):
    """How many keys of suffixes o_s triton_packed.py takes: the whole blocks of a prefix that all rows see, where the
    suffix before or behind has a prefix with the same start."""
    start = tl.load(p_start + o_s)
    before = tl.load(p_start + o_s - 1, mask=o_s > 0, other=-1)
    behind = tl.load(p_start + o_s + 1, mask=o_s + 1 < S, other=-1)
    shared = (before == start) | (behind == start)
    if WINDOWED:
        shared = shared & (prefix + rows <= window)
    return tl.where(shared, prefix // BN * BN, 0)
