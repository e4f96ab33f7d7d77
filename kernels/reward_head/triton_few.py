"""Up to 8 dots per row, heads and directions together: one read of the rows at the speed of the read."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels.launch import cdiv

from .triton_fma import fma_dot, padded, part, part_width, replace
from .triton_norm import LAYER, NONE, inverse_norm, load_gain
from .triton_rows import Rows, accumulation, row_offsets, vector_width


@triton.jit(do_not_specialize=["M", "T", "N", "stride_b", "stride_t"])
def _few(
    p_hidden, p_rows, p_weight, p_bias, p_gain, p_norm_bias, p_directions, p_out, p_stats,
    M, T, N, stride_b, stride_t, J, eps: tl.float64,
    d: tl.constexpr, K: tl.constexpr, JP: tl.constexpr, NORM: tl.constexpr, FLAT: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, VEC: tl.constexpr, VA: tl.constexpr,
):  # fmt: skip
    """Rewards (M, K); with J > 0 the dots (M, K + J) of the centred rows, and stats (M, 2): squared norm and mean.

    It computes JP dots, the power of 2 from J on: of zeros from J on. Weights, gain and biases may be in 16 bits.
    """
    acc = p_out.dtype.element_ty
    G: tl.constexpr = BD // VEC
    WHOLE: tl.constexpr = d % BD == 0
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_h, m_h = row_offsets(p_rows, o_m, M, T, N, stride_b, stride_t, VEC, FLAT)
    o_b = tl.arange(0, BD)[None, :]
    p_h = p_hidden + o_h[:, None] + o_b
    o_g = tl.arange(0, G)[None, :, None] * VEC
    o_a = tl.arange(0, VA)[None, None, :]

    b_zero = tl.zeros([BM, G], acc)
    b_square = b_zero
    b_dots = (b_zero,) * (K + JP)
    if NORM == LAYER:
        # Sums are taken of h minus its mean over the first block, which differs from the row's mean by at most
        # sqrt(d / BD) standard deviations: the variance then loses a factor of at most d / BD to cancellation.
        b_first = tl.load(p_h, mask=m_h[:, None] & (o_b < d), other=0.0).to(acc)
        b_shift = tl.sum(b_first, 1) / min(BD, d)  # [BM]
        b_sum = b_zero
        b_gain_sums = (tl.zeros([1, G], acc),) * (K + JP)
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
            b_x = part(b_h, i_v, VA)  # [BM, G, VA]
            b_square = fma_dot(b_x, b_x, b_square)
            o_d = i_d + o_g + i_v * VA + o_a
            m_a = o_d < d
            if p_gain is not None:
                b_gain = load_gain(p_gain, o_d, m_a, NORM)
            if NORM == LAYER:
                b_sum = b_sum + tl.sum(b_x, 2)
            for n in tl.static_range(K + JP):
                if n < K:
                    b_a = tl.load(p_weight + n * d + o_d, mask=m_a, other=0.0).to(acc)  # [1, G, VA]
                    if p_norm_bias is not None:
                        b_beta = tl.load(p_norm_bias + o_d, mask=m_a, other=0.0).to(acc)
                        b_offsets = replace(b_offsets, n, b_offsets[n] + tl.sum(b_a * b_beta, 2))
                    if p_gain is not None:
                        b_a = b_a * b_gain
                    if NORM == LAYER:
                        b_gain_sums = replace(b_gain_sums, n, b_gain_sums[n] + tl.sum(b_a, 2))
                else:
                    m_n = m_a
                    if n - K > JP // 2:
                        m_n = m_a & (n - K < J)
                    b_a = tl.load(p_directions + (n - K) * d + o_d, mask=m_n, other=0.0)
                    if NORM == LAYER:
                        b_gain_sums = replace(b_gain_sums, n, b_gain_sums[n] + tl.sum(b_a, 2))
                b_dots = replace(b_dots, n, fma_dot(b_x, b_a, b_dots[n]))

    m_m = o_m < M
    b_n2 = tl.sum(b_square, 1)  # [BM]
    if NORM == LAYER:
        b_delta = tl.sum(b_sum, 1) / d
        b_n2 = b_n2 - b_delta * b_delta * d
    b_n2 = tl.where(m_h, b_n2, float("nan"))
    if JP > 0:
        tl.store(p_stats + o_m * 2, b_n2, mask=m_m)
        if NORM == LAYER:
            tl.store(p_stats + o_m * 2 + 1, b_shift + b_delta, mask=m_m)
    elif NORM != NONE:
        b_inv = inverse_norm(b_n2, d, eps)
    for n in tl.static_range(K + JP):
        b_s = tl.where(m_h, tl.sum(b_dots[n], 1), float("nan"))
        if NORM == LAYER:
            b_s = b_s - b_delta * tl.sum(b_gain_sums[n])
        if JP == 0:
            if NORM != NONE:
                b_s = b_s * b_inv
            if p_norm_bias is not None:
                b_s = b_s + tl.sum(b_offsets[n])
            if p_bias is not None:
                b_s = b_s + tl.load(p_bias + n).to(acc)
        m_n = m_m
        if n - K > JP // 2:
            m_n = m_m & (n - K < J)
        tl.store(p_out + o_m * (K + J if JP > 0 else K) + n, b_s, mask=m_n)


@functools.cache
def few_config(d: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles of 4 warps x 16 bytes across and 4 rows deep, narrower and deeper where d would fill less than 80%."""
    vec = vector_width(d, dtype)
    block = 128 * vec
    while block > 16 and cdiv(d, block) * block > 1.25 * d:
        block //= 2
    config = {"BM": 4 * 128 * vec // block, "BD": block, "VEC": vec, "VA": part_width(vec, dtype), "num_warps": 4}
    # Without a cap ptxas spills a register on sm_100 for the sake of one more program per SM.
    return {**config, "maxnreg": 168} if dtype == torch.float32 else config


def few(
    read: Rows,
    weight: Tensor,
    bias: Tensor | None,
    norm: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    directions: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Rewards (M, K) and None; with directions the dots (M, K + J) and stats (M, 2)."""
    heads, d = weight.shape
    count = 0 if directions is None else directions.size(0)
    acc = accumulation(read.hidden.dtype)
    out = weight.new_empty(read.count, heads + count, dtype=acc)
    stats = None if directions is None else weight.new_empty(read.count, 2, dtype=acc)
    config = few_config(d, read.hidden.dtype)
    _few[(cdiv(read.count, config["BM"]),)](
        read.hidden, read.rows, weight, bias, norm_weight, norm_bias, directions, out, stats, *read.shape, count,
        eps, d=d, K=heads, JP=padded(count), NORM=norm, FLAT=read.flat, enable_fp_fusion=False, **config,
    )  # fmt: skip
    return out, stats
