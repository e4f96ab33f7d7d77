"""The reward head in Triton: `forward` and `backward` with the contract of `reference.py`.

A row's order of additions depends only on d, K, J and the dtype: launch configurations are functions of those alone
(never of the number of rows, and there is no autotuning), products are fused where the code says `fma` and nowhere
else (`enable_fp_fusion=False`), and rows are read with the vector width that d allows. Layouts, and with them the
order of a reduction, follow that width, so rows that are not aligned to it are first copied to where they are.

    forward     K + J <= 8   _few                  one read of the rows at the speed of the read
                more         _prepare, _many       a skinny GEMM on the tensor cores
                             ... then, with interventions, _finish on the dots (M, K + J)
    backward    K d small    _backward_fused       one read of the rows, kept in registers
                else         _backward_rows, _backward_dots
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference

NONE = tl.constexpr(reference.NONE)
GEMMA_RMS = tl.constexpr(reference.GEMMA_RMS)
LAYER = tl.constexpr(reference.LAYER)
CANCELLATION = tl.constexpr(reference.CANCELLATION)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Above this many dots the FMAs and the loads of the dots cost more than the read of a 16-bit row: an H100's SM gets
# 7.5 elements a clock from memory, and has 128 FMAs and 128 bytes of L1 a clock for them.
FEW = 8

# Fixed, so that the order of the backward's sum over rows does not depend on the GPU; some four for each SM of an H100.
_BACKWARD_PROGRAMS = 512


@triton.jit
def _inverse_norm(b_n2, d: tl.constexpr, eps: tl.constexpr):
    if b_n2.dtype == tl.float64:
        return 1.0 / tl.sqrt(b_n2 / d + eps)
    else:
        # The plain `/` and `sqrt` are approximations of 2 ulp in fp32.
        b_d = tl.full(b_n2.shape, d, tl.float32)
        return tl.div_rn(tl.full(b_n2.shape, 1.0, tl.float32), tl.sqrt_rn(tl.div_rn(b_n2, b_d) + eps))


@triton.jit
def _row_offsets(p_rows, o_m, M, T, N, stride_b, stride_t, VEC: tl.constexpr, FLAT: tl.constexpr):
    """Where rows o_m (int64) start in hidden, and which of them exist."""
    m_m = o_m < M
    if p_rows is not None:
        o_n = tl.load(p_rows + o_m, mask=m_m, other=0)
        m_m = m_m & (o_n >= 0) & (o_n < N)
    else:
        o_n = o_m
    o_n = tl.where(m_m, o_n, 0)
    stride_b = tl.cast(stride_b, tl.int64)
    stride_t = tl.cast(stride_t, tl.int64)
    if FLAT:
        o_h = o_n * stride_t
    else:
        o_h = (o_n // T) * stride_b + (o_n % T) * stride_t
    if VEC > 1:
        o_h = tl.multiple_of(o_h, VEC)
    return o_h, m_m


@triton.jit
def _gain(p_gain, o_d, m_d, NORM: tl.constexpr):
    b_gain = tl.load(p_gain + o_d, mask=m_d, other=0.0)
    if NORM == GEMMA_RMS:
        b_gain = b_gain + 1.0
    return b_gain


@triton.jit
def _tf32(b_x):
    """fp32 rounded to the 10 bits of a tf32, which the tensor cores then take as it is."""
    b_round = ((b_x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(b_x == b_x, b_round, b_x)  # rounding a NaN's bits may give a zero


@triton.jit
def _high_low(b_x, dtype: tl.constexpr):
    """fp32 as the sum of two numbers that the tensor cores take: two tf32, bf16 or fp16."""
    if dtype == tl.float32:
        b_high = _tf32(b_x)
        return b_high, _tf32(b_x - b_high)
    else:
        b_high = b_x
        if dtype == tl.float16:
            b_high = tl.minimum(tl.maximum(b_high, -65504.0), 65504.0)
        b_high = b_high.to(dtype)
        return b_high, (b_x - b_high.to(tl.float32)).to(dtype)


@triton.jit
def _dot(b_x, b_y, b_acc):
    if INTERPRETED:
        # The interpreter multiplies the bit patterns of bf16.
        return tl.dot(b_x.to(tl.float32), b_y.to(tl.float32), b_acc)
    else:
        return tl.dot(b_x, b_y, b_acc, input_precision="tf32")


@triton.jit
def _matmul(b_x, b_y, b_acc):
    """b_acc [M, N] + b_x [M, D] @ b_y [D, N] with the accuracy of the accumulation dtype.

    fp32: both operands in two tf32 parts, without low times low; see `many_config`. The sum with b_acc is made outside
    of the tensor cores, whose additions truncate.
    """
    if b_x.dtype == tl.float64:
        return b_acc + tl.sum(b_x[:, :, None] * b_y[None, :, :], 1)
    else:
        b_x_high, b_x_low = _high_low(b_x, tl.float32)
        b_y_high, b_y_low = _high_low(b_y, tl.float32)
        b_part = _dot(b_x_low, b_y_high, tl.zeros(b_acc.shape, tl.float32))
        b_part = _dot(b_x_high, b_y_low, b_part)
        return b_acc + _dot(b_x_high, b_y_high, b_part)


# A thread holds VEC = 16 bytes of neighbouring columns of a row as tiles [BM, G, VEC], G = BD / VEC, in parts of
# VA columns, 16 bytes of the accumulation dtype: then loads of rows and of dots are both 16 bytes wide and need no
# exchange between threads, and the sum over a part is VA FMAs in a thread.


@triton.jit
def _part(b_x, PART: tl.constexpr, VA: tl.constexpr):
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
def _whole(b_parts):
    """`_part` undone: 1 or 2 tiles [..., VA] -> [..., VEC]."""
    if len(b_parts) == 1:
        return b_parts[0]
    else:
        b_x = tl.permute(tl.join(b_parts[0], b_parts[1]), [0, 1, 3, 2])
        return tl.reshape(b_x, [b_x.shape[0], b_x.shape[1], 2 * b_x.shape[3]])


@triton.jit
def _fma_dot(b_x, b_a, b_acc):
    """b_acc [BM, G] + Σ_v b_x [BM, G, v] b_a [1 or BM, G, v], one FMA after the other."""
    if b_x.shape[2] == 1:
        b_a = tl.broadcast_to(tl.reshape(b_a, [b_a.shape[0], b_a.shape[1]]), b_acc.shape)
        return tl.fma(tl.reshape(b_x, b_acc.shape), b_a, b_acc)
    else:
        b_x0, b_x1 = tl.split(tl.reshape(b_x, [b_x.shape[0], b_x.shape[1], b_x.shape[2] // 2, 2]))
        b_a0, b_a1 = tl.split(tl.reshape(b_a, [b_a.shape[0], b_a.shape[1], b_a.shape[2] // 2, 2]))
        return _fma_dot(b_x1, b_a1, _fma_dot(b_x0, b_a0, b_acc))


@triton.jit
def _replace(b_all, INDEX: tl.constexpr, b_new):
    """The tuple with element INDEX replaced."""
    b_out = ()
    for i in tl.static_range(len(b_all)):
        if i == INDEX:
            b_out = b_out + (b_new,)  # type: ignore[assignment]  # noqa: RUF005
        else:
            b_out = b_out + (b_all[i],)  # type: ignore[assignment]  # noqa: RUF005
    return b_out


@triton.jit(do_not_specialize=["M", "T", "N", "stride_b", "stride_t"])
def _few(
    p_hidden, p_rows, p_weight, p_bias, p_gain, p_norm_bias, p_directions, p_out, p_stats,
    M, T, N, stride_b, stride_t,
    d: tl.constexpr, K: tl.constexpr, J: tl.constexpr, eps: tl.constexpr, NORM: tl.constexpr, FLAT: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, VEC: tl.constexpr, VA: tl.constexpr,
):  # fmt: skip
    """Rewards (M, K); with J > 0 the dots (M, K + J) of the centred rows, and stats (M, 2): squared norm and mean."""
    acc = p_weight.dtype.element_ty
    G: tl.constexpr = BD // VEC
    WHOLE: tl.constexpr = d % BD == 0
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_h, m_h = _row_offsets(p_rows, o_m, M, T, N, stride_b, stride_t, VEC, FLAT)
    o_b = tl.arange(0, BD)[None, :]
    p_h = p_hidden + o_h[:, None] + o_b
    o_g = tl.arange(0, G)[None, :, None] * VEC
    o_a = tl.arange(0, VA)[None, None, :]

    b_zero = tl.zeros([BM, G], acc)
    b_square = b_zero
    b_dots = (b_zero,) * (K + J)
    if NORM == LAYER:
        # Sums are taken of h minus its mean over the first block, which differs from the row's mean by at most
        # sqrt(d / BD) standard deviations: the variance then loses a factor of at most d / BD to cancellation.
        b_first = tl.load(p_h, mask=m_h[:, None] & (o_b < d), other=0.0).to(acc)
        b_shift = tl.sum(b_first, 1) / min(BD, d)  # [BM]
        b_sum = b_zero
        b_gain_sums = (tl.zeros([1, G], acc),) * (K + J)
        b_offsets = (tl.zeros([1, G], acc),) * K
    for i_d in range(0, d, BD):
        m_d = m_h[:, None]
        if not WHOLE:
            m_d = m_d & (i_d + o_b < d)
        b_h = tl.load(p_h + i_d, mask=m_d, other=0.0).to(acc)  # [BM, BD]
        if NORM == LAYER:
            b_h = tl.where(m_d, b_h - b_shift[:, None], 0.0)
        b_h = tl.reshape(b_h, [BM, G, VEC])
        for i_v in tl.static_range(VEC // VA):
            b_x = _part(b_h, i_v, VA)  # [BM, G, VA]
            b_square = _fma_dot(b_x, b_x, b_square)
            o_d = i_d + o_g + i_v * VA + o_a
            m_a = o_d < d
            if p_gain is not None:
                b_gain = _gain(p_gain, o_d, m_a, NORM)
            if NORM == LAYER:
                b_sum = b_sum + tl.sum(b_x, 2)
            for n in tl.static_range(K + J):
                if n < K:
                    b_a = tl.load(p_weight + n * d + o_d, mask=m_a, other=0.0)  # [1, G, VA]
                    if p_norm_bias is not None:
                        b_beta = tl.load(p_norm_bias + o_d, mask=m_a, other=0.0)
                        b_offsets = _replace(b_offsets, n, b_offsets[n] + tl.sum(b_a * b_beta, 2))
                    if p_gain is not None:
                        b_a = b_a * b_gain
                    if NORM == LAYER:
                        b_gain_sums = _replace(b_gain_sums, n, b_gain_sums[n] + tl.sum(b_a, 2))
                else:
                    b_a = tl.load(p_directions + (n - K) * d + o_d, mask=m_a, other=0.0)
                    if NORM == LAYER:
                        b_gain_sums = _replace(b_gain_sums, n, b_gain_sums[n] + tl.sum(b_a, 2))
                b_dots = _replace(b_dots, n, _fma_dot(b_x, b_a, b_dots[n]))

    m_m = o_m < M
    b_n2 = tl.sum(b_square, 1)  # [BM]
    if NORM == LAYER:
        b_delta = tl.sum(b_sum, 1) / d
        b_n2 = b_n2 - b_delta * b_delta * d
    b_n2 = tl.where(m_h, b_n2, float("nan"))
    if J > 0:
        tl.store(p_stats + o_m * 2, b_n2, mask=m_m)
        if NORM == LAYER:
            tl.store(p_stats + o_m * 2 + 1, b_shift + b_delta, mask=m_m)
    elif NORM != NONE:
        b_inv = _inverse_norm(b_n2, d, eps)
    for n in tl.static_range(K + J):
        b_s = tl.where(m_h, tl.sum(b_dots[n], 1), float("nan"))
        if NORM == LAYER:
            b_s = b_s - b_delta * tl.sum(b_gain_sums[n])
        if J == 0:
            if NORM != NONE:
                b_s = b_s * b_inv
            if p_norm_bias is not None:
                b_s = b_s + tl.sum(b_offsets[n])
            if p_bias is not None:
                b_s = b_s + tl.load(p_bias + n)
        tl.store(p_out + o_m * (K + J) + n, b_s, mask=m_m)


@triton.jit
def _prepare(
    p_weight, p_bias, p_gain, p_norm_bias, p_directions, p_packed, p_scale, p_offset, p_moments,
    d: tl.constexpr, K: tl.constexpr, J: tl.constexpr, NORM: tl.constexpr, TERMS: tl.constexpr, DP: tl.constexpr,
    BJ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What depends on the heads and directions alone; program (n, i) takes dot n and directions i BJ and on.

    packed (TERMS, K + J, DP): the dots, centred for a layer norm, in hidden's dtype (tf32 for fp32) as a sum of terms,
    for 16 bits scaled by a power of 2 so that fp16's low term doesn't underflow; scale (K + J,) takes that back; offset
    (K,); moments (K + J, J + 1): the dots' products with the directions, and their sums.
    """
    acc = p_weight.dtype.element_ty
    i_n = tl.program_id(0).to(tl.int64)
    o_j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    m_j = o_j < J
    is_head = i_n < K
    m_head = tl.full([BD], 0, tl.int64) + i_n < K  # as a tile: masks mix with scalars badly in Triton 3.9's interpreter
    b_products = tl.zeros([BJ, BD], acc)
    b_total = tl.zeros([BD], acc)
    b_offset = tl.zeros([BD], acc)
    b_top = tl.zeros([BD], acc)
    for i_d in range(0, d, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < d
        b_w = tl.load(p_weight + i_n * d + o_d, mask=m_d & m_head, other=0.0)
        b_a = b_w
        if p_gain is not None:
            b_a = b_a * _gain(p_gain, o_d, m_d, NORM)
        if p_norm_bias is not None:
            b_offset = tl.fma(b_w, tl.load(p_norm_bias + o_d, mask=m_d, other=0.0), b_offset)
        if J > 0:
            b_a += tl.load(p_directions + (i_n - K) * d + o_d, mask=m_d & (m_head == 0), other=0.0)
            b_p = tl.load(
                p_directions + o_j[:, None].to(tl.int64) * d + o_d[None, :], mask=m_j[:, None] & m_d[None, :], other=0.0
            )  # [BJ, BD]
            b_products = tl.fma(b_p, tl.broadcast_to(b_a[None, :], [BJ, BD]), b_products)
        b_total += b_a
        b_top = tl.maximum(b_top, tl.abs(b_a))
    b_total = tl.sum(b_total)
    b_offset = tl.sum(b_offset)
    if p_moments is not None:
        tl.store(p_moments + i_n * (J + 1) + o_j, tl.sum(b_products, 1), mask=m_j)
    if tl.program_id(1) == 0:
        if p_moments is not None:
            tl.store(p_moments + i_n * (J + 1) + J, b_total)
        if is_head:
            if p_bias is not None:
                b_offset += tl.load(p_bias + i_n)
            tl.store(p_offset + i_n, b_offset)
        if p_packed is not None:
            b_mean = tl.zeros([], acc)
            if NORM == LAYER:
                b_mean = b_total / d
            b_scale = 1.0
            if p_scale is not None:
                # 2^s with s + the exponent of max|a| = 13: even centred, a stays below fp16's 65504.
                b_s = 13 - ((tl.max(b_top).to(tl.int32, bitcast=True) >> 23) - 127)
                b_s = tl.minimum(tl.maximum(b_s, -126), 126)
                b_scale = ((b_s + 127) << 23).to(tl.float32, bitcast=True)
                tl.store(p_scale + i_n, ((127 - b_s) << 23).to(tl.float32, bitcast=True))
            for i_d in range(0, DP, BD):
                o_d = i_d + tl.arange(0, BD)
                m_d = o_d < d
                b_a = tl.load(p_weight + i_n * d + o_d, mask=m_d & m_head, other=0.0)
                if p_gain is not None:
                    b_a = b_a * _gain(p_gain, o_d, m_d, NORM)
                if J > 0:
                    b_a += tl.load(p_directions + (i_n - K) * d + o_d, mask=m_d & (m_head == 0), other=0.0)
                b_a = tl.where(m_d, b_a - b_mean, 0.0) * b_scale
                o_p = i_n * DP + o_d
                for _ in tl.static_range(TERMS):
                    b_term = b_a.to(p_packed.dtype.element_ty)
                    if b_term.dtype == tl.float32:
                        b_term = _tf32(b_a)
                    tl.store(p_packed + o_p, b_term, mask=o_d < DP)
                    b_a = b_a - b_term.to(acc)
                    o_p += (K + J) * DP


@triton.jit(do_not_specialize=["M", "T", "N", "stride_b", "stride_t"])
def _many(
    p_hidden, p_rows, p_packed, p_scale, p_offset, p_out, p_stats,
    M, T, N, stride_b, stride_t,
    d: tl.constexpr, DOTS: tl.constexpr, eps: tl.constexpr, NORM: tl.constexpr, FLAT: tl.constexpr,
    TERMS: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Rewards (M, DOTS); with stats the dots of the centred rows, and stats (M, 2): squared norm and mean."""
    acc = p_offset.dtype.element_ty
    dtype = p_hidden.dtype.element_ty
    # Tiles of dots of the same rows are neighbours in the launch, so the rows come from L2 but once.
    i_m = tl.program_id(0).to(tl.int64) // tl.cdiv(DOTS, BN)
    i_n = tl.program_id(0) % tl.cdiv(DOTS, BN)
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    o_h, m_h = _row_offsets(p_rows, o_m, M, T, N, stride_b, stride_t, VEC, FLAT)
    o_b = tl.arange(0, BD)
    p_h = p_hidden + o_h[:, None] + o_b[None, :]
    p_a = p_packed + o_n[None, :].to(tl.int64) * DP + o_b[:, None]
    b_shift = tl.zeros([BM], acc)
    if NORM == LAYER:
        # As in _few, with the mean of up to four blocks; rounded, and 0 where it is small beside the row, so that h
        # minus it has few bits and two terms hold them.
        b_first_n2 = tl.zeros([BM], acc)
        for i_d in range(0, min(d, 4 * BD), BD):
            b_h = tl.load(p_h + i_d, mask=m_h[:, None] & (i_d + o_b < d)[None, :], other=0.0)
            b_shift += tl.sum(b_h.to(acc), 1)
            b_first_n2 += tl.sum(b_h.to(acc) * b_h.to(acc), 1)
        b_shift = (b_shift / min(d, 4 * BD)).to(dtype).to(acc)
        b_shift = tl.where(64.0 * b_shift * b_shift * min(d, 4 * BD) < b_first_n2, 0.0, b_shift)
    b_n2 = tl.zeros([BM], acc)
    b_sum = tl.zeros([BM], acc)
    b_dots = tl.zeros([BM, BN], acc)
    for i_d in range(0, d, BD):
        m_d = m_h[:, None] & (i_d + o_b < d)[None, :]
        b_h = tl.load(p_h + i_d, mask=m_d, other=0.0)  # [BM, BD]
        b_x = b_h.to(acc)
        if NORM == LAYER:
            b_x = tl.where(m_d, b_x - b_shift[:, None], 0.0)
            b_sum += tl.sum(b_x, 1)
        if NORM != NONE or p_stats is not None:
            b_n2 += tl.sum(b_x * b_x, 1)
        # Low terms first. A block's sum is added to the total outside of the tensor cores.
        b_block = tl.zeros([BM, BN], acc)
        # A 16-bit row is a term of its own, unless a mean was taken from it.
        TWO: tl.constexpr = dtype == tl.float32 or (dtype != tl.float64 and NORM == LAYER)
        if TWO:
            b_h, b_low = _high_low(b_x, dtype)
        for i_t in tl.static_range(TERMS):
            b_a = tl.load(
                p_a + (TERMS - 1 - i_t) * DOTS * DP + i_d,
                mask=(o_n < DOTS)[None, :] & (i_d + o_b < DP)[:, None],
                other=0.0,
            )  # [BD, BN]
            if dtype == tl.float64:
                b_block = _matmul(b_x, b_a, b_block)
            else:
                # Low times the lowest term is below the last bit of an fp32, unless high is fp16's largest number.
                if TWO and (i_t > 0 or dtype == tl.float16):
                    b_block = _dot(b_low, b_a, b_block)
                b_block = _dot(b_h, b_a, b_block)
        b_dots += b_block

    if p_scale is not None:
        b_dots = b_dots * tl.load(p_scale + o_n, mask=o_n < DOTS, other=0.0)[None, :]
    m_m = o_m < M
    if NORM == LAYER:
        b_delta = b_sum / d
        b_n2 = b_n2 - b_delta * b_delta * d
    b_dots = tl.where(m_h[:, None], b_dots, float("nan"))
    if p_stats is not None:
        if i_n == 0:
            tl.store(p_stats + o_m * 2, tl.where(m_h, b_n2, float("nan")), mask=m_m)
            if NORM == LAYER:
                tl.store(p_stats + o_m * 2 + 1, b_shift + b_delta, mask=m_m)
    else:
        if NORM != NONE:
            b_dots = b_dots * _inverse_norm(b_n2, d, eps)[:, None]
        b_dots += tl.load(p_offset + o_n, mask=o_n < DOTS, other=0.0)[None, :]
    p_tile = p_out + i_m * BM * DOTS + tl.arange(0, BM)[:, None] * DOTS + o_n[None, :]
    tl.store(p_tile, b_dots, mask=m_m[:, None] & (o_n < DOTS)[None, :])


@triton.jit
def _coefficients(
    p_dots, p_moments, p_strengths, p_targets, o_m, m_m, o_i, m_i, b_mean, o_j, K: tl.constexpr, J: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """c and z of the centred row, and the directions' sums: [BM, BJ], [BM, BJ], [BJ]."""
    m_j = o_j < J
    m_z = m_m[:, None] & m_j[None, :]
    b_z = tl.load(p_dots + o_m[:, None] * (K + J) + (K + o_j)[None, :], mask=m_z, other=0.0)
    b_sums = tl.load(p_moments + (K + o_j).to(tl.int64) * (J + 1) + J, mask=m_j, other=0.0)
    b_c = b_z
    if NORM == LAYER:
        b_c = tl.fma(tl.broadcast_to(b_mean[:, None], b_z.shape), tl.broadcast_to(b_sums[None, :], b_z.shape), b_z)
    o_c = o_i[:, None] * J + o_j[None, :]
    m_c = m_i[:, None] & m_j[None, :]
    if p_targets is not None:
        b_c -= tl.load(p_targets + o_c, mask=m_c, other=0.0)
    return b_c * tl.load(p_strengths + o_c, mask=m_c, other=0.0), b_z, b_sums


@triton.jit
def _changed(p_h, p_p, b_c, i_d, m_j, d: tl.constexpr, BD: tl.constexpr):
    """One block of h − Pᵀ c in fp64: [BD]."""
    m_d = i_d + tl.arange(0, BD) < d
    b_h = tl.load(p_h + i_d, mask=m_d, other=0.0).to(tl.float64)
    b_p = tl.load(p_p + i_d, mask=m_j[:, None] & m_d[None, :], other=0.0).to(tl.float64)  # [JP, BD]
    return b_h - tl.sum(b_p * b_c[:, None], 0)


@triton.jit
def _explicit(
    p_hidden, p_weight, p_gain, p_directions, p_offset, p_strengths, p_targets, p_out, o_h, i_i, m_i,
    d: tl.constexpr, K: tl.constexpr, J: tl.constexpr, eps: tl.constexpr, NORM: tl.constexpr, JP: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The K rewards of one row and one intervention from the changed row itself, in fp64."""
    acc = p_weight.dtype.element_ty
    o_d = tl.arange(0, BD)
    o_j = tl.arange(0, JP)
    m_j = o_j < J
    m_c = m_j & (tl.zeros([JP], tl.int32) + m_i > 0)
    p_h = p_hidden + o_h + o_d
    p_p = p_directions + o_j[:, None].to(tl.int64) * d + o_d[None, :]
    b_z = tl.zeros([JP], tl.float64)
    for i_d in range(0, d, BD):
        b_h = tl.load(p_h + i_d, mask=i_d + o_d < d, other=0.0).to(tl.float64)
        b_p = tl.load(p_p + i_d, mask=m_j[:, None] & (i_d + o_d < d)[None, :], other=0.0).to(tl.float64)
        b_z += tl.sum(b_p * b_h[None, :], 1)
    if p_targets is not None:
        b_z -= tl.load(p_targets + i_i * J + o_j, mask=m_c, other=0.0).to(tl.float64)
    b_c = b_z * tl.load(p_strengths + i_i * J + o_j, mask=m_c, other=0.0).to(tl.float64)
    b_mean = tl.zeros([], tl.float64)
    if NORM == LAYER:
        b_total = tl.zeros([BD], tl.float64)
        for i_d in range(0, d, BD):
            b_total += _changed(p_h, p_p, b_c, i_d, m_j, d, BD)
        b_mean = tl.sum(b_total) / d
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < K
        b_square = tl.zeros([BD], tl.float64)
        b_dots = tl.zeros([BK], tl.float64)
        for i_d in range(0, d, BD):
            m_d = i_d + o_d < d
            b_x = tl.where(m_d, _changed(p_h, p_p, b_c, i_d, m_j, d, BD) - b_mean, 0.0)
            b_square += b_x * b_x
            b_a = tl.load(
                p_weight + o_k[:, None].to(tl.int64) * d + (i_d + o_d)[None, :],
                mask=m_k[:, None] & m_d[None, :],
                other=0.0,
            )  # [BK, BD]
            if p_gain is not None:
                b_a = b_a * _gain(p_gain, i_d + o_d, m_d, NORM)[None, :]
            b_dots += tl.sum(b_a.to(tl.float64) * b_x[None, :], 1)
        if NORM != NONE:
            b_dots = b_dots * _inverse_norm(tl.sum(b_square), d, eps)
        b_dots += tl.load(p_offset + o_k, mask=m_k, other=0.0).to(tl.float64)
        tl.store(p_out + o_k, b_dots.to(acc), mask=m_k)


@triton.jit(do_not_specialize=["M", "T", "N", "stride_b", "stride_t", "I"])
def _finish(
    p_hidden, p_rows, p_weight, p_gain, p_directions, p_dots, p_stats, p_moments, p_offset, p_strengths, p_targets,
    p_index, p_out,
    M, T, N, stride_b, stride_t, I,  # noqa: E741
    d: tl.constexpr, K: tl.constexpr, J: tl.constexpr, eps: tl.constexpr, NORM: tl.constexpr, FLAT: tl.constexpr,
    BM: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, JP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Rewards after intervention from the dots (M, K + J) and stats of `_few` or `_many`.

    A program takes one tile of rows and, without an index, one intervention: those of a tile follow each other.
    """
    acc = p_weight.dtype.element_ty
    i_m = tl.program_id(0).to(tl.int64)
    i_i = i_m * 0
    if p_index is None:
        i_i = i_m % I
        i_m = i_m // I
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < M
    if p_index is not None:
        o_i = tl.load(p_index + o_m, mask=m_m, other=-1)
        m_i = (o_i >= 0) & (o_i < I)
        o_i = tl.where(m_i, o_i, 0)
        o_out = o_m * K
    else:
        o_i = tl.zeros([BM], tl.int64) + i_i
        m_i = m_m
        o_out = (o_m * I + i_i) * K
    b_n2 = tl.load(p_stats + o_m * 2, mask=m_m, other=0.0)
    b_mean = tl.zeros([BM], acc)
    if NORM == LAYER:
        b_mean = tl.load(p_stats + o_m * 2 + 1, mask=m_m, other=0.0)

    b_linear = tl.zeros([BM], acc)
    b_quadratic = tl.zeros([BM], acc)
    b_new_sum = tl.zeros([BM], acc)
    for i_j in range(0, J, BJ):
        o_j = i_j + tl.arange(0, BJ)
        b_c, b_z, b_sums = _coefficients(
            p_dots, p_moments, p_strengths, p_targets, o_m, m_m, o_i, m_i, b_mean, o_j, K, J, NORM
        )  # fmt: skip
        b_linear += tl.sum(b_c * b_z, 1)
        b_new_sum -= tl.sum(b_c * b_sums[None, :], 1)
        b_gc = tl.zeros([BM, BJ], acc)
        for i_l in range(0, J, BJ):
            o_l = i_l + tl.arange(0, BJ)
            b_cl, _z, _sums = _coefficients(
                p_dots, p_moments, p_strengths, p_targets, o_m, m_m, o_i, m_i, b_mean, o_l, K, J, NORM
            )  # fmt: skip
            b_gram = tl.load(
                p_moments + (K + o_l)[:, None].to(tl.int64) * (J + 1) + o_j[None, :],
                mask=(o_l < J)[:, None] & (o_j < J)[None, :], other=0.0,
            )  # fmt: skip
            b_gc = _matmul(b_cl, b_gram, b_gc)
        b_quadratic += tl.sum(b_gc * b_c, 1)
    b_linear = 2.0 * b_linear
    b_new_n2 = b_n2 - b_linear + b_quadratic
    if NORM == LAYER:
        b_new_mean = b_new_sum / d
        b_new_n2 -= b_new_mean * b_new_mean * d
    if NORM != NONE:
        b_inv = _inverse_norm(b_new_n2, d, eps)

    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < K
        m_out = m_m[:, None] & m_k[None, :]
        b_uc = tl.zeros([BM, BK], acc)
        for i_j in range(0, J, BJ):
            o_j = i_j + tl.arange(0, BJ)
            b_c, _z, _sums = _coefficients(
                p_dots, p_moments, p_strengths, p_targets, o_m, m_m, o_i, m_i, b_mean, o_j, K, J, NORM
            )  # fmt: skip
            b_u = tl.load(
                p_moments + o_k[None, :].to(tl.int64) * (J + 1) + o_j[:, None],
                mask=(o_j < J)[:, None] & m_k[None, :], other=0.0,
            )  # [BJ, BK]  # fmt: skip
            b_uc = _matmul(b_c, b_u, b_uc)
        b_s = tl.load(p_dots + o_m[:, None] * (K + J) + o_k[None, :], mask=m_out, other=0.0) - b_uc
        if NORM == LAYER:
            b_gain_sums = tl.load(p_moments + o_k.to(tl.int64) * (J + 1) + J, mask=m_k, other=0.0)
            b_s -= b_new_mean[:, None] * b_gain_sums[None, :]
        if NORM != NONE:
            b_s = b_s * b_inv[:, None]
        b_s += tl.load(p_offset + o_k, mask=m_k, other=0.0)[None, :]
        if p_index is not None:
            m_bad = m_m & (tl.load(p_index + o_m, mask=m_m, other=-1) != -1) & (m_i == 0)
            b_s = tl.where(m_bad[:, None], float("nan"), b_s)
        tl.store(p_out + o_out[:, None] + o_k[None, :], b_s, mask=m_out)

    m_cancelled = (m_m & (b_new_n2 < (b_n2 + tl.abs(b_linear) + b_quadratic) * CANCELLATION)).to(tl.int32)
    if tl.max(m_cancelled) > 0:
        # The stores above and those below may come from different threads.
        tl.debug_barrier()
        o_h, _m = _row_offsets(p_rows, o_m, M, T, N, stride_b, stride_t, 1, FLAT)
        for i_r in range(BM):
            m_r = tl.arange(0, BM) == i_r
            if tl.sum(tl.where(m_r, m_cancelled, 0)) > 0:
                _explicit(
                    p_hidden, p_weight, p_gain, p_directions, p_offset, p_strengths, p_targets,
                    p_out + tl.sum(tl.where(m_r, o_out, 0)), tl.sum(tl.where(m_r, o_h, 0)),
                    tl.sum(tl.where(m_r, o_i, 0)), tl.sum(tl.where(m_r, m_i.to(tl.int32), 0)),
                    d, K, J, eps, NORM, JP, BK, BD,
                )  # fmt: skip


@triton.jit(do_not_specialize=["M", "T", "N", "stride_b", "stride_t"])
def _backward_fused(
    p_grad, p_hidden, p_rows, p_weight, p_gain, p_grad_rows, p_partial,
    M, T, N, stride_b, stride_t,
    d: tl.constexpr, K: tl.constexpr, eps: tl.constexpr, NORM: tl.constexpr, FLAT: tl.constexpr,
    NEED_ROWS: tl.constexpr, NEED_DOTS: tl.constexpr,
    BM: tl.constexpr, DP: tl.constexpr, VEC: tl.constexpr, VA: tl.constexpr,
):  # fmt: skip
    """Gradient of the rows (M, d), and for each program its rows' part of V, partial (programs, K, d)."""
    acc = p_weight.dtype.element_ty
    G: tl.constexpr = DP // VEC
    PARTS: tl.constexpr = VEC // VA
    o_a = (tl.arange(0, G)[:, None] * VEC + tl.arange(0, VA)[None, :])[None]  # [1, G, VA]
    o_d = tl.arange(0, DP)[None, :]
    m_d = o_d < d
    i_p = tl.program_id(0).to(tl.int64)
    b_v = (tl.zeros([1, G, VA], acc),) * (K * PARTS)
    for i_m in range(i_p * BM, M, tl.num_programs(0) * BM):
        o_m = i_m + tl.arange(0, BM).to(tl.int64)
        m_m = o_m < M
        o_h, m_h = _row_offsets(p_rows, o_m, M, T, N, stride_b, stride_t, VEC, FLAT)
        m_x = m_h[:, None] & m_d
        b_x = tl.load(p_hidden + o_h[:, None] + o_d, mask=m_x, other=0.0).to(acc)  # [BM, DP]
        if p_rows is not None:
            b_x = tl.where((m_m & (m_h == 0))[:, None], float("nan"), b_x)
        if NORM == LAYER:
            b_mean = tl.sum(b_x, 1) / d
            b_x = tl.where(m_x, b_x - b_mean[:, None], b_x * 0.0)
        if NORM != NONE:
            b_inv = _inverse_norm(tl.sum(b_x * b_x, 1), d, eps)
        b_x = tl.reshape(b_x, [BM, G, VEC])
        b_ys = (tl.zeros([BM, G, VA], acc),) * PARTS
        for k in tl.static_range(K):
            b_g = tl.load(p_grad + o_m * K + k, mask=m_m, other=0.0)
            if NORM != NONE:
                b_g = tl.where(m_m, b_g * b_inv, 0.0)
            b_g = b_g[:, None, None]
            for i_v in tl.static_range(PARTS):
                if NEED_DOTS:
                    b_part = tl.sum(_part(b_x, i_v, VA) * b_g, 0)[None]
                    b_v = _replace(b_v, k * PARTS + i_v, b_v[k * PARTS + i_v] + b_part)
                if NEED_ROWS:
                    b_a = tl.load(p_weight + k * d + o_a + i_v * VA, mask=o_a + i_v * VA < d, other=0.0)
                    if p_gain is not None:
                        b_a = b_a * _gain(p_gain, o_a + i_v * VA, o_a + i_v * VA < d, NORM)
                    b_y = b_ys[i_v]
                    b_y = tl.fma(tl.broadcast_to(b_g, b_y.shape), tl.broadcast_to(b_a, b_y.shape), b_y)
                    b_ys = _replace(b_ys, i_v, b_y)
        if NEED_ROWS:
            b_y = tl.reshape(_whole(b_ys), [BM, DP])
            b_x = tl.reshape(b_x, [BM, DP])
            if NORM == LAYER:
                b_y_mean = tl.sum(b_y, 1) / d
            if NORM != NONE:
                b_coef = tl.sum(b_y * b_x, 1) * b_inv * b_inv / d
                b_y = b_y - b_x * b_coef[:, None]
            if NORM == LAYER:
                b_y = b_y - b_y_mean[:, None]
            tl.store(
                p_grad_rows + o_m[:, None] * d + o_d, b_y.to(p_grad_rows.dtype.element_ty), mask=m_m[:, None] & m_d
            )
    if NEED_DOTS:
        for n in tl.static_range(K * PARTS):
            o_v = o_a + n % PARTS * VA
            tl.store(p_partial + (i_p * K + n // PARTS) * d + o_v, b_v[n], mask=o_v < d)


@triton.jit
def _scaled_gain(p_grad, p_weight, p_gain, o_m, m_m, b_inv, o_d, m_d, d: tl.constexpr, K: tl.constexpr,
                 NORM: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Σ_k g_k inv a_k: [BM, BD]."""
    b_y = tl.zeros([BM, BD], p_weight.dtype.element_ty)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < K
        b_g = tl.load(p_grad + o_m[:, None] * K + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_a = tl.load(
            p_weight + o_k[:, None].to(tl.int64) * d + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0
        )  # [BK, BD]
        if p_gain is not None:
            b_a = b_a * _gain(p_gain, o_d, m_d, NORM)[None, :]
        b_y = _matmul(b_g * b_inv[:, None], b_a, b_y)
    return b_y


@triton.jit(do_not_specialize=["M", "T", "N", "stride_b", "stride_t"])
def _backward_rows(
    p_grad, p_hidden, p_rows, p_weight, p_gain, p_grad_rows, p_stats,
    M, T, N, stride_b, stride_t,
    d: tl.constexpr, K: tl.constexpr, eps: tl.constexpr, NORM: tl.constexpr, FLAT: tl.constexpr,
    NEED_ROWS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Gradient of the rows (M, d), and stats (M, 2): inverse norm and mean."""
    acc = p_weight.dtype.element_ty
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_m = o_m < M
    o_h, m_h = _row_offsets(p_rows, o_m, M, T, N, stride_b, stride_t, VEC, FLAT)
    o_b = tl.arange(0, BD)
    p_h = p_hidden + o_h[:, None] + o_b[None, :]
    b_mean = tl.zeros([BM], acc)
    b_inv = tl.full([BM], 1.0, acc)
    if NORM == LAYER:
        for i_d in range(0, d, BD):
            b_h = tl.load(p_h + i_d, mask=m_h[:, None] & (i_d + o_b < d)[None, :], other=0.0)
            b_mean += tl.sum(b_h.to(acc), 1)
        b_mean = b_mean / d
    if NORM != NONE:
        b_n2 = tl.zeros([BM], acc)
        for i_d in range(0, d, BD):
            m_x = m_h[:, None] & (i_d + o_b < d)[None, :]
            b_x = tl.load(p_h + i_d, mask=m_x, other=0.0).to(acc)
            b_x = tl.where(m_x, b_x - b_mean[:, None], 0.0)
            b_n2 += tl.sum(b_x * b_x, 1)
        b_inv = _inverse_norm(b_n2, d, eps)
    b_inv = tl.where(m_h, b_inv, float("nan"))
    tl.store(p_stats + o_m * 2, b_inv, mask=m_m)
    tl.store(p_stats + o_m * 2 + 1, b_mean, mask=m_m)
    if NEED_ROWS:
        b_projection = tl.zeros([BM], acc)
        b_y_sum = tl.zeros([BM], acc)
        if NORM != NONE:
            for i_d in range(0, d, BD):
                m_d = i_d + o_b < d
                m_x = m_h[:, None] & m_d[None, :]
                b_x = tl.load(p_h + i_d, mask=m_x, other=0.0).to(acc)
                b_x = tl.where(m_x, b_x - b_mean[:, None], 0.0)
                b_y = _scaled_gain(
                    p_grad, p_weight, p_gain, o_m, m_m, b_inv, i_d + o_b, m_d, d, K, NORM, BM, BK, BD
                )  # fmt: skip
                b_projection += tl.sum(b_y * b_x, 1)
                b_y_sum += tl.sum(b_y, 1)
        b_coef = b_projection * b_inv * b_inv / d
        for i_d in range(0, d, BD):
            m_d = i_d + o_b < d
            m_x = m_h[:, None] & m_d[None, :]
            b_y = _scaled_gain(
                p_grad, p_weight, p_gain, o_m, m_m, b_inv, i_d + o_b, m_d, d, K, NORM, BM, BK, BD
            )  # fmt: skip
            if NORM != NONE:
                b_x = tl.load(p_h + i_d, mask=m_x, other=0.0).to(acc)
                b_x = tl.where(m_x, b_x - b_mean[:, None], 0.0)
                b_y = b_y - b_x * b_coef[:, None]
            if NORM == LAYER:
                b_y = b_y - (b_y_sum / d)[:, None]
            tl.store(
                p_grad_rows + o_m[:, None] * d + (i_d + o_b)[None, :],
                b_y.to(p_grad_rows.dtype.element_ty),
                mask=m_m[:, None] & m_d[None, :],
            )


@triton.jit(do_not_specialize=["M", "T", "N", "stride_b", "stride_t", "CHUNK"])
def _backward_dots(
    p_grad, p_hidden, p_rows, p_stats, p_partial,
    M, T, N, stride_b, stride_t, CHUNK,
    d: tl.constexpr, K: tl.constexpr, FLAT: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """One tile of V over the rows of chunk i: partial (chunks, K, d)."""
    acc = p_grad.dtype.element_ty
    i_c = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    o_d = tl.program_id(2) * BD + tl.arange(0, BD)
    m_k = o_k < K
    m_d = o_d < d
    b_v = tl.zeros([BK, BD], acc)
    for i_m in range(i_c * CHUNK, tl.minimum(i_c * CHUNK + CHUNK, M), BM):
        o_m = i_m + tl.arange(0, BM).to(tl.int64)
        m_m = o_m < M
        o_h, m_h = _row_offsets(p_rows, o_m, M, T, N, stride_b, stride_t, VEC, FLAT)
        m_x = m_h[:, None] & m_d[None, :]
        b_inv = tl.load(p_stats + o_m * 2, mask=m_m, other=0.0)
        b_mean = tl.load(p_stats + o_m * 2 + 1, mask=m_m, other=0.0)
        b_x = tl.load(p_hidden + o_h[:, None] + o_d[None, :], mask=m_x, other=0.0).to(acc)
        b_x = tl.where(m_x, b_x - b_mean[:, None], 0.0)  # [BM, BD]
        b_g = tl.load(p_grad + o_m[None, :] * K + o_k[:, None], mask=m_m[None, :] & m_k[:, None], other=0.0)
        b_v = _matmul(b_g * b_inv[None, :], b_x, b_v)
    tl.store(
        p_partial + (i_c * K + o_k[:, None]) * d + o_d[None, :], b_v, mask=m_k[:, None] & m_d[None, :]
    )  # fmt: skip


def vector_width(d: int, dtype: torch.dtype) -> int:
    """Elements in a thread's load of a row: 16 bytes where d is a multiple of that, else 1."""
    width = 16 // dtype.itemsize
    return width if d % width == 0 else 1


def few_config(d: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles of 4 warps x 16 bytes across and 4 rows deep, narrower and deeper where d would fill less than 80%."""
    vec = vector_width(d, dtype)
    block = 128 * vec
    while block > 16 and triton.cdiv(d, block) * block > 1.25 * d:
        block //= 2
    return {"BM": 4 * 128 * vec // block, "BD": block, "VEC": vec, "VA": _part_width(vec, dtype), "num_warps": 4}


def _part_width(vec: int, dtype: torch.dtype) -> int:
    return min(vec, 2 if dtype == torch.float64 else 4)


def prepare_config(directions: int, acc: torch.dtype) -> dict[str, int]:
    """32 numbers a thread; few passes over d, for the launch before the one that reads the rows is all latency."""
    block = min(triton.next_power_of_2(max(directions, 1)), 16)
    return {"BJ": block, "BD": min(32 * 1024 // acc.itemsize // block, 2048), "num_warps": 8}


def many_config(dots: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles of the skinny GEMM, and the terms a dot is split into.

    The dots are read again for every BM rows: 128 rows keep that below the rows' own bytes up to about 64 dots.
    Error at d = 2048 as a share of the reward scale, from a bit-true model of the tensor cores on normal numbers:
    bf16 rows with three terms 1.4e-7 (two: 2.4e-6; three, but one chain of truncating additions: 2.4e-6), fp32 rows in
    two tf32 parts 2.0e-7 (one chain: 6.3e-6), fp32 FMAs in order 3.7e-7. Two terms of fp16 hold an fp32's bits.
    """
    block = min(max(triton.next_power_of_2(dots), 16), 64)
    if dtype == torch.float64:
        return {"BM": 16, "BN": 16, "BD": 16, "TERMS": 1, "num_warps": 4, "num_stages": 2}
    if dtype == torch.float32:
        return {
            "BM": 64, "BN": block, "BD": 32, "TERMS": 2, "num_warps": 4, "num_stages": 3, "maxnreg": 224,
        }  # fmt: skip
    terms = 3 if dtype == torch.bfloat16 else 2
    return {"BM": 128, "BN": block, "BD": 64, "TERMS": terms, "num_warps": 8, "num_stages": 3}


def finish_config(heads: int, directions: int, acc: torch.dtype) -> dict[str, int]:
    """Tiles of the interventions' algebra; the fp64 tile of an explicit row holds 2048 elements where J allows.

    A cap on registers well above the need keeps ptxas from spilling for the sake of one more program per SM.
    """
    widest = 16 if acc == torch.float64 else 32
    padded = triton.next_power_of_2(directions)
    return {
        "BM": 16, "BJ": min(max(padded, 16), widest), "BK": min(max(triton.next_power_of_2(heads), 16), widest),
        "JP": padded, "BD": max(1, 2048 // max(padded, 32)), "num_warps": 4, "maxnreg": 168,
    }  # fmt: skip


def fused_backward_config(d: int, heads: int, dtype: torch.dtype) -> dict[str, int] | None:
    """Whole rows in registers, 32 elements a thread, beside at most 64 of V; None where that does not fit."""
    padded = max(16, triton.next_power_of_2(d))
    size = padded * (2 if dtype == torch.float64 else 1)
    if size > 8192 or heads * size > 16384 or heads > FEW:
        return None
    vec = vector_width(d, dtype)
    return {
        "BM": max(1, (8192 if heads <= 2 else 4096) // size), "DP": padded, "VEC": vec, "VA": _part_width(vec, dtype),
        "num_warps": 8,
    }  # fmt: skip


def split_backward_config(heads: int, dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float64:
        return {"BM": 16, "BK": 16, "BD": 16, "num_warps": 4, "num_stages": 2, "maxnreg": 255}
    block = min(max(triton.next_power_of_2(heads), 16), 32)
    return {"BM": 32, "BK": block, "BD": 64, "num_warps": 4, "num_stages": 2, "maxnreg": 255}


class _Rows:
    """The rows read, as the kernels take them: every row starts at a multiple of the vector width."""

    def __init__(self, hidden: Tensor, rows: Tensor | None) -> None:
        vec = vector_width(hidden.size(-1), hidden.dtype)
        if vec > 1 and not self._aligned(hidden, vec):
            if rows is None:
                hidden = hidden.clone(memory_format=torch.contiguous_format)
            else:
                inside = (rows >= 0) & (rows < hidden.size(0) * hidden.size(1))
                safe = torch.where(inside, rows, 0)
                hidden = hidden[safe // hidden.size(1), safe % hidden.size(1)][None]
                rows = torch.where(inside, torch.arange(rows.size(0), device=rows.device), -1)
        batch, tokens, self.d = hidden.shape
        stride_b, stride_t = self._strides(hidden)
        self.hidden, self.rows = hidden, _aligned(rows)
        self.count = batch * tokens if rows is None else rows.size(0)
        # Without it a row's place costs a 64-bit division.
        self.flat = batch == 1 or stride_b == tokens * stride_t
        self.shape = (self.count, tokens, batch * tokens, stride_b, stride_t)

    @staticmethod
    def _strides(hidden: Tensor) -> tuple[int, int]:
        """Strides of batch and token; that of an axis of one element is put where it does no harm."""
        stride_b, stride_t = hidden.stride(0), hidden.stride(1)
        if hidden.size(1) == 1:
            stride_t = stride_b
        if hidden.size(0) == 1:
            stride_b = hidden.size(1) * stride_t
        return stride_b, stride_t

    @classmethod
    def _aligned(cls, hidden: Tensor, vec: int) -> bool:
        return hidden.data_ptr() % 16 == 0 and all(stride % vec == 0 for stride in cls._strides(hidden))


def _aligned(value: Any) -> Any:
    """A copy where a view starts off 16 bytes: the width of loads, and with it the order of sums, must not vary."""
    return value if value is None or value.data_ptr() % 16 == 0 else value.clone()


def _device(hidden: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; the stream is that device's current one, as torch's own ops use."""
    return torch.cuda.device(hidden.device) if hidden.device.type == "cuda" else contextlib.nullcontext()


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    rows: Tensor | None,
    directions: Tensor | None,
    strengths: Tensor | None,
    targets: Tensor | None,
    intervention_index: Tensor | None,
) -> Tensor:
    """Rewards (M, K), or (M, I, K) with interventions and no `intervention_index`.

    A row or intervention index out of range gives NaN for its row. Nothing synchronises with the host.
    """
    weight, bias, norm_weight, norm_bias, directions, strengths, targets, intervention_index = (
        _aligned(value)
        for value in (weight, bias, norm_weight, norm_bias, directions, strengths, targets, intervention_index)
    )
    with _device(hidden):
        read = _Rows(hidden, rows)
        heads, d = weight.shape
        count = 0 if directions is None else directions.size(0)
        dots = heads + count
        few = dots <= FEW
        out = weight.new_empty(read.count, dots)
        stats = None if directions is None else weight.new_empty(read.count, 2)
        common = {"d": d, "eps": eps, "NORM": norm, "FLAT": read.flat, "enable_fp_fusion": False}

        packed = scale = offset = moments = None
        many = many_config(dots, hidden.dtype)
        padded = triton.cdiv(d, 16) * 16
        if not few or directions is not None:
            if not few:
                packed = hidden.new_empty(many["TERMS"], dots, padded)
                scale = weight.new_empty(dots) if hidden.dtype.itemsize == 2 else None
            offset = weight.new_empty(heads)
            moments = None if directions is None else weight.new_empty(dots, count + 1)
            prepare = prepare_config(count, weight.dtype)
            _prepare[(dots, max(1, triton.cdiv(count, prepare["BJ"])))](
                weight, bias, norm_weight, norm_bias, directions, packed, scale, offset, moments,
                d=d, K=heads, J=count, NORM=norm, TERMS=many["TERMS"], DP=padded, enable_fp_fusion=False, **prepare,
            )  # fmt: skip
        if few:
            config = few_config(d, hidden.dtype)
            _few[(triton.cdiv(read.count, config["BM"]),)](
                read.hidden, read.rows, weight, bias, norm_weight, norm_bias, directions, out, stats, *read.shape,
                K=heads, J=count, **common, **config,
            )  # fmt: skip
        else:
            _many[(triton.cdiv(read.count, many["BM"]) * triton.cdiv(dots, many["BN"]),)](
                read.hidden, read.rows, packed, scale, offset, out, stats, *read.shape,
                DOTS=dots, DP=padded, VEC=vector_width(d, hidden.dtype), **common, **many,
            )  # fmt: skip
        if directions is None:
            return out

        assert strengths is not None
        interventions = strengths.size(0)
        shape = (read.count, interventions, heads) if intervention_index is None else (read.count, heads)
        rewards = weight.new_empty(shape)
        config = finish_config(heads, count, weight.dtype)
        _finish[(triton.cdiv(read.count, config["BM"]) * (interventions if intervention_index is None else 1),)](
            read.hidden, read.rows, weight, norm_weight, directions, out, stats, moments, offset, strengths, targets,
            intervention_index, rewards, *read.shape, interventions, K=heads, J=count, **common, **config,
        )  # fmt: skip
        return rewards


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    norm: int,
    norm_weight: Tensor | None,
    eps: float,
    rows: Tensor | None,
    need_rows: bool,
    need_dots: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of the rows read, (M, d) in hidden's dtype, and V (K, d); one that is not needed comes back empty.

    V is summed in parts of rows, and the parts in order: no atomics, the same bits every time.
    """
    grad, weight, norm_weight = _aligned(grad), _aligned(weight), _aligned(norm_weight)
    with _device(hidden):
        read = _Rows(hidden, rows)
        heads, d = weight.shape
        grad_rows = hidden.new_empty((read.count, d) if need_rows else (0,))
        common = {"d": d, "K": heads, "FLAT": read.flat, "enable_fp_fusion": False}
        fused = fused_backward_config(d, heads, hidden.dtype)
        if fused is not None:
            programs = min(_BACKWARD_PROGRAMS, triton.cdiv(read.count, fused["BM"]))
            partial = weight.new_empty((programs, heads, d) if need_dots else (1, 0))
            _backward_fused[(programs,)](
                grad, read.hidden, read.rows, weight, norm_weight, grad_rows, partial, *read.shape,
                eps=eps, NORM=norm, NEED_ROWS=need_rows, NEED_DOTS=need_dots, **common, **fused,
            )  # fmt: skip
            return grad_rows, partial.sum(0)

        config = split_backward_config(heads, hidden.dtype)
        vec = vector_width(d, hidden.dtype)
        stats = weight.new_empty(read.count, 2)
        _backward_rows[(triton.cdiv(read.count, config["BM"]),)](
            grad, read.hidden, read.rows, weight, norm_weight, grad_rows, stats, *read.shape,
            eps=eps, NORM=norm, NEED_ROWS=need_rows, VEC=vec, **common, **config,
        )  # fmt: skip
        if not need_dots:
            return grad_rows, weight.new_empty(0)
        tiles = (triton.cdiv(heads, config["BK"]), triton.cdiv(d, config["BD"]))
        chunks = max(1, min(64, 1024 // (tiles[0] * tiles[1]), triton.cdiv(read.count, 4 * config["BM"])))
        chunk = triton.cdiv(triton.cdiv(read.count, chunks), config["BM"]) * config["BM"]
        chunks = triton.cdiv(read.count, chunk)
        partial = weight.new_empty(chunks, heads, d)
        _backward_dots[(chunks, *tiles)](
            grad, read.hidden, read.rows, stats, partial, *read.shape, chunk, VEC=vec, **common, **config
        )  # fmt: skip
        return grad_rows, partial.sum(0)
