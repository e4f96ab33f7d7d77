"""The token-wise ops in Triton, with the contract of `reference.py`.

Each kernel reads its rows once and keeps them in registers. A row's bits depend only on its sizes and dtype: launch
configurations are functions of those alone, products are not fused into sums (`enable_fp_fusion=False`), and rows
of a norm that are not aligned to the width of a load are copied, since layouts, and with them the order of a sum,
follow that width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels.launch import aligned, on_device

from . import reference

GELU = tl.constexpr(reference.GELU)
GELU_TANH = tl.constexpr(reference.GELU_TANH)

# Bytes of a row in the accumulation dtype that 16 warps hold beside another one.
MAX_ROW = 65536


@triton.jit
def _inverse_rms(b_squares, d: tl.constexpr, eps: tl.constexpr):
    if b_squares.dtype == tl.float64:
        return 1.0 / tl.sqrt(b_squares / d + eps)
    else:
        # The plain `/` and `sqrt` are approximations of 2 ulp in fp32.
        b_d = tl.full(b_squares.shape, d, tl.float32)
        return tl.div_rn(tl.full(b_squares.shape, 1.0, tl.float32), tl.sqrt_rn(tl.div_rn(b_squares, b_d) + eps))


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
def normed(b_x, b_gain, dtype: tl.constexpr, d: tl.constexpr, eps: tl.constexpr, GEMMA: tl.constexpr):
    """Rows [BM, BD] in the accumulation dtype, rounded as transformers does: Llama's before and after the gain."""
    b_y = b_x * _inverse_rms(tl.sum(b_x * b_x, 1), d, eps)[:, None]
    if not GEMMA:
        b_y = b_y.to(dtype).to(b_x.dtype)
    return (b_y * b_gain[None, :]).to(dtype)


