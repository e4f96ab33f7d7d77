"""The prefixes' part of suffix attention with the rows of many suffixes in one program.

A program takes BM query rows of whatever suffixes follow each other, and walks over the whole blocks of their prefixes:
once where all prefixes start at one row of the pool, as in a sweep over one text, else once for each start. Prefixes
whose start no neighbour has are left to the programs of one suffix, of which there are more. It leaves each row's
unnormalised output, maximum and sum in fp32, from which `_forward` of triton.py goes on over the rest of the prefix and
the suffix's own rows: the same additions in the same order as in one loop, so that packing changes no bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels.launch import cdiv

from .triton_blocks import aligned_stride, attend, beginning, shared_keys


@triton.jit
def _suffixes_of(p_asks, o_n, S):
    """The suffix of each query row, by bisection: [BM]."""
    b_low = tl.zeros(o_n.shape, tl.int32)
    size = S
    while size > 1:
        half = size // 2
        b_ask = tl.load(p_asks + b_low + half).to(tl.int64)
        b_low = tl.where(b_ask <= o_n, b_low + half, b_low)
        size -= half
    return b_low


@triton.jit(
    do_not_specialize=["N", "S", "window", "stride_qn", "stride_qh", "stride_kn", "stride_kh", "stride_vn", "stride_vh"]
)
def _prefixes(
    p_q, p_k, p_v, p_ends, p_asks, p_start, p_len, p_sinks, p_alibi, p_o, p_max, p_sum,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, N, S, window,
    scale: tl.constexpr, softcap: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DQ: tl.constexpr,
    VEC: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    acc = p_max.dtype.element_ty
    stride_qn, stride_qh = aligned_stride(stride_qn, VEC), aligned_stride(stride_qh, VEC)
    stride_kn, stride_kh = aligned_stride(stride_kn, VEC), aligned_stride(stride_kh, VEC)
    stride_vn, stride_vh = aligned_stride(stride_vn, VEC), aligned_stride(stride_vh, VEC)
    heads, i_h = tl.num_programs(1) * G, tl.program_id(1).to(tl.int64)
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_m = o_m // G < N
    o_row, o_head = tl.minimum(o_m // G, N - 1), i_h * G + o_m % G
    o_d = tl.arange(0, BD)
    m_q = m_m[:, None] & (o_d[None, :] < D)
    p_q += o_row * stride_qn + o_head * stride_qh
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q, other=0.0)  # [BM, BD]

    o_s = _suffixes_of(p_asks, o_row, S)
    o_first = tl.load(p_ends + o_s).to(tl.int64)
    o_rows = (tl.load(p_ends + o_s + 1).to(tl.int64) - o_first).to(tl.int32)
    o_behind = (tl.load(p_asks + o_s + 1).to(tl.int64) - o_row).to(tl.int32)  # rows from this one to its suffix's end
    o_prefix = tl.load(p_len + o_s).to(tl.int32)
    o_start = tl.load(p_start + o_s).to(tl.int64)
    o_own = o_prefix + o_rows - o_behind
    o_todo = tl.where(m_m, shared_keys(p_start, o_s, S, o_prefix, o_rows, window, BN, WINDOWED), 0)
    b_slope, _shift, b_max, b_sum = beginning(p_sinks, p_alibi, o_own, o_head, acc)
    b_o = tl.zeros([BM, BD], acc)

    while tl.max(o_todo, 0) > 0:
        start = tl.min(tl.where(o_todo > 0, o_start, 0x7FFFFFFFFFFFFFFF), 0)
        o_end = tl.where(o_start == start, o_todo, 0)
        most = tl.max(o_end, 0)
        least = tl.min(tl.where(m_m, o_end, most), 0)
        from_k, from_v = start * stride_kn + i_h * stride_kh, start * stride_vn + i_h * stride_vh
        b_o, b_max, b_sum = attend(
            p_q, m_m, b_q, b_o, b_max, b_sum, p_k, p_v, from_k, stride_kn, from_k, stride_kn, from_v, stride_vn,
            from_v, stride_vn, 0, o_own, o_d, b_slope, least * 0, least, window, scale, softcap, D, BN, DQ, VEC,
            CAUSAL, CAPPED, WINDOWED, False, p_alibi is not None, True,
        )  # fmt: skip
        b_o, b_max, b_sum = attend(
            p_q, m_m, b_q, b_o, b_max, b_sum, p_k, p_v, from_k, stride_kn, from_k, stride_kn, from_v, stride_vn,
            from_v, stride_vn, 0, o_own, o_d, b_slope, least, most, window, scale, softcap, D, BN, DQ, VEC,
            CAUSAL, CAPPED, WINDOWED, False, p_alibi is not None, True, o_end,
        )  # fmt: skip
        o_todo = tl.where(o_start == start, 0, o_todo)

    o_state = o_row * heads + o_head
    tl.store(p_o + o_state[:, None] * D + o_d[None, :], b_o, mask=m_q)
    tl.store(p_max + o_state, b_max, mask=m_m)
    tl.store(p_sum + o_state, b_sum, mask=m_m)


def packs(rows: int, suffixes: int, group: int, tile: int) -> bool:
    """Whether programs of one suffix each would be less than half full."""
    return suffixes > 1 and 2 * rows * group < suffixes * tile


def over_prefixes(
    q: Tensor,
    pool: tuple[Tensor, Tensor],
    suffixes: tuple[Tensor, Tensor, Any, Tensor],
    sinks: Tensor | None,
    alibi: Tensor | None,
    window: int,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """o (N, Hq, D), max and sum (N, Hq) of the prefixes' whole blocks, in the accumulation dtype.

    Args:
        suffixes: cu_seqlens, cu_queries, prefix_start and prefix_len.
        options: those of `_forward`.
    """
    rows, heads, _ = q.shape
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(q.shape, dtype=acc, device=q.device)
    most, total = torch.empty((2, rows, heads), dtype=acc, device=q.device)
    strides = [stride for tensor in (q, *pool) for stride in tensor.stride()[:2]]
    grid = cdiv(rows * options["G"], options["BM"]), pool[0].size(1)
    _prefixes[grid](
        q, *pool, *suffixes, sinks, alibi, out, most, total, *strides, rows, suffixes[3].numel(), window, **options
    )
    return out, most, total
