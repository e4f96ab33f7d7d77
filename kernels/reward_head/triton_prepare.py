"""What does not depend on the rows: the dots packed for the tensor cores, and the products between them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels.launch import cdiv, power_of_2

from .triton_matmul import tf32
from .triton_norm import LAYER, load_gain


@triton.jit
def _prepare(
    p_weight, p_bias, p_gain, p_norm_bias, p_directions, p_packed, p_scale, p_offset, p_moments, K, J,
    d: tl.constexpr, NORM: tl.constexpr, TERMS: tl.constexpr, DP: tl.constexpr,
    BJ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What depends on the heads and directions alone; program (n, i) takes dot n and directions i BJ and on.

    packed (K + J, TERMS, DP): the dots, centred for a layer norm, in hidden's dtype (tf32 for fp32) as a sum of terms,
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
            b_a = b_a * load_gain(p_gain, o_d, m_d, NORM)
        if p_norm_bias is not None:
            b_offset = tl.fma(b_w, tl.load(p_norm_bias + o_d, mask=m_d, other=0.0), b_offset)
        if p_directions is not None:
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
                    b_a = b_a * load_gain(p_gain, o_d, m_d, NORM)
                if p_directions is not None:
                    b_a += tl.load(p_directions + (i_n - K) * d + o_d, mask=m_d & (m_head == 0), other=0.0)
                b_a = tl.where(m_d, b_a - b_mean, 0.0) * b_scale
                o_p = i_n * (TERMS * DP) + o_d
                for _ in tl.static_range(TERMS):
                    b_term = b_a.to(p_packed.dtype.element_ty)
                    if b_term.dtype == tl.float32:
                        b_term = tf32(b_a)
                    tl.store(p_packed + o_p, b_term, mask=o_d < DP)
                    b_a = b_a - b_term.to(acc)
                    o_p += DP


@functools.cache
def prepare_config(directions: int, acc: torch.dtype) -> dict[str, int]:
    """32 numbers a thread; few passes over d, for the launch before the one that reads the rows is all latency."""
    block = min(power_of_2(max(directions, 1)), 16)
    return {"BJ": block, "BD": min(32 * 1024 // acc.itemsize // block, 2048), "num_warps": 8}


class Prepared(NamedTuple):
    """What the kernels behind this one read, in the layouts that `_prepare` writes."""

    offset: Tensor
    packed: Tensor | None
    scale: Tensor | None
    moments: Tensor | None


def terms(dtype: torch.dtype) -> int:
    """The terms that a dot is split into for rows of a dtype; `many_config` of triton_many.py says what they cost."""
    return {torch.float64: 1, torch.bfloat16: 3}.get(dtype, 2)


def prepare(
    dtype: torch.dtype,
    weight: Tensor,
    bias: Tensor | None,
    norm: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    directions: Tensor | None,
    pack: bool,
) -> Prepared:
    """For rows of a dtype: the dots packed where they are asked for, the moments where there are directions."""
    heads, d = weight.shape
    count = 0 if directions is None else directions.size(0)
    dots = heads + count
    padded = cdiv(d, 16) * 16
    packed = weight.new_empty(dots, terms(dtype), padded, dtype=dtype) if pack else None
    scale = weight.new_empty(dots) if pack and dtype.itemsize == 2 else None
    offset = weight.new_empty(heads)
    moments = None if directions is None else weight.new_empty(dots, count + 1)
    config = prepare_config(count, weight.dtype)
    _prepare[(dots, max(1, cdiv(count, config["BJ"])))](
        weight, bias, norm_weight, norm_bias, directions, packed, scale, offset, moments, heads, count,
        d=d, NORM=norm, TERMS=terms(dtype), DP=padded, enable_fp_fusion=False, **config,
    )  # fmt: skip
    return Prepared(offset, packed, scale, moments)
