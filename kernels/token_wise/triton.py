"""The token-wise ops in Triton, with the contract of `reference.py`.

Each kernel reads its rows once and keeps them in registers. A row's bits depend only on its sizes and dtype: launch
configurations are functions of those alone, products are not fused into sums (`enable_fp_fusion=False`), and rows
of a norm that are not aligned to the width of a load are copied, since layouts, and with them the order of a sum,
follow that width.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels.arithmetic import fast_exp2, fast_inverse, inverse_root
from rmfast.kernels.launch import aligned, cdiv, on_device, power_of_2

from . import reference

GELU = tl.constexpr(reference.GELU)
GELU_TANH = tl.constexpr(reference.GELU_TANH)
LOG2E = tl.constexpr(1.4426950408889634)

# Bytes of a row in the accumulation dtype that 16 warps hold beside another one.
MAX_ROW = 65536


@triton.jit
def _inverse_rms(b_squares, d: tl.constexpr, eps):
    """eps comes in fp64, so that sums in fp64 have all of its digits."""
    if b_squares.dtype == tl.float64:
        return 1.0 / tl.sqrt(b_squares / d + eps)
    else:
        return inverse_root(b_squares * (1.0 / d) + tl.cast(eps, tl.float32))


@triton.jit
def load_gain(p_gain, o_d, m_d, acc: tl.constexpr, GEMMA: tl.constexpr):
    if p_gain is None:
        return tl.full(o_d.shape, 1.0, acc)
    else:
        b_gain = tl.load(p_gain + o_d, mask=m_d, other=0.0).to(acc)
        if GEMMA:
            b_gain = b_gain + 1.0
        return b_gain


@triton.jit
def normed(b_x, b_gain, eps, dtype: tl.constexpr, d: tl.constexpr, GEMMA: tl.constexpr):
    """Rows [BM, BD] in the accumulation dtype, rounded as transformers does: Llama's before and after the gain."""
    b_y = b_x * _inverse_rms(tl.sum(b_x * b_x, 1), d, eps)[:, None]
    if not GEMMA:
        b_y = b_y.to(dtype).to(b_x.dtype)
    return (b_y * b_gain[None, :]).to(dtype)


