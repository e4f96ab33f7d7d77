"""Interventions, from a row's dots, squared norm and mean."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels.launch import cdiv

from .triton_explicit import explicit_rows
from .triton_fma import padded
from .triton_matmul import matmul
from .triton_norm import LAYER, NONE, inverse_norm
from .triton_prepare import Prepared
from .triton_rows import Rows


@triton.jit
def _coefficients(
    p_dots, p_moments, p_strengths, p_targets, o_m, m_m, o_i, m_i, b_mean, o_j, K, J, NORM: tl.constexpr,
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


@triton.jit(do_not_specialize=["M", "T", "N", "stride_b", "stride_t", "I"])
def _finish(
    p_hidden, p_rows, p_weight, p_gain, p_directions, p_dots, p_stats, p_moments, p_offset, p_strengths, p_targets,
    p_index, p_out,
    M, T, N, stride_b, stride_t, I, K, J, eps: tl.float64,  # noqa: E741
    d: tl.constexpr, NORM: tl.constexpr, FLAT: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
    JP: tl.constexpr, KP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Rewards after intervention from the dots (M, K + J) and stats of `few` or `many`.

    A program takes one tile of rows and, without an index, one intervention: those of a tile follow each other. For
    many directions or heads; few of both without an index go by `_finish_all`.
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
    for i_j in range(0, BJ if JP <= BJ else J, BJ):
        o_j = i_j + tl.arange(0, BJ)
        b_c, b_z, b_sums = _coefficients(
            p_dots, p_moments, p_strengths, p_targets, o_m, m_m, o_i, m_i, b_mean, o_j, K, J, NORM
        )  # fmt: skip
        b_linear += tl.sum(b_c * b_z, 1)
        b_new_sum -= tl.sum(b_c * b_sums[None, :], 1)
        b_gc = tl.zeros([BM, BJ], acc)
        for i_l in range(0, BJ if JP <= BJ else J, BJ):
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

    for i_k in range(0, BK if KP <= BK else K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < K
        m_out = m_m[:, None] & m_k[None, :]
        b_uc = tl.zeros([BM, BK], acc)
        for i_j in range(0, BJ if JP <= BJ else J, BJ):
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

    explicit_rows(
        b_new_n2, b_n2 + tl.abs(b_linear) + b_quadratic, p_hidden, p_rows, p_weight, p_gain, p_directions, p_offset,
        p_strengths, p_targets, p_out, o_m, m_m, o_i, m_i, o_out, M, T, N, stride_b, stride_t, K, J, eps,
        d, NORM, FLAT, BM, JP, KP, BK, BD,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "T", "N", "stride_b", "stride_t", "I"])
def _finish_all(
    p_hidden, p_rows, p_weight, p_gain, p_directions, p_dots, p_stats, p_moments, p_offset, p_strengths, p_targets,
    p_out,
    M, T, N, stride_b, stride_t, I, K, J, eps: tl.float64,  # noqa: E741
    d: tl.constexpr, NORM: tl.constexpr, FLAT: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
    JP: tl.constexpr, KP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """`_finish` for a tile of rows under all interventions, one after the other: the rows' dots [BM, BJ] and [BM, BK],
    the directions' products [BJ, BJ] and those with the heads [BJ, BK] stay on the chip."""
    acc = p_weight.dtype.element_ty
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_m = o_m < M
    o_j, o_k = tl.arange(0, BJ), tl.arange(0, BK)
    m_j, m_k = o_j < J, o_k < K
    m_out = m_m[:, None] & m_k[None, :]
    p_dot = p_dots + o_m[:, None] * (K + J)
    b_z = tl.load(p_dot + (K + o_j)[None, :], mask=m_m[:, None] & m_j[None, :], other=0.0)
    b_heads = tl.load(p_dot + o_k[None, :], mask=m_out, other=0.0)
    p_products = p_moments + o_j[:, None] * (J + 1)
    b_gram = tl.load(p_products + K * (J + 1) + o_j[None, :], mask=m_j[:, None] & m_j[None, :], other=0.0)
    b_u = tl.load(p_moments + o_k[None, :] * (J + 1) + o_j[:, None], mask=m_j[:, None] & m_k[None, :], other=0.0)
    b_offset = tl.load(p_offset + o_k, mask=m_k, other=0.0)
    b_n2 = tl.load(p_stats + o_m * 2, mask=m_m, other=0.0)
    b_seen = b_z
    if NORM == LAYER:
        b_sums = tl.load(p_moments + (K + o_j) * (J + 1) + J, mask=m_j, other=0.0)
        b_gain_sums = tl.load(p_moments + o_k * (J + 1) + J, mask=m_k, other=0.0)
        b_mean = tl.load(p_stats + o_m * 2 + 1, mask=m_m, other=0.0)
        b_seen = tl.fma(tl.broadcast_to(b_mean[:, None], b_z.shape), tl.broadcast_to(b_sums[None, :], b_z.shape), b_z)
    for i_i in range(I):
        b_c = b_seen
        if p_targets is not None:
            b_c -= tl.load(p_targets + i_i * J + o_j, mask=m_j, other=0.0)[None, :]
        b_c *= tl.load(p_strengths + i_i * J + o_j, mask=m_j, other=0.0)[None, :]
        b_quadratic = tl.sum(matmul(b_c, b_gram, tl.zeros([BM, BJ], acc)) * b_c, 1)
        b_linear = 2.0 * tl.sum(b_c * b_z, 1)
        b_new_n2 = b_n2 - b_linear + b_quadratic
        b_s = b_heads - matmul(b_c, b_u, tl.zeros([BM, BK], acc))
        if NORM == LAYER:
            b_new_mean = -tl.sum(b_c * b_sums[None, :], 1) / d
            b_new_n2 -= b_new_mean * b_new_mean * d
            b_s -= b_new_mean[:, None] * b_gain_sums[None, :]
        if NORM != NONE:
            b_s = b_s * inverse_norm(b_new_n2, d, eps)[:, None]
        b_s += b_offset[None, :]
        o_out = (o_m * I + i_i) * K
        tl.store(p_out + o_out[:, None] + o_k[None, :], b_s, mask=m_out)
        explicit_rows(
            b_new_n2, b_n2 + tl.abs(b_linear) + b_quadratic, p_hidden, p_rows, p_weight, p_gain, p_directions, p_offset,
            p_strengths, p_targets, p_out, o_m, m_m, tl.zeros([BM], tl.int64) + i_i, m_m, o_out,
            M, T, N, stride_b, stride_t, K, J, eps, d, NORM, FLAT, BM, JP, KP, BK, BD,
        )  # fmt: skip


