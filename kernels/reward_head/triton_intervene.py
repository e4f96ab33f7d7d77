"""Interventions, from a row's dots, squared norm and mean; and the rows where that cancels, once more in fp64."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .triton_matmul import matmul
from .triton_norm import LAYER, NONE, inverse_norm, load_gain
from .triton_prepare import Prepared
from .triton_rows import Rows, row_offsets

CANCELLATION = tl.constexpr(reference.CANCELLATION)


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
                b_a = b_a * load_gain(p_gain, i_d + o_d, m_d, NORM)[None, :]
            b_dots += tl.sum(b_a.to(tl.float64) * b_x[None, :], 1)
        if NORM != NONE:
            b_dots = b_dots * inverse_norm(tl.sum(b_square), d, eps)
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
    """Rewards after intervention from the dots (M, K + J) and stats of `few` or `many`.

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
            b_gc = matmul(b_cl, b_gram, b_gc)
        b_quadratic += tl.sum(b_gc * b_c, 1)
    b_linear = 2.0 * b_linear
    b_new_n2 = b_n2 - b_linear + b_quadratic
    if NORM == LAYER:
        b_new_mean = b_new_sum / d
        b_new_n2 -= b_new_mean * b_new_mean * d
    if NORM != NONE:
        b_inv = inverse_norm(b_new_n2, d, eps)

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
            b_uc = matmul(b_c, b_u, b_uc)
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
        o_h, _m = row_offsets(p_rows, o_m, M, T, N, stride_b, stride_t, 1, FLAT)
        for i_r in range(BM):
            m_r = tl.arange(0, BM) == i_r
            if tl.sum(tl.where(m_r, m_cancelled, 0)) > 0:
                _explicit(
                    p_hidden, p_weight, p_gain, p_directions, p_offset, p_strengths, p_targets,
                    p_out + tl.sum(tl.where(m_r, o_out, 0)), tl.sum(tl.where(m_r, o_h, 0)),
                    tl.sum(tl.where(m_r, o_i, 0)), tl.sum(tl.where(m_r, m_i.to(tl.int32), 0)),
                    d, K, J, eps, NORM, JP, BK, BD,
                )  # fmt: skip


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


def intervene(
    read: Rows,
    dots: Tensor,
    stats: Tensor,
    prepared: Prepared,
    weight: Tensor,
    norm: int,
    norm_weight: Tensor | None,
    eps: float,
    directions: Tensor,
    strengths: Tensor,
    targets: Tensor | None,
    intervention_index: Tensor | None,
) -> Tensor:
    """Rewards (M, I, K), or (M, K) with an index."""
    heads, d = weight.shape
    count, interventions = directions.size(0), strengths.size(0)
    shape = (read.count, interventions, heads) if intervention_index is None else (read.count, heads)
    rewards = weight.new_empty(shape)
    config = finish_config(heads, count, weight.dtype)
    _finish[(triton.cdiv(read.count, config["BM"]) * (interventions if intervention_index is None else 1),)](
        read.hidden, read.rows, weight, norm_weight, directions, dots, stats, prepared.moments, prepared.offset,
        strengths, targets, intervention_index, rewards, *read.shape, interventions,
        d=d, K=heads, J=count, eps=eps, NORM=norm, FLAT=read.flat, enable_fp_fusion=False, **config,
    )  # fmt: skip
    return rewards
