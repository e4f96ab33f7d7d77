"""Suffix attention in Triton: `forward` with the contract of `reference.py`.

A program takes BM query rows (positions × heads of one group) of one suffix, and one loop over the positions of its
text: keys before the suffix are rows of the pool, read where they lie, later ones the suffix's own, the last of which
are the queries'. Both are found by offsets from the suffixes' rows, of which those into the pool hold the distance
between the two tensors, so that a block may hold rows of either. Blocks start at multiples of BN in the text, and
launch configurations depend only on the dtype and the head size, so a row's bits depend neither on what else is in the
batch nor on where its text is cut into prefix and suffix. The grid is a bound that needs no lengths on the host: suffix
s has its programs at cu_queries[s] · G // BM + s and on, and each program finds its suffix by bisection.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels.launch import on_device

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(b_x, b_y, b_acc):
    """b_acc [M, N] + b_x [M, K] @ b_y [K, N].

    tf32x3 keeps 22 bits of fp32 operands; b_acc is added outside of the tensor cores, whose additions truncate.
    """
    if b_x.dtype == tl.float64:
        return tl.dot(b_x, b_y, b_acc, out_dtype=tl.float64)
    elif b_x.dtype == tl.float32:
        return b_acc + tl.dot(b_x, b_y, input_precision="tf32x3")
    elif INTERPRETED:
        # The interpreter multiplies the bit patterns of bf16.
        return tl.dot(b_x.to(tl.float32), b_y.to(tl.float32), b_acc)
    else:
        return tl.dot(b_x, b_y, b_acc)


@triton.jit
def _tanh(b_x):
    """By series below 0.625, where 1 − 2 / (e^2x + 1) would cancel."""
    b_z = b_x * b_x
    b_e = tl.exp2(tl.minimum(tl.abs(b_x), 20.0) * (2 * LOG2E))
    b_large = 1.0 - 2.0 / (b_e + 1.0)
    b_large = tl.where(b_x < 0, -b_large, b_large)
    if b_x.dtype == tl.float64:
        # The large form is off by 1e-16 / 2^-7 here; the series' next term by 2^-77.
        b_p = 21844.0 / 6081075 - b_z * (929569.0 / 638512875)
        b_p = -1382.0 / 155925 + b_z * b_p
        b_p = -17.0 / 315 + b_z * (62.0 / 2835 + b_z * b_p)
        b_small = b_x + b_x * b_z * (-1.0 / 3 + b_z * (2.0 / 15 + b_z * b_p))
        return tl.where(tl.abs(b_x) < 0.0078125, b_small, b_large)
    else:
        b_p = 1.33314422036e-1 + b_z * (-5.37397155531e-2 + b_z * (2.06390887954e-2 - b_z * 5.70498872745e-3))
        b_small = b_x + b_x * b_z * (-3.33332819422e-1 + b_z * b_p)
        return tl.where(tl.abs(b_x) < 0.625, b_small, b_large)


@triton.jit
def _rows(o_n, split, from_pool, stride_pool, from_own, stride_own, VEC: tl.constexpr, POOL: tl.constexpr):
    """Offsets of the rows at positions o_n, [BN]."""
    o_row = from_own + o_n.to(tl.int64) * stride_own
    if POOL:
        o_row = tl.where(o_n < split, from_pool + o_n.to(tl.int64) * stride_pool, o_row)
        # Each is a sum of multiples of VEC, which the compiler does not see through the choice.
        o_row = tl.multiple_of(o_row, VEC)
    return o_row


@triton.jit
def _attend(
    p_q, m_m, b_q, b_o, b_max, b_sum, p_k, p_v, from_pk, stride_pk, from_k, stride_k, from_pv, stride_pv, from_v,
    stride_v, split, o_own, o_d, b_slope, i_first, i_last, window, scale: tl.constexpr, softcap: tl.constexpr,
    D: tl.constexpr, BN: tl.constexpr, DQ: tl.constexpr, VEC: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr, POOL: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys at positions [i_first, i_last), of which those before `split` lie in the pool.

    b_q [BM, BD] at p_q [BM], b_o [BM, BD], b_max and b_sum [BM], o_own [BM] the rows' positions. `scale`, `softcap`
    and b_slope [BM] give logits in base 2.
    """
    for i_n in range(i_first, i_last, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < i_last
        m_d = o_d[None, :] < D
        p_row = p_k + _rows(o_n, split, from_pk, stride_pk, from_k, stride_k, VEC, POOL)[:, None]
        b_s = tl.zeros([b_o.shape[0], BN], b_sum.dtype)
        if o_d.shape[0] == DQ:
            b_k = tl.load(p_row + o_d[None, :], mask=m_n[:, None] & m_d, other=0.0)  # [BN, BD]
            b_s = dot(b_q, tl.trans(b_k), b_s)
        else:
            # Q as a whole would fill the registers: parts of it are read again, from L1. The mask keeps the reads here.
            for i_d in tl.static_range(0, D, DQ):
                o_p = i_d + tl.arange(0, DQ)
                m_p = o_p[None, :] < D
                b_part = tl.load(p_q[:, None] + o_p[None, :], mask=m_m[:, None] & m_p & (i_n < i_last), other=0.0)
                b_k = tl.load(p_row + o_p[None, :], mask=m_n[:, None] & m_p, other=0.0)  # [BN, DQ]
                b_s = dot(b_part, tl.trans(b_k), b_s)
        b_s *= scale  # [BM, BN]
        o_row = _rows(o_n, split, from_pv, stride_pv, from_v, stride_v, VEC, POOL)
        b_v = tl.load(p_v + o_row[:, None] + o_d[None, :], mask=m_n[:, None] & m_d, other=0.0)
        if CAPPED:
            b_s = softcap * _tanh(b_s)
        if BIASED:
            # Counted from the query, where it is 0: softmax is the same, and near keys' logits stay small.
            b_s += b_slope[:, None] * (o_n[None, :] - o_own[:, None]).to(b_s.dtype)
        m_s = m_n[None, :]
        if CAUSAL:
            m_s = m_s & (o_n[None, :] <= o_own[:, None])
            if WINDOWED:
                m_s = m_s & (o_n[None, :] > o_own[:, None] - window)
        elif WINDOWED:
            m_s = m_s & (tl.abs(o_n[None, :] - o_own[:, None]) <= window)
        b_s = tl.where(m_s, b_s, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_alpha = tl.exp2(b_max - b_safe)
        b_p = tl.exp2(b_s - b_safe[:, None])
        b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
        b_o = dot(b_p.to(b_v.dtype), b_v, b_o * b_alpha[:, None])
        b_max = b_new
    return b_o, b_max, b_sum


@triton.jit
def _stride(stride, VEC: tl.constexpr):
    return tl.multiple_of(tl.cast(stride, tl.int64), VEC)


_STRIDES = [f"stride_{tensor}{dim}" for tensor in ("q", "k", "v", "pk", "pv") for dim in ("n", "h")]


@triton.jit(do_not_specialize=["S", "window", "gap_k", "gap_v", *_STRIDES])
def _forward(
    p_q, p_k, p_v, p_ends, p_asks, p_start, p_len, p_sinks, p_alibi, p_out, p_lse,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_pkn, stride_pkh, stride_pvn, stride_pvh,
    gap_k, gap_v, S, window, scale: tl.constexpr, softcap: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DQ: tl.constexpr,
    VEC: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """gap_k and gap_v: elements from the suffixes' rows to the pool's. VEC is a number of elements that divides them
    and all strides: without it a compiler must load one at a time."""
    acc = p_lse.dtype.element_ty
    stride_qn, stride_qh = _stride(stride_qn, VEC), _stride(stride_qh, VEC)
    stride_kn, stride_kh = _stride(stride_kn, VEC), _stride(stride_kh, VEC)
    stride_vn, stride_vh = _stride(stride_vn, VEC), _stride(stride_vh, VEC)
    stride_pkn, stride_pkh = _stride(stride_pkn, VEC), _stride(stride_pkh, VEC)
    stride_pvn, stride_pvh = _stride(stride_pvn, VEC), _stride(stride_pvh, VEC)
    i_b, heads = tl.program_id(0), tl.num_programs(1) * G
    i_h = tl.program_id(1).to(tl.int64)
    low, high = 0, S
    while low < high:  # the first suffix whose programs start behind this one
        middle = (low + high) // 2
        if tl.load(p_asks + middle).to(tl.int64) * G // BM + middle <= i_b:
            low = middle + 1
        else:
            high = middle
    i_s = low - 1
    first = tl.load(p_ends + i_s).to(tl.int64)
    rows = (tl.load(p_ends + i_s + 1) - first).to(tl.int32)
    first_q = tl.load(p_asks + i_s).to(tl.int64)
    queries = (tl.load(p_asks + i_s + 1) - first_q).to(tl.int32)
    i_m = (i_b - (first_q * G // BM + i_s)).to(tl.int32) * BM
    if i_m >= queries * G:
        return
    start, prefix = first * 0, rows * 0
    if p_len is not None:
        start += tl.load(p_start + i_s)
        prefix += tl.load(p_len + i_s).to(tl.int32)

    o_m = i_m + tl.arange(0, BM)
    m_m = o_m // G < queries
    o_i = rows - queries + o_m // G  # rows of the suffix
    o_d = tl.arange(0, BD)
    o_row, o_head = first_q + o_m // G, i_h * G + o_m % G
    m_q = m_m[:, None] & (o_d[None, :] < D)
    p_q += o_row * stride_qn + o_head * stride_qh
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q, other=0.0)  # [BM, BD]
    b_o = tl.zeros([BM, BD], acc)
    b_max = tl.full([BM], -float("inf"), acc)
    b_sum = tl.zeros([BM], acc)

    # Positions of the text: the queries' first one, behind their last one, and of the keys that they see.
    o_own = prefix + o_i
    b_slope = tl.zeros([BM], acc)
    if p_alibi is not None:
        b_slope = tl.load(p_alibi + o_head) * LOG2E
    b_shift = b_slope * o_own.to(acc)
    if p_sinks is not None:
        b_max = tl.load(p_sinks + o_head) * LOG2E - b_shift
        b_sum = tl.full([BM], 1.0, acc)
    i_low = prefix + rows - queries + i_m // G
    i_high = tl.minimum(prefix + rows - queries + (i_m + BM - 1) // G + 1, prefix + rows)
    first_key, last_key = prefix * 0, prefix + rows
    if CAUSAL:
        last_key = i_high
    if WINDOWED:
        if CAUSAL:
            i_low = i_low - window + 1
        else:
            i_low = i_low - window
            last_key = tl.minimum(i_high + window, last_key)
        first_key = tl.maximum(i_low, 0) // BN * BN
    b_o, b_max, b_sum = _attend(
        p_q, m_m, b_q, b_o, b_max, b_sum, p_k, p_v,
        _stride(gap_k, VEC) + start * stride_pkn + i_h * stride_pkh, stride_pkn,
        (first - prefix) * stride_kn + i_h * stride_kh, stride_kn,
        _stride(gap_v, VEC) + start * stride_pvn + i_h * stride_pvh, stride_pvn,
        (first - prefix) * stride_vn + i_h * stride_vh, stride_vn,
        prefix, o_own, o_d, b_slope, first_key, last_key, window, scale, softcap, D, BN, DQ, VEC,
        CAUSAL, CAPPED, WINDOWED, p_len is not None, p_alibi is not None,
    )  # fmt: skip

    b_sum = tl.where(m_m, b_sum, 1.0)
    o_out = o_row * heads + o_head
    tl.store(p_out + o_out[:, None] * D + o_d[None, :], b_o / b_sum[:, None], mask=m_q)
    tl.store(p_lse + o_out, (b_max + tl.log2(b_sum) + b_shift) / LOG2E, mask=m_m)


def _config(dtype: torch.dtype, d: int) -> dict[str, int]:
    """Tile sizes that stay in registers on sm_80, sm_90 and sm_100."""
    bd = max(16, triton.next_power_of_2(d))
    if dtype == torch.float64:
        parts = {"DQ": bd, "num_warps": 4} if d <= 64 else {"DQ": 32, "num_warps": 8}
        return {"BD": bd, "BM": 16, "BN": 16, "num_stages": 1, **parts}
    if dtype == torch.float32:
        # tf32x3 splits Q into two parts, each as large as it.
        parts = {"BN": 32, "DQ": bd, "num_warps": 4} if d <= 128 else {"BN": 16, "DQ": 128, "num_warps": 8}
        return {"BD": bd, "BM": 32 if d <= 64 else 16, "num_stages": 2, **parts}
    parts = {"num_warps": 4, "num_stages": 3} if d <= 64 else {"num_warps": 8, "num_stages": 2}
    return {"BD": bd, "BM": 64, "BN": 32 if d <= 128 else 16, "DQ": bd, **parts}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_queries: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    prefix_start: Tensor | None,
    prefix_len: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float,
    window: int,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows, heads, d = q.shape
    kv_heads, suffixes = k.size(1), cu_seqlens.numel() - 1
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=acc, device=q.device)
    config = _config(q.dtype, d)
    group = heads // kv_heads
    grid = (rows * group // config["BM"] + suffixes, kv_heads)
    pool_k, pool_v = (k, v) if prefix_k is None or prefix_v is None else (prefix_k, prefix_v)
    strides = [stride for tensor in (q, k, v, pool_k, pool_v) for stride in tensor.stride()[:2]]
    gaps = [(pool.data_ptr() - own.data_ptr()) // q.element_size() for pool, own in ((pool_k, k), (pool_v, v))]
    vec = math.gcd(16 // q.element_size(), *strides, *gaps)
    with on_device(q):
        _forward[grid](
            q, k, v, cu_seqlens, cu_seqlens if cu_queries is None else cu_queries, prefix_start,
            prefix_len, sinks, alibi, out, lse, *strides, *gaps, suffixes, window,
            # For logits in base 2; with a softcap, its tanh takes them in units of the cap.
            scale=scale / softcap if softcap else scale * LOG2E.value, softcap=softcap * LOG2E.value,
            G=group, D=d, VEC=vec, CAUSAL=causal, CAPPED=softcap != 0, WINDOWED=window != 0, **config,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse
