"""The backward of a few heads on rows that fit in registers: one read of the rows."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels.launch import cdiv, power_of_2

from .triton_fma import FEW, part, part_width, replace, whole
from .triton_norm import LAYER, NONE, inverse_norm, load_gain
from .triton_rows import Rows, row_offsets, vector_width

# Fixed, so that the order of the sum over rows does not depend on the GPU; some four for each SM of an H100.
_PROGRAMS = 512


@triton.jit(do_not_specialize=["M", "T", "N", "stride_b", "stride_t"])
def _backward_fused(
    p_grad, p_hidden, p_rows, p_weight, p_gain, p_grad_rows, p_partial,
    M, T, N, stride_b, stride_t, eps: tl.float64,
    d: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, FLAT: tl.constexpr,
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
        o_h, m_h = row_offsets(p_rows, o_m, M, T, N, stride_b, stride_t, VEC, FLAT)
        m_x = m_h[:, None] & m_d
        b_x = tl.load(p_hidden + o_h[:, None] + o_d, mask=m_x, other=0.0).to(acc)  # [BM, DP]
        if p_rows is not None:
            b_x = tl.where((m_m & (m_h == 0))[:, None], float("nan"), b_x)
        if NORM == LAYER:
            b_mean = tl.sum(b_x, 1) / d
            b_x = tl.where(m_x, b_x - b_mean[:, None], b_x * 0.0)
        if NORM != NONE:
            b_inv = inverse_norm(tl.sum(b_x * b_x, 1), d, eps)
        b_x = tl.reshape(b_x, [BM, G, VEC])
        b_ys = (tl.zeros([BM, G, VA], acc),) * PARTS
        for k in tl.static_range(K):
            b_g = tl.load(p_grad + o_m * K + k, mask=m_m, other=0.0)
            if NORM != NONE:
                b_g = tl.where(m_m, b_g * b_inv, 0.0)
            b_g = b_g[:, None, None]
            for i_v in tl.static_range(PARTS):
                if NEED_DOTS:
                    b_part = tl.sum(part(b_x, i_v, VA) * b_g, 0)[None]
                    b_v = replace(b_v, k * PARTS + i_v, b_v[k * PARTS + i_v] + b_part)
                if NEED_ROWS:
                    b_a = tl.load(p_weight + k * d + o_a + i_v * VA, mask=o_a + i_v * VA < d, other=0.0)
                    if p_gain is not None:
                        b_a = b_a * load_gain(p_gain, o_a + i_v * VA, o_a + i_v * VA < d, NORM)
                    b_y = b_ys[i_v]
                    b_y = tl.fma(tl.broadcast_to(b_g, b_y.shape), tl.broadcast_to(b_a, b_y.shape), b_y)
                    b_ys = replace(b_ys, i_v, b_y)
        if NEED_ROWS:
            b_y = tl.reshape(whole(b_ys), [BM, DP])
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


@functools.cache
def fused_backward_config(d: int, heads: int, dtype: torch.dtype) -> dict[str, int] | None:
    """Whole rows in registers, 32 elements a thread, beside at most 64 of V; None where that does not fit."""
    padded = max(16, power_of_2(d))
    size = padded * (2 if dtype == torch.float64 else 1)
    if size > 8192 or heads * size > 16384 or heads > FEW:
        return None
    vec = vector_width(d, dtype)
    return {
        "BM": max(1, (8192 if heads <= 2 else 4096) // size), "DP": padded, "VEC": vec, "VA": part_width(vec, dtype),
        "num_warps": 8,
    }  # fmt: skip


def backward_fused(
    config: dict[str, int],
    grad: Tensor,
    read: Rows,
    weight: Tensor,
    norm: int,
    norm_weight: Tensor | None,
    eps: float,
    need_rows: bool,
    need_dots: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of the rows (M, d), and V in parts of rows (parts, K, d), with the config that fits them."""
    heads, d = weight.shape
    grad_rows = read.hidden.new_empty((read.count, d) if need_rows else (0,))
    programs = min(_PROGRAMS, cdiv(read.count, config["BM"]))
    partial = weight.new_empty((programs, heads, d) if need_dots else (1, 0))
    _backward_fused[(programs,)](
        grad, read.hidden, read.rows, weight, norm_weight, grad_rows, partial, *read.shape,
        eps, d=d, K=heads, NORM=norm, FLAT=read.flat, NEED_ROWS=need_rows, NEED_DOTS=need_dots,
        enable_fp_fusion=False, **config,
    )  # fmt: skip
    return grad_rows, partial
