"""More than 8 dots per row: a skinny GEMM on the tensor cores, the squared norm beside it from the same tiles."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels.launch import cdiv, power_of_2

from .triton_matmul import dot, high_low, matmul
from .triton_norm import LAYER, NONE, inverse_norm
from .triton_prepare import Prepared, terms
from .triton_rows import Rows, row_offsets, vector_width


@triton.jit(do_not_specialize=["M", "T", "N", "stride_b", "stride_t"])
def _many(
    p_hidden, p_rows, p_packed, p_scale, p_offset, p_out, p_stats,
    M, T, N, stride_b, stride_t, DOTS, eps: tl.float64,
    d: tl.constexpr, ONE_TILE: tl.constexpr, NORM: tl.constexpr, FLAT: tl.constexpr,
    TERMS: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Rewards (M, DOTS); with stats the dots of the centred rows, and stats (M, 2): squared norm and mean."""
    acc = p_offset.dtype.element_ty
    dtype = p_hidden.dtype.element_ty
    # Tiles of dots of the same rows are neighbours in the launch, so the rows come from L2 but once.
    i_m, i_n = tl.program_id(0), 0
    if not ONE_TILE:
        tiles = tl.cdiv(DOTS, BN)
        i_m, i_n = i_m // tiles, i_m % tiles
    i_m = i_m.to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    o_h, m_h = row_offsets(p_rows, o_m, M, T, N, stride_b, stride_t, VEC, FLAT)
    o_b = tl.arange(0, BD)
    p_h = p_hidden + o_h[:, None] + o_b[None, :]
    p_a = p_packed + o_n[None, :].to(tl.int64) * (TERMS * DP) + o_b[:, None]
    b_shift = tl.zeros([BM], acc)
    if NORM == LAYER:
        # As in triton_few.py, with the mean of up to four blocks; rounded, and 0 where it is small beside the row, so
        # that h minus it has few bits and two terms hold them.
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
            b_h, b_low = high_low(b_x, dtype)
        for i_t in tl.static_range(TERMS):
            b_a = tl.load(
                p_a + (TERMS - 1 - i_t) * DP + i_d,
                mask=(o_n < DOTS)[None, :] & (i_d + o_b < DP)[:, None],
                other=0.0,
            )  # [BD, BN]
            if dtype == tl.float64:
                b_block = matmul(b_x, b_a, b_block)
            else:
                # Low times the lowest term is below the last bit of an fp32, unless high is fp16's largest number.
                if TWO and (i_t > 0 or dtype == tl.float16):
                    b_block = dot(b_low, b_a, b_block)
                b_block = dot(b_h, b_a, b_block)
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
            b_dots = b_dots * inverse_norm(b_n2, d, eps)[:, None]
        b_dots += tl.load(p_offset + o_n, mask=o_n < DOTS, other=0.0)[None, :]
    p_tile = p_out + i_m * BM * DOTS + tl.arange(0, BM)[:, None] * DOTS + o_n[None, :]
    tl.store(p_tile, b_dots, mask=m_m[:, None] & (o_n < DOTS)[None, :])


@functools.cache
def many_config(dots: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles of the skinny GEMM, and the terms a dot is split into.

    The dots are read again for every BM rows: 128 rows keep that below the rows' own bytes up to about 64 dots.
    Error at d = 2048 as a share of the reward scale, from a bit-true model of the tensor cores on normal numbers:
    bf16 rows with three terms 1.4e-7 (two: 2.4e-6; three, but one chain of truncating additions: 2.4e-6), fp32 rows in
    two tf32 parts 2.0e-7 (one chain: 6.3e-6), fp32 FMAs in order 3.7e-7. Two terms of fp16 hold an fp32's bits.
    """
    block = min(max(power_of_2(dots), 16), 64)
    if dtype == torch.float64:
        return {"BM": 16, "BN": 16, "BD": 16, "TERMS": terms(dtype), "num_warps": 4, "num_stages": 2, "maxnreg": 168}
    if dtype == torch.float32:
        return {
            "BM": 64, "BN": block, "BD": 32, "TERMS": terms(dtype), "num_warps": 4, "num_stages": 3, "maxnreg": 224,
        }  # fmt: skip
    return {"BM": 128, "BN": block, "BD": 64, "TERMS": terms(dtype), "num_warps": 8, "num_stages": 3}


def many(read: Rows, prepared: Prepared, norm: int, eps: float, need_stats: bool) -> tuple[Tensor, Tensor | None]:
    """Rewards (M, K) and None; with stats the dots (M, K + J) and stats (M, 2)."""
    offset, packed, scale, _moments = prepared
    assert packed is not None
    dots, _terms, padded = packed.shape
    out = offset.new_empty(read.count, dots)
    stats = offset.new_empty(read.count, 2) if need_stats else None
    config = many_config(dots, read.hidden.dtype)
    _many[(cdiv(read.count, config["BM"]) * cdiv(dots, config["BN"]),)](
        read.hidden, read.rows, packed, scale, offset, out, stats, *read.shape, dots, eps,
        d=read.d, ONE_TILE=dots <= config["BN"], NORM=norm, FLAT=read.flat, DP=padded,
        VEC=vector_width(read.d, read.hidden.dtype), enable_fp_fusion=False, **config,
    )  # fmt: skip
    return out, stats
