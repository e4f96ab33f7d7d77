"""Rows where an intervention's formula cancels, once more from the changed row itself, in fp64."""

from __future__ import annotations

import triton
import triton.language as tl

from . import reference
from .triton_norm import LAYER, NONE, inverse_norm, load_gain
from .triton_rows import row_offsets

CANCELLATION = tl.constexpr(reference.CANCELLATION)


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
    K, J, eps, d: tl.constexpr, NORM: tl.constexpr, JP: tl.constexpr, KP: tl.constexpr,
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
    for i_k in range(0, BK if KP <= BK else K, BK):
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


@triton.jit
def explicit_rows(
    b_new_n2, b_size, p_hidden, p_rows, p_weight, p_gain, p_directions, p_offset, p_strengths, p_targets, p_out,
    o_m, m_m, o_i, m_i, o_out, M, T, N, stride_b, stride_t, K, J, eps,
    d: tl.constexpr, NORM: tl.constexpr, FLAT: tl.constexpr,
    BM: tl.constexpr, JP: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Writes the rewards of those rows o_m [BM] whose new squared norm is small beside the terms that it is the sum of,
    b_size; o_i [BM] their interventions, where m_i, and o_out where their rewards go."""
    m_cancelled = (m_m & (b_new_n2 < b_size * CANCELLATION)).to(tl.int32)
    if tl.max(m_cancelled) > 0:
        # The stores before and those below may come from different threads.
        tl.debug_barrier()
        o_h, _m = row_offsets(p_rows, o_m, M, T, N, stride_b, stride_t, 1, FLAT)
        for i_r in range(BM):
            m_r = tl.arange(0, BM) == i_r
            if tl.sum(tl.where(m_r, m_cancelled, 0)) > 0:
                _explicit(
                    p_hidden, p_weight, p_gain, p_directions, p_offset, p_strengths, p_targets,
                    p_out + tl.sum(tl.where(m_r, o_out, 0)), tl.sum(tl.where(m_r, o_h, 0)),
                    tl.sum(tl.where(m_r, o_i, 0)), tl.sum(tl.where(m_r, m_i.to(tl.int32), 0)),
                    K, J, eps, d, NORM, JP, KP, BK, BD,
                )  # fmt: skip
