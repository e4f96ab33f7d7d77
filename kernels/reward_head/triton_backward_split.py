"""The backward of any number of heads and any d: the rows' gradient, then V tile by tile, on the tensor cores."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels.launch import cdiv, power_of_2

from .triton_matmul import matmul
from .triton_norm import LAYER, NONE, inverse_norm, load_gain
from .triton_rows import Rows, row_offsets, vector_width


@triton.jit
def _scaled_gain(
    p_grad, p_weight, p_gain, o_m, m_m, b_inv, o_d, m_d, K,
    d: tl.constexpr, NORM: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Σ_k g_k inv a_k: [BM, BD]."""
    b_y = tl.zeros([BM, BD], p_weight.dtype.element_ty)
    for i_k in range(0, BK if KP <= BK else K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < K
        b_g = tl.load(p_grad + o_m[:, None] * K + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_a = tl.load(
            p_weight + o_k[:, None].to(tl.int64) * d + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0
        )  # [BK, BD]
        if p_gain is not None:
            b_a = b_a * load_gain(p_gain, o_d, m_d, NORM)[None, :]
        b_y = matmul(b_g * b_inv[:, None], b_a, b_y)
    return b_y


@triton.jit(do_not_specialize=["M", "T", "N", "stride_b", "stride_t"])
def _backward_rows(
    p_grad, p_hidden, p_rows, p_weight, p_gain, p_grad_rows, p_stats,
    M, T, N, stride_b, stride_t, K, eps: tl.float64,
    d: tl.constexpr, NORM: tl.constexpr, FLAT: tl.constexpr,
    NEED_ROWS: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Gradient of the rows (M, d), and stats (M, 2): inverse norm and mean."""
    acc = p_weight.dtype.element_ty
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_m = o_m < M
    o_h, m_h = row_offsets(p_rows, o_m, M, T, N, stride_b, stride_t, VEC, FLAT)
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
        b_inv = inverse_norm(b_n2, d, eps)
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
                    p_grad, p_weight, p_gain, o_m, m_m, b_inv, i_d + o_b, m_d, K, d, NORM, KP, BM, BK, BD
                )  # fmt: skip
                b_projection += tl.sum(b_y * b_x, 1)
                b_y_sum += tl.sum(b_y, 1)
        b_coef = b_projection * b_inv * b_inv / d
        for i_d in range(0, d, BD):
            m_d = i_d + o_b < d
            m_x = m_h[:, None] & m_d[None, :]
            b_y = _scaled_gain(
                p_grad, p_weight, p_gain, o_m, m_m, b_inv, i_d + o_b, m_d, K, d, NORM, KP, BM, BK, BD
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
    M, T, N, stride_b, stride_t, CHUNK, K,
    d: tl.constexpr, FLAT: tl.constexpr,
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
        o_h, m_h = row_offsets(p_rows, o_m, M, T, N, stride_b, stride_t, VEC, FLAT)
        m_x = m_h[:, None] & m_d[None, :]
        b_inv = tl.load(p_stats + o_m * 2, mask=m_m, other=0.0)
        b_mean = tl.load(p_stats + o_m * 2 + 1, mask=m_m, other=0.0)
        b_x = tl.load(p_hidden + o_h[:, None] + o_d[None, :], mask=m_x, other=0.0).to(acc)
        b_x = tl.where(m_x, b_x - b_mean[:, None], 0.0)  # [BM, BD]
        b_g = tl.load(p_grad + o_m[None, :] * K + o_k[:, None], mask=m_m[None, :] & m_k[:, None], other=0.0)
        b_v = matmul(b_g * b_inv[None, :], b_x, b_v)
    tl.store(
        p_partial + (i_c * K + o_k[:, None]) * d + o_d[None, :], b_v, mask=m_k[:, None] & m_d[None, :]
    )  # fmt: skip


@functools.cache
def split_backward_config(heads: int, dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float64:
        return {"BM": 16, "BK": 16, "BD": 16, "num_warps": 4, "num_stages": 2, "maxnreg": 255}
    block = min(max(power_of_2(heads), 16), 32)
    return {"BM": 32, "BK": block, "BD": 64, "num_warps": 4, "num_stages": 2, "maxnreg": 255}


def backward_split(
    grad: Tensor,
    read: Rows,
    weight: Tensor,
    norm: int,
    norm_weight: Tensor | None,
    eps: float,
    need_rows: bool,
    need_dots: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of the rows (M, d), and V in parts of rows (parts, K, d)."""
    heads, d = weight.shape
    grad_rows = read.hidden.new_empty((read.count, d) if need_rows else (0,))
    config = split_backward_config(heads, read.hidden.dtype)
    common = {
        "d": d, "FLAT": read.flat, "VEC": vector_width(d, read.hidden.dtype), "enable_fp_fusion": False,
    }  # fmt: skip
    stats = weight.new_empty(read.count, 2)
    _backward_rows[(cdiv(read.count, config["BM"]),)](
        grad, read.hidden, read.rows, weight, norm_weight, grad_rows, stats, *read.shape, heads, eps,
        NORM=norm, NEED_ROWS=need_rows, KP=max(power_of_2(heads), config["BK"]), **common, **config,
    )  # fmt: skip
    if not need_dots:
        return grad_rows, weight.new_empty(1, 0)
    tiles = (cdiv(heads, config["BK"]), cdiv(d, config["BD"]))
    chunks = max(1, min(64, 1024 // (tiles[0] * tiles[1]), cdiv(read.count, 4 * config["BM"])))
    chunk = cdiv(cdiv(read.count, chunks), config["BM"]) * config["BM"]
    chunks = cdiv(read.count, chunk)
    partial = weight.new_empty(chunks, heads, d)
    _backward_dots[(chunks, *tiles)](
        grad, read.hidden, read.rows, stats, partial, *read.shape, chunk, heads, **common, **config
    )  # fmt: skip
    return grad_rows, partial