@triton.jit(do_not_specialize=["N", "stride_x", "stride_r"])
def _rms_norm(
    p_x, p_residual, p_weight, p_post, p_y, p_sum, N, stride_x, stride_r, eps: tl.float64,
    d: tl.constexpr, GEMMA: tl.constexpr, POST: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    dtype = p_x.dtype.element_ty
    acc = tl.float64 if dtype == tl.float64 else tl.float32
    stream = dtype  # in which the sum is kept, and what goes into it rounded: the residual's
    if p_residual is not None:
        stream = p_residual.dtype.element_ty
    o_n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_d = o_d < d
    m_x = (o_n < N)[:, None] & m_d[None, :]
    o_x = tl.multiple_of(o_n * stride_x, VEC)
    o_y = (o_n * d)[:, None] + o_d[None, :]
    b_x = tl.load(p_x + o_x[:, None] + o_d[None, :], mask=m_x, other=0.0).to(acc)  # [BM, BD]
    if p_residual is not None:
        if POST:
            b_x = normed(b_x, load_gain(p_post, o_d, m_d, acc, GEMMA), eps, stream, d, GEMMA).to(acc)
        o_r = tl.multiple_of(o_n * stride_r, VEC)
        b_r = tl.load(p_residual + o_r[:, None] + o_d[None, :], mask=m_x, other=0.0).to(acc)
        b_sum = (b_x + b_r).to(stream)
        tl.store(p_sum + o_y, b_sum, mask=m_x)
        b_x = b_sum.to(acc)
    b_y = normed(b_x, load_gain(p_weight, o_d, m_d, acc, GEMMA), eps, stream, d, GEMMA)
    tl.store(p_y + o_y, b_y.to(dtype), mask=m_x)


@triton.jit
def _gains(p_q_norm, p_k_norm, o_d, m_d, b_is_q, acc: tl.constexpr, GEMMA: tl.constexpr):
    """The gains of q's heads and of k's, [BH, BD]."""
    b_q, b_k = load_gain(p_q_norm, o_d, m_d, acc, GEMMA), load_gain(p_k_norm, o_d, m_d, acc, GEMMA)
    return tl.where(b_is_q, b_q[None, :], b_k[None, :])


@triton.jit(do_not_specialize=["stride_qn", "stride_qh", "stride_kn", "stride_kh", "stride_c", "stride_s"])
def _rotary(
    p_q, p_k, p_cos, p_sin, p_q_norm, p_k_norm, p_out_q, p_out_k,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_c, stride_s, eps: tl.float64,
    HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    GEMMA: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """One row, its cos and sin read once; q's heads and behind them k's in tiles [BH, BR] of the two halves that turn,
    and [BH, BP] of what passes through."""
    dtype = p_q.dtype.element_ty
    acc = tl.float64 if dtype == tl.float64 else tl.float32
    half: tl.constexpr = R // 2
    HEADS: tl.constexpr = HEADS_Q + HEADS_K
    i_n = tl.program_id(0).to(tl.int64)
    o_r = tl.arange(0, BR)
    m_r = o_r < half
    o_p = R + tl.arange(0, BP)
    m_p = o_p < D
    p_cos += tl.multiple_of(i_n * stride_c, VEC) + o_r
    p_sin += tl.multiple_of(i_n * stride_s, VEC) + o_r
    b_cos = tl.load(p_cos, mask=m_r, other=0.0).to(acc)[None, :]
    b_sin = tl.load(p_sin, mask=m_r, other=0.0).to(acc)[None, :]
    b_cos_high = tl.load(p_cos + half, mask=m_r, other=0.0).to(acc)[None, :]
    b_sin_high = tl.load(p_sin + half, mask=m_r, other=0.0).to(acc)[None, :]
    for i_h in tl.static_range(0, HEADS, BH):
        o_h = i_h + tl.arange(0, BH)
        is_q = o_h < HEADS_Q
        o_k = o_h - HEADS_Q
        m_h = (o_h < HEADS)[:, None]
        m_x = m_h & m_r[None, :]
        p_row = tl.where(
            is_q,
            p_q + tl.multiple_of(i_n * stride_qn + o_h * tl.cast(stride_qh, tl.int64), VEC),
            p_k + tl.multiple_of(i_n * stride_kn + o_k * tl.cast(stride_kh, tl.int64), VEC),
        )[:, None]
        p_to = tl.where(is_q, p_out_q + (i_n * HEADS_Q + o_h) * D, p_out_k + (i_n * HEADS_K + o_k) * D)[:, None]
        b_low = tl.load(p_row + o_r[None, :], mask=m_x, other=0.0).to(acc)
        b_high = tl.load(p_row + (half + o_r)[None, :], mask=m_x, other=0.0).to(acc)
        if R < D:
            b_rest = tl.load(p_row + o_p[None, :], mask=m_h & m_p[None, :], other=0.0).to(acc)
        if p_q_norm is not None:
            b_squares = tl.sum(b_low * b_low + b_high * b_high, 1)
            if R < D:
                b_squares += tl.sum(b_rest * b_rest, 1)
            b_inverse = _inverse_rms(b_squares, D, eps)[:, None]
            b_is_q = is_q[:, None]
            b_low = b_low * b_inverse * _gains(p_q_norm, p_k_norm, o_r, m_r, b_is_q, acc, GEMMA)
            b_high = b_high * b_inverse * _gains(p_q_norm, p_k_norm, half + o_r, m_r, b_is_q, acc, GEMMA)
            if R < D:
                b_rest = b_rest * b_inverse * _gains(p_q_norm, p_k_norm, o_p, m_p, b_is_q, acc, GEMMA)
        tl.store(p_to + o_r[None, :], (b_low * b_cos - b_high * b_sin).to(dtype), mask=m_x)
        tl.store(p_to + (half + o_r)[None, :], (b_high * b_cos_high + b_low * b_sin_high).to(dtype), mask=m_x)
        if R < D:
            tl.store(p_to + o_p[None, :], b_rest.to(dtype), mask=m_h & m_p[None, :])


@triton.jit
def _activation(b_g, KIND: tl.constexpr):
    if KIND == GELU:
        return 0.5 * b_g * (1.0 + tl.erf(b_g * 0.7071067811865476))
    elif KIND == GELU_TANH:
        # (1 + tanh(u)) / 2 = sigmoid(2u), u = √(2/π) (x + 0.044715 x³)
        return b_g / (1.0 + tl.exp(-b_g * (0.07135481627260025 * (b_g * b_g) + 1.5957691216057308)))
    else:
        return b_g / (1.0 + tl.exp(-b_g))


@triton.jit
def _plus(b_x, b_y, constant: tl.constexpr):
    """b_x b_y + constant, rounded once."""
    return tl.fma(b_x, b_y, tl.full(b_x.shape, constant, tl.float32))


@triton.jit
def activation_of_16_bits(b_g, KIND: tl.constexpr):
    """For results of 16 bits, by the hardware's estimates without their corrections: off by 2^-15 at most, and by 2^-16
    where fp16 holds the result.

    Those flush to 0 what is not normal: the exponential is taken a quarter as large, so that no inverse is flushed that
    a division would keep.
    """
    if KIND == GELU:
        # The normal distribution below −|x|, by a polynomial in 1 / (1 + 0.3 |x|) that is off by 2^-19 at most: in
        # contrast to 1 + erf its last places don't cancel.
        b_t = fast_inverse(_plus(tl.abs(b_g), tl.full(b_g.shape, 0.3, tl.float32), 1.0))
        b_p = _plus(tl.full(b_g.shape, -0.08459818392760216, tl.float32), b_t, 0.2405889024707455)
        b_p = _plus(_plus(b_p, b_t, -0.04866510045234786), b_t, 0.1647777924831238)
        b_p = _plus(_plus(b_p, b_t, 0.10670002559786008), b_t, 0.12127545537687243)
        b_p = _plus(b_p, b_t, -7.983803527232993e-05) * fast_exp2(b_g * b_g * (-0.5 * LOG2E))
        return b_g * tl.where(b_g < 0.0, b_p, 1.0 - b_p)
    else:
        if KIND == GELU_TANH:
            b_slope = _plus(b_g, b_g * (-0.07135481627260025 * LOG2E), -1.5957691216057308 * LOG2E)
            b_e = _plus(b_g, b_slope, -2.0)
        else:
            b_e = _plus(b_g, tl.full(b_g.shape, -LOG2E, tl.float32), -2.0)
        return 0.25 * b_g * fast_inverse(fast_exp2(b_e) + 0.25)


@triton.jit(do_not_specialize=["stride_g", "stride_u"])
def _gated_activation(
    p_gate, p_up, p_out, stride_g, stride_u, m: tl.constexpr, KIND: tl.constexpr, BD: tl.constexpr, VEC: tl.constexpr
):
    dtype = p_gate.dtype.element_ty
    acc = tl.float64 if dtype == tl.float64 else tl.float32
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < m
    b_g = tl.load(p_gate + tl.multiple_of(i_n * stride_g, VEC) + o_d, mask=m_d, other=0.0).to(acc)
    b_u = tl.load(p_up + tl.multiple_of(i_n * stride_u, VEC) + o_d, mask=m_d, other=0.0).to(acc)
    if dtype == tl.float32 or dtype == tl.float64:
        b_a = _activation(b_g, KIND)
    else:
        b_a = activation_of_16_bits(b_g, KIND)
    tl.store(p_out + i_n * m + o_d, (b_a * b_u).to(dtype), mask=m_d)


def vector_width(dtype: torch.dtype, *sizes: int) -> int:
    """Elements in a thread's load: 16 bytes where all sizes are multiples of that, else 1."""
    width = 16 // dtype.itemsize
    return width if all(size % width == 0 for size in sizes) else 1


@functools.cache
def rms_norm_config(d: int, dtype: torch.dtype) -> dict[str, int]:
    """Whole rows in registers, 16 elements a thread, in programs of at least 2048 elements.

    A cap on registers well above the need keeps ptxas from spilling for the sake of one more program per SM.
    """
    block = power_of_2(d)
    return {
        "BM": max(1, 2048 // block), "BD": block, "VEC": vector_width(dtype, d),
        "num_warps": min(16, max(4, block // 512)), "maxnreg": 128,
    }  # fmt: skip


@functools.cache
def rotary_config(heads: int, d: int, rotated: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles of heads with 8 numbers of each half for a thread, so that a sum over a head has one order whatever the
    tile; of 4, 2 or 1 warps as few as fill four fifths of the tiles, or else the fullest."""
    block = power_of_2(rotated // 2)
    least = max(1, 256 // block)

    def fill(warps: int) -> float:
        tile = least * warps
        return heads / (cdiv(heads, tile) * tile)

    warps = next((warps for warps in (4, 2, 1) if fill(warps) >= 0.8), max((4, 2, 1), key=fill))
    return {
        "BH": least * warps, "BR": block, "BP": power_of_2(max(1, d - rotated)),
        "VEC": vector_width(dtype, d, rotated // 2), "num_warps": warps,
    }  # fmt: skip


def aligned_rows(value: Tensor, vec: int) -> Tensor:
    """The value, or a copy where its rows do not start at multiples of a load's width."""
    steps = value.stride()[:-1]
    wide = vec == 1 or (value.data_ptr() % 16 == 0 and all(step % vec == 0 for step in steps))
    return value if wide else value.clone(memory_format=torch.contiguous_format)


def rms_norm(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, post_weight: Tensor | None, eps: float, gemma: bool
) -> tuple[Tensor, Tensor]:
    rows, d = x.shape
    config = rms_norm_config(d, x.dtype)
    if config["BD"] * reference.accumulator(x.dtype).itemsize > MAX_ROW:
        return reference.rms_norm(x, weight, residual, post_weight, eps, gemma)
    with on_device(x):
        y, total = x.new_empty(x.shape), x.new_empty(0) if residual is None else residual.new_empty(x.shape)
        x = aligned_rows(x, config["VEC"])
        residual = None if residual is None else aligned_rows(residual, config["VEC"])
        _rms_norm[(cdiv(rows, config["BM"]),)](
            x, residual, aligned(weight), aligned(post_weight), y, total, rows, x.stride(0),
            0 if residual is None else residual.stride(0),
            eps, d=d, GEMMA=gemma, POST=post_weight is not None, enable_fp_fusion=False, **config,
        )  # fmt: skip
        return y, total


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    gemma: bool,
) -> tuple[Tensor, Tensor]:
    rows, heads_q, d = q.shape
    heads_k, rotated = k.size(1), cos.size(1)
    if (q_norm is None) != (k_norm is None) and heads_q and heads_k:
        none = q[:, :0]
        turned_q, _ = rotary(q, none, cos, sin, q_norm, q_norm, eps, gemma)
        return turned_q, rotary(none, k, cos, sin, k_norm, k_norm, eps, gemma)[1]
    q_norm, k_norm = q_norm if heads_q else k_norm, k_norm if heads_k else q_norm
    with on_device(q):
        config = rotary_config(heads_q + heads_k, d, rotated, q.dtype)
        out_q, out_k = q.new_empty(q.shape), k.new_empty(k.shape)
        q, k, cos, sin = (aligned_rows(value, config["VEC"]) for value in (q, k, cos, sin))
        _rotary[(rows,)](
            q, k, cos, sin, aligned(q_norm), aligned(k_norm), out_q, out_k,
            *q.stride()[:2], *k.stride()[:2], cos.stride(0), sin.stride(0), eps,
            HEADS_Q=heads_q, HEADS_K=heads_k, D=d, R=rotated, GEMMA=gemma, enable_fp_fusion=False, **config,
        )  # fmt: skip
        return out_q, out_k


def gated_activation(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    rows, m = gate.shape
    with on_device(gate):
        out = gate.new_empty(gate.shape)
        width = vector_width(gate.dtype, m)
        wide = all(value.data_ptr() % 16 == 0 and value.stride(0) % width == 0 for value in (gate, up))
        block = min(1024, power_of_2(m))
        _gated_activation[(rows, cdiv(m, block))](
            gate, up, out, gate.stride(0), up.stride(0),
            m=m, KIND=kind, BD=block, VEC=width if wide else 1, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        return out
