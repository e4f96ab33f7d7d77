"""Suffix attention in Triton: `forward` with the contract of `reference.py`.

A program takes BM query rows (positions × heads of one group) of one suffix, and one loop over the positions of its
text: keys before the suffix are rows of the pool, read where they lie, later ones the suffix's own, the last of which
are the queries'. Both are found by offsets from the suffixes' rows, of which those into the pool hold the distance
between the two tensors, so that a block may hold rows of either. Blocks start at multiples of BN in the text, and
launch configurations depend only on the dtype and the head size, so a row's bits depend neither on what else is in the
batch nor on where its text is cut into prefix and suffix. Blocks that all rows of a program see whole go through a loop
without masks, whose sums are the same: products are fused into sums nowhere but where the code says `fma`, since a
compiler would fuse in one loop and not in the other. The grid is a bound that needs no lengths on the host: suffix s
has its programs at cu_queries[s] · G // BM + s and on, and each program finds its suffix by loads of many at once.

Suffixes of few rows leave such programs nearly empty. Then triton_packed.py first takes the prefixes' whole blocks with
rows of many suffixes side by side, and the programs here go on from what it has summed, bit for bit.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels.launch import capability, on_device, power_of_2

from .triton_blocks import LOG2E, aligned_stride, attend, beginning, shared_keys
from .triton_packed import over_prefixes, packs


@triton.jit
def _suffix_of(p_asks, i_b, S, G: tl.constexpr, BM: tl.constexpr, WAYS: tl.constexpr):
    """The last suffix whose programs start at i_b or before: one wide load for up to WAYS suffixes, two for its square,
    where a bisection waits for log2(S) loads one after the other."""
    low, high = 0, S
    while high - low > 1:
        step = (high - low + WAYS - 1) // WAYS
        o_s = low + tl.arange(0, WAYS) * step
        first = tl.load(p_asks + o_s, mask=o_s < high, other=0).to(tl.int64) * G // BM + o_s
        low += (tl.sum(((o_s < high) & (first <= i_b)).to(tl.int32), 0) - 1) * step
        high = tl.minimum(low + step, high)
    return low


_STRIDES = [f"stride_{tensor}{dim}" for tensor in ("q", "k", "v", "pk", "pv") for dim in ("n", "h")]


@triton.jit(do_not_specialize=["S", "window", "gap_k", "gap_v", *_STRIDES])
def _forward(
    p_q, p_k, p_v, p_ends, p_asks, p_start, p_len, p_sinks, p_alibi, p_out, p_lse, p_o, p_max, p_sum,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_pkn, stride_pkh, stride_pvn, stride_pvh,
    gap_k, gap_v, S, window, scale: tl.constexpr, softcap: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DQ: tl.constexpr,
    VEC: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    """o (N, Hq, D), max and sum (N, Hq): what triton_packed.py made of the prefixes' whole blocks, or None.

    gap_k and gap_v: elements from the suffixes' rows to the pool's. VEC is a number of elements that divides them
    and all strides: without it a compiler must load one at a time."""
    acc = p_lse.dtype.element_ty
    stride_qn, stride_qh = aligned_stride(stride_qn, VEC), aligned_stride(stride_qh, VEC)
    stride_kn, stride_kh = aligned_stride(stride_kn, VEC), aligned_stride(stride_kh, VEC)
    stride_vn, stride_vh = aligned_stride(stride_vn, VEC), aligned_stride(stride_vh, VEC)
    stride_pkn, stride_pkh = aligned_stride(stride_pkn, VEC), aligned_stride(stride_pkh, VEC)
    stride_pvn, stride_pvh = aligned_stride(stride_pvn, VEC), aligned_stride(stride_pvh, VEC)
    i_b, heads = tl.program_id(0), tl.num_programs(1) * G
    i_h = tl.program_id(1).to(tl.int64)
    i_s = _suffix_of(p_asks, i_b, S, G, BM, 128)
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

    # Positions of the text: the queries' first one, behind their last one, and of the keys that they see.
    o_own = prefix + o_i
    b_slope, b_shift, b_max, b_sum = beginning(p_sinks, p_alibi, o_own, o_head, acc)
    b_o = tl.zeros([BM, BD], acc)
    i_low = prefix + rows - queries + i_m // G
    i_high = tl.minimum(prefix + rows - queries + (i_m + BM - 1) // G + 1, prefix + rows)
    first_key, last_key = prefix * 0, prefix + rows
    whole = last_key // BN * BN  # from the first key on, every row sees all keys before this one
    if CAUSAL:
        whole = (i_low + 1) // BN * BN
        last_key = i_high
    if WINDOWED:
        unbounded = window >= i_high  # to the left, for all rows
        if CAUSAL:
            i_low = i_low - window + 1
        else:
            whole = tl.minimum(whole, (i_low + window + 1) // BN * BN)
            i_low = i_low - window
            last_key = tl.minimum(i_high + window, last_key)
        first_key = tl.maximum(i_low, 0) // BN * BN
        whole = tl.where(unbounded, whole, first_key)
    if p_o is not None:
        o_state = o_row * heads + o_head
        b_o = tl.load(p_o + o_state[:, None] * D + o_d[None, :], mask=m_q, other=0.0)
        b_max = tl.load(p_max + o_state, mask=m_m, other=0.0)
        b_sum = tl.load(p_sum + o_state, mask=m_m, other=1.0)
        first_key = tl.maximum(first_key, shared_keys(p_start, i_s, S, prefix, rows, window, BN, WINDOWED))
    for i_l in tl.static_range(LOOPS):
        from_key, to_key = first_key, last_key
        if i_l < LOOPS - 1:
            to_key = whole
        elif LOOPS == 2:
            from_key = whole
        b_o, b_max, b_sum = attend(
            p_q, m_m, b_q, b_o, b_max, b_sum, p_k, p_v,
            aligned_stride(gap_k, VEC) + start * stride_pkn + i_h * stride_pkh, stride_pkn,
            (first - prefix) * stride_kn + i_h * stride_kh, stride_kn,
            aligned_stride(gap_v, VEC) + start * stride_pvn + i_h * stride_pvh, stride_pvn,
            (first - prefix) * stride_vn + i_h * stride_vh, stride_vn,
            prefix, o_own, o_d, b_slope, from_key, to_key, window, scale, softcap, D, BN, DQ, VEC,
            CAUSAL, CAPPED, WINDOWED, p_len is not None, p_alibi is not None, i_l < LOOPS - 1,
        )  # fmt: skip

    b_sum = tl.where(m_m, b_sum, 1.0)
    o_out = o_row * heads + o_head
    tl.store(p_out + o_out[:, None] * D + o_d[None, :], b_o / b_sum[:, None], mask=m_q)
    tl.store(p_lse + o_out, (b_max + tl.log2(b_sum) + b_shift) / LOG2E, mask=m_m)


@functools.cache
def _config(dtype: torch.dtype, d: int, sm: int) -> dict[str, int]:
    """Tile sizes that stay in registers on a GPU of compute capability `sm`, found by compiling for it.

    LOOPS: 2 where loops over keys with and without masks both do. PACKS: whether triton_packed.py does, which keeps two
    outputs of a row.
    """
    bd, loops = max(16, power_of_2(d)), 2 if d <= 64 else 1
    if dtype == torch.float64:
        parts = {"DQ": bd, "num_warps": 4} if d <= 64 else {"DQ": 32, "num_warps": 8}
        return {"BD": bd, "BM": 16, "BN": 16, "num_stages": 1, "LOOPS": loops, "PACKS": loops - 1, **parts}
    if dtype == torch.float32:
        # tf32x3 splits Q into two parts, each as large as it.
        parts = {"BN": 32, "DQ": bd, "num_warps": 4} if d <= 128 else {"BN": 16, "DQ": 128, "num_warps": 8}
        return {"BD": bd, "BM": 32 if d <= 64 else 16, "num_stages": 2, "LOOPS": loops, "PACKS": loops - 1, **parts}
    if sm >= 90 and d <= 128:
        # Two warpgroups of 64 rows each: with 64 rows in all, both would compute the same.
        parts = {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 3, "LOOPS": 2, "PACKS": int(d <= 64 or sm < 100)}
    elif sm // 10 == 9:
        parts = {"BM": 128, "BN": 32, "num_warps": 8, "num_stages": 2, "LOOPS": 1, "PACKS": 0}
    elif sm >= 100:
        parts = {"BM": 64, "BN": 16, "num_warps": 8, "num_stages": 2, "LOOPS": 1, "PACKS": 0}
    elif d <= 64:
        # A cap on registers well above the need keeps ptxas from spilling for the sake of one more program per SM.
        parts = {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 3, "LOOPS": 2, "PACKS": 1, "maxnreg": 224}
    elif d <= 128:
        parts = {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 2, "LOOPS": 2, "PACKS": 0}
    else:
        parts = {"BM": 64, "BN": 64, "num_warps": 8, "num_stages": 1, "LOOPS": 1, "PACKS": 0}
    return {"BD": bd, "DQ": bd, **parts}


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
    config = {**_config(q.dtype, d, capability(q))}
    may_pack = config.pop("PACKS")
    group = heads // kv_heads
    grid = (rows * group // config["BM"] + suffixes, kv_heads)
    pool_k, pool_v = (k, v) if prefix_k is None or prefix_v is None else (prefix_k, prefix_v)
    strides = [stride for tensor in (q, k, v, pool_k, pool_v) for stride in tensor.stride()[:2]]
    gaps = [(pool.data_ptr() - own.data_ptr()) // q.element_size() for pool, own in ((pool_k, k), (pool_v, v))]
    vec = math.gcd(16 // q.element_size(), *strides, *gaps)
    # For logits in base 2; with a softcap, its tanh takes them in units of the cap.
    options = {
        "scale": scale / softcap if softcap else scale * LOG2E.value, "softcap": softcap * LOG2E.value, "G": group,
        "D": d, "VEC": vec, "CAUSAL": causal, "CAPPED": softcap != 0, "WINDOWED": window != 0, **config,
        "enable_fp_fusion": False,
    }  # fmt: skip
    asks = cu_seqlens if cu_queries is None else cu_queries
    with on_device(q):
        begun: tuple[Tensor, ...] | tuple[None, ...] = (None, None, None)
        if may_pack and prefix_len is not None and packs(rows, suffixes, group, config["BM"]):
            begun = over_prefixes(
                q, (pool_k, pool_v), (cu_seqlens, asks, prefix_start, prefix_len), sinks, alibi, window, options
            )
        _forward[grid](
            q, k, v, cu_seqlens, asks, prefix_start, prefix_len, sinks, alibi, out, lse, *begun, *strides, *gaps,
            suffixes, window, **options,
        )  # fmt: skip
    return out, lse
