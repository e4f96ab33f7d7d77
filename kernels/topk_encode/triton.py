"""The top-k encoder in Triton, with the contract of `reference.py`.

A program multiplies a block of rows with one tile of features after the other and keeps the rows' k largest as words of
64 bits, a value's ordered bits above its index' complement. A tile's largest values go in one at a time for as long as
any row's is above its smallest word: after the first tiles that is a few times a tile, where sorting a tile of words
takes as long as its matmul. Where there are few blocks of rows the features are split over programs as well; words
are all different, so neither the split nor the order changes a bit of the result. float64 has no such words, and longer
lists no registers: `why_not` says so, and the eager reference runs.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels.launch import capability, cdiv, on_device, power_of_2
from rmfast.kernels.suffix_attention.triton_blocks import dot

MAX_K = 256
NONE = tl.constexpr(-0x80000000)  # a key below all of numbers: of features that there are not, or that are taken
_PROGRAMS = 132  # one for each SM of an H100: registers leave room for no second


@triton.jit
def _key(b_x):
    """fp32 as int32 in the same order: −0 as 0, NaN above all."""
    b_bits = (b_x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(b_x == b_x, b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _largest(b_key, first, o_n):
    """The word of the largest of each row of b_key [BM, BN], whose columns are features first + o_n, and its column.

    A maximum that carries its index along takes more instructions.
    """
    b_top = tl.max(b_key, 1)
    b_at = tl.min(tl.where(b_key == b_top[:, None], o_n[None, :], 0x7FFFFFFF), 1)
    return (b_top.to(tl.int64) << 32) + (0xFFFFFFFF - (first + b_at).to(tl.int64)), b_at


@triton.jit(do_not_specialize=["N", "D", "F", "K", "tiles", "stride_x", "stride_w"])
def _topk_encode(
    p_x, p_w, p_bias, p_words, N, D, F, K, tiles, stride_x, stride_w,
    UNIT: tl.constexpr, BY_FEATURE: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_F: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """words (N, splits, K): the K largest of a split's `tiles` tiles, in no order.

    x (N, D) has unit stride over D, w over F or, BY_FEATURE, over D; the other strides are in UNIT elements, so that
    the compiler knows what they are multiples of. WHOLE: D and F are multiples of their blocks.
    """
    i_s = tl.program_id(1)
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    o_s = tl.arange(0, SLOTS)[None, :]
    m_m = o_m < N
    p_rows = p_x + (o_m * (stride_x * UNIT))[:, None]

    # Free slots hold words below all real ones and above those of NONE; slots beyond K, and of rows that there are not,
    # the largest, which nothing replaces.
    b_free = (NONE + 1 + tl.zeros([BM, 1], tl.int64) << 32) + o_s
    b_best = tl.where((o_s < K) & m_m[:, None], b_free, 0x7FFFFFFFFFFFFFFF)
    for i_t in range(i_s * tiles, tl.minimum((i_s + 1) * tiles, tl.cdiv(F, BN))):
        o_f = i_t * BN + o_n
        m_f = (o_f < F)[None, :]
        p_tile = p_w + o_f.to(tl.int64)[None, :] * (stride_w * UNIT if BY_FEATURE else 1)
        b_acc = tl.zeros([BM, BN], tl.float32)
        for i_k in range(0, D, BK):
            o_d = (i_k + o_k).to(tl.int64)
            p_xk = p_rows + o_d[None, :]  # [BM, BK]
            p_wk = p_tile + o_d[:, None] * (1 if BY_FEATURE else stride_w * UNIT)  # [BK, BN]
            m_x, m_w = m_m[:, None], m_f
            if not WHOLE_D:
                m_x = m_x & (o_d < D)[None, :]
                m_w = m_w & (o_d < D)[:, None]
            b_x = tl.load(p_xk, mask=m_x, other=0.0)
            if WHOLE_D and WHOLE_F:
                b_w = tl.load(p_wk)
            else:
                b_w = tl.load(p_wk, mask=m_w, other=0.0)
            b_acc = dot(b_x, b_w, b_acc)
        if p_bias is not None:
            b_acc += tl.load(p_bias + o_f, mask=None if WHOLE_F else o_f < F)[None, :]
        b_key = _key(b_acc)
        if not WHOLE_F:
            b_key = tl.where(m_f, b_key, NONE)

        b_least = tl.min(b_best, 1)  # [BM]
        b_word, b_at = _largest(b_key, i_t * BN, o_n)
        b_go = b_word > b_least
        while tl.max(b_go.to(tl.int32), 0) > 0:
            b_best = tl.where((b_best == b_least[:, None]) & b_go[:, None], b_word[:, None], b_best)
            b_key = tl.where(o_n[None, :] == b_at[:, None], NONE, b_key)
            b_least = tl.min(b_best, 1)
            b_word, b_at = _largest(b_key, i_t * BN, o_n)
            b_go = b_word > b_least
    p_out = p_words + (o_m[:, None] * tl.num_programs(1) + i_s) * K + o_s
    tl.store(p_out, b_best, mask=m_m[:, None] & (o_s < K))


@functools.cache
def config(dtype: torch.dtype, k: int, aligned: bool, sm: int) -> dict[str, int]:
    """Tiles that stay in registers on a GPU of compute capability `sm`, found by compiling for it.

    Never by the number of rows, so that a row's bits don't depend on its batch. A tile of 128 x 128 does 64 FLOPs for a
    byte from L2, one of 64 x 128 does 43. Longer lists of words leave registers for fewer rows; so do Blackwell's
    accumulators, which are copied out of their own memory, the parts of fp32 operands, and addresses of single
    elements where rows are not aligned to 16 bytes.
    """
    slots = max(16, power_of_2(k))
    less = (dtype == torch.float32) + (not aligned)
    if less == 0 and slots <= 64 and sm < 100:
        tile = {"BM": 128, "BN": 128, "BK": 64 if sm >= 90 else 32}
    else:
        rows = max(16, min(64, (8192 >> less) // slots))
        tile = {"BM": rows, "BN": 64, "BK": 64 >> less} if less else {"BM": rows, "BN": 128, "BK": 64}
    # A cap on registers keeps ptxas from spilling for the sake of one more program per SM.
    return {"SLOTS": slots, **tile, "num_warps": 8, "num_stages": 3, "maxnreg": 255}


def why_not(x: Tensor, k: int) -> str | None:
    """Why the kernel cannot run on these rows, or None."""
    if x.dtype == torch.float64:
        return "it compares words of 32 bits of a value; float64 has 64"
    if k > MAX_K:
        return f"it keeps at most {MAX_K} words of a row in registers, got k = {k}"
    return None


def topk_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, b_dec: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor]:
    x = x if b_dec is None else x - b_dec
    (n, d), width = x.shape, weight.size(1)
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if 1 in weight.stride() else weight.contiguous()
    by_feature = weight.stride(0) == 1 and width > 1
    strides = x.stride(0), weight.stride(1 if by_feature else 0)
    aligned = all(stride * x.itemsize % 16 == 0 for stride in strides)
    unit = 16 // x.itemsize if aligned else 1
    settings = config(x.dtype, k, aligned, capability(x))
    blocks, tiles = cdiv(n, settings["BM"]), cdiv(width, settings["BN"])
    each = cdiv(tiles, max(1, min(tiles, _PROGRAMS // blocks)))  # tiles of a split
    splits = cdiv(tiles, each)
    with on_device(x):
        words = x.new_empty((n, splits, k), dtype=torch.int64)
        _topk_encode[(blocks, splits)](
            x, weight, bias, words, n, d, width, k, each, *(stride // unit for stride in strides), UNIT=unit,
            BY_FEATURE=by_feature, WHOLE_D=d % settings["BK"] == 0, WHOLE_F=width % settings["BN"] == 0, **settings,
        )  # fmt: skip
        best = words.flatten(1).topk(k).values
        key = (best >> 32).int()
        values = (key ^ ((key >> 31) & 0x7FFFFFFF)).view(torch.float32)
        return values.relu_() if relu else values, ~best & 0xFFFFFFFF