@triton.jit(do_not_specialize=["N", "stride_x", "stride_r"])
def _rms_norm(
    p_x, p_residual, p_weight, p_post, p_y, p_sum, N, stride_x, stride_r,
    d: tl.constexpr, eps: tl.constexpr, GEMMA: tl.constexpr, POST: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    dtype = p_x.dtype.element_ty
    acc = tl.float64 if dtype == tl.float64 else tl.float32
    o_n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_d = o_d < d
    m_x = (o_n < N)[:, None] & m_d[None, :]
    o_x = tl.multiple_of(o_n * stride_x, VEC)
    o_y = (o_n * d)[:, None] + o_d[None, :]
    b_x = tl.load(p_x + o_x[:, None] + o_d[None, :], mask=m_x, other=0.0).to(acc)  # [BM, BD]
    if p_residual is not None:
        if POST:
            b_x = normed(b_x, load_gain(p_post, o_d, m_d, acc, GEMMA), dtype, d, eps, GEMMA).to(acc)
        o_r = tl.multiple_of(o_n * stride_r, VEC)
        b_r = tl.load(p_residual + o_r[:, None] + o_d[None, :], mask=m_x, other=0.0).to(acc)
        b_sum = (b_x + b_r).to(dtype)
        tl.store(p_sum + o_y, b_sum, mask=m_x)
        b_x = b_sum.to(acc)
    tl.store(p_y + o_y, normed(b_x, load_gain(p_weight, o_d, m_d, acc, GEMMA), dtype, d, eps, GEMMA), mask=m_x)


@triton.jit
def _rotate(
    p_x, p_gain, p_out, i_n, o_h, heads, stride_n, stride_h, p_cos, p_sin,
    D: tl.constexpr, R: tl.constexpr, eps: tl.constexpr, GEMMA: tl.constexpr,
    BR: tl.constexpr, BP: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Heads o_h of row i_n: tiles [BH, BR] of the two halves that turn, and [BH, BP] of what passes through."""
    dtype = p_x.dtype.element_ty
    acc = tl.float64 if dtype == tl.float64 else tl.float32
    half: tl.constexpr = R // 2
    m_h = (o_h < heads)[:, None]
    o_x = tl.multiple_of(i_n * stride_n + o_h * tl.cast(stride_h, tl.int64), VEC)[:, None]
    o_out = ((i_n * heads + o_h) * D)[:, None]
    o_r = tl.arange(0, BR)
    m_r = o_r < half
    m_x = m_h & m_r[None, :]
    b_low = tl.load(p_x + o_x + o_r[None, :], mask=m_x, other=0.0).to(acc)
    b_high = tl.load(p_x + o_x + (half + o_r)[None, :], mask=m_x, other=0.0).to(acc)
    if R < D:
        o_p = R + tl.arange(0, BP)
        m_p = o_p < D
        b_rest = tl.load(p_x + o_x + o_p[None, :], mask=m_h & m_p[None, :], other=0.0).to(acc)
    if p_gain is not None:
        b_squares = tl.sum(b_low * b_low + b_high * b_high, 1)
        if R < D:
            b_squares += tl.sum(b_rest * b_rest, 1)
        b_inverse = _inverse_rms(b_squares, D, eps)[:, None]
        b_low = b_low * b_inverse * load_gain(p_gain, o_r, m_r, acc, GEMMA)[None, :]
        b_high = b_high * b_inverse * load_gain(p_gain, half + o_r, m_r, acc, GEMMA)[None, :]
        if R < D:
            b_rest = b_rest * b_inverse * load_gain(p_gain, o_p, m_p, acc, GEMMA)[None, :]
    b_cos = tl.load(p_cos + o_r, mask=m_r, other=0.0).to(acc)[None, :]
    b_sin = tl.load(p_sin + o_r, mask=m_r, other=0.0).to(acc)[None, :]
    tl.store(p_out + o_out + o_r[None, :], (b_low * b_cos - b_high * b_sin).to(dtype), mask=m_x)
    b_cos = tl.load(p_cos + half + o_r, mask=m_r, other=0.0).to(acc)[None, :]
    b_sin = tl.load(p_sin + half + o_r, mask=m_r, other=0.0).to(acc)[None, :]
    tl.store(p_out + o_out + (half + o_r)[None, :], (b_high * b_cos + b_low * b_sin).to(dtype), mask=m_x)
    if R < D:
        tl.store(p_out + o_out + o_p[None, :], b_rest.to(dtype), mask=m_h & m_p[None, :])


@triton.jit(
    do_not_specialize=["heads_q", "heads_k", "stride_qn", "stride_qh", "stride_kn", "stride_kh", "stride_c", "stride_s"]
)
def _rotary(
    p_q, p_k, p_cos, p_sin, p_q_norm, p_k_norm, p_out_q, p_out_k, heads_q, heads_k,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_c, stride_s,
    D: tl.constexpr, R: tl.constexpr, eps: tl.constexpr, GEMMA: tl.constexpr,
    BH: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1)
    tiles_q = tl.cdiv(heads_q, BH)
    p_cos += i_n * stride_c
    p_sin += i_n * stride_s
    if i_h < tiles_q:
        _rotate(
            p_q, p_q_norm, p_out_q, i_n, i_h * BH + tl.arange(0, BH), heads_q, stride_qn, stride_qh, p_cos, p_sin,
            D, R, eps, GEMMA, BR, BP, VEC,
        )  # fmt: skip
    else:
        _rotate(
            p_k, p_k_norm, p_out_k, i_n, (i_h - tiles_q) * BH + tl.arange(0, BH), heads_k, stride_kn, stride_kh,
            p_cos, p_sin, D, R, eps, GEMMA, BR, BP, VEC,
        )  # fmt: skip


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
    if KIND == GELU:
        b_a = 0.5 * b_g * (1.0 + tl.erf(b_g * 0.7071067811865476))
    elif KIND == GELU_TANH:
        # (1 + tanh(u)) / 2 = sigmoid(2u), u = √(2/π) (x + 0.044715 x³)
        b_a = b_g / (1.0 + tl.exp(-b_g * (0.07135481627260025 * (b_g * b_g) + 1.5957691216057308)))
    else:
        b_a = b_g / (1.0 + tl.exp(-b_g))
    tl.store(p_out + i_n * m + o_d, (b_a * b_u).to(dtype), mask=m_d)


def vector_width(dtype: torch.dtype, *sizes: int) -> int:
    """Elements in a thread's load: 16 bytes where all sizes are multiples of that, else 1."""
    width = 16 // dtype.itemsize
    return width if all(size % width == 0 for size in sizes) else 1


def rms_norm_config(d: int, dtype: torch.dtype) -> dict[str, int]:
    """Whole rows in registers, 16 elements a thread, in programs of at least 2048 elements.

    A cap on registers well above the need keeps ptxas from spilling for the sake of one more program per SM.
    """
    block = triton.next_power_of_2(d)
    return {
        "BM": max(1, 2048 // block), "BD": block, "VEC": vector_width(dtype, d),
        "num_warps": min(16, max(4, block // 512)), "maxnreg": 128,
    }  # fmt: skip


def rotary_config(d: int, rotated: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles of at most 2048 elements, 16 for a thread."""
    return {
        "BH": max(1, 2048 // triton.next_power_of_2(d)), "BR": triton.next_power_of_2(rotated // 2),
        "BP": triton.next_power_of_2(max(1, d - rotated)), "VEC": vector_width(dtype, d, rotated // 2), "num_warps": 4,
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
        y, total = x.new_empty(x.shape), x.new_empty((0,) if residual is None else x.shape)
        x = aligned_rows(x, config["VEC"])
        residual = None if residual is None else aligned_rows(residual, config["VEC"])
        _rms_norm[(triton.cdiv(rows, config["BM"]),)](
            x, residual, aligned(weight), aligned(post_weight), y, total, rows, x.stride(0),
            0 if residual is None else residual.stride(0),
            d=d, eps=eps, GEMMA=gemma, POST=post_weight is not None, enable_fp_fusion=False, **config,
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
    with on_device(q):
        config = rotary_config(d, rotated, q.dtype)
        out_q, out_k = q.new_empty(q.shape), k.new_empty(k.shape)
        q, k = aligned_rows(q, config["VEC"]), aligned_rows(k, config["VEC"])
        tiles = triton.cdiv(heads_q, config["BH"]) + triton.cdiv(heads_k, config["BH"])
        _rotary[(rows, tiles)](
            q, k, cos, sin, aligned(q_norm), aligned(k_norm), out_q, out_k, heads_q, heads_k,
            *q.stride()[:2], *k.stride()[:2], cos.stride(0), sin.stride(0),
            D=d, R=rotated, eps=eps, GEMMA=gemma, enable_fp_fusion=False, **config,
        )  # fmt: skip
        return out_q, out_k


def gated_activation(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    rows, m = gate.shape
    with on_device(gate):
        out = gate.new_empty(gate.shape)
        width = vector_width(gate.dtype, m)
        wide = all(value.data_ptr() % 16 == 0 and value.stride(0) % width == 0 for value in (gate, up))
        block = min(1024, triton.next_power_of_2(m))
        _gated_activation[(rows, triton.cdiv(m, block))](
            gate, up, out, gate.stride(0), up.stride(0),
            m=m, KIND=kind, BD=block, VEC=width if wide else 1, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        return out