# Directions, and heads, of which a tile holds all.
_WIDEST = 32


@functools.cache
def finish_config(heads: int, directions: int, acc: torch.dtype) -> dict[str, int]:
    """Tiles of the interventions' algebra; the fp64 tile of an explicit row holds 2048 elements where J allows.

    A cap on registers well above the need keeps ptxas from spilling for the sake of one more program per SM.
    """
    widest = 16 if acc == torch.float64 else _WIDEST
    most, most_heads = padded(directions), max(padded(heads), 16)
    return {
        "BM": 16, "BJ": min(max(most, 16), widest), "BK": min(most_heads, widest), "JP": most,
        "KP": most_heads, "BD": max(1, 2048 // max(most, 32)), "num_warps": 4, "maxnreg": 168,
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
    given = (
        read.hidden, read.rows, weight, norm_weight, directions, dots, stats, prepared.moments, prepared.offset,
        strengths, targets,
    )  # fmt: skip
    sizes = (*read.shape, interventions, heads, count, eps)
    options = {
        "d": d, "NORM": norm, "FLAT": read.flat,
        "enable_fp_fusion": False,
    }  # fmt: skip
    if intervention_index is None and max(heads, count) <= _WIDEST and weight.dtype != torch.float64:
        rows = 64
        _finish_all[(cdiv(read.count, rows),)](
            *given, rewards, *sizes, **options, **{**config, "BM": rows, "maxnreg": 255}
        )
        return rewards
    programs = cdiv(read.count, config["BM"]) * (interventions if intervention_index is None else 1)
    _finish[(programs,)](*given, intervention_index, rewards, *sizes, **options, **config)
    return rewards
