"""patch_rows in Triton, with the contract of `reference.py`.

A program takes as many rows as one of token_wise's `rms_norm`, in the same tile and with the same options, so that y
has the bits of that kernel. Rows are read where they lie, straight from base or values.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels.launch import aligned, cdiv, on_device
from rmfast.kernels.token_wise.reference import accumulator
from rmfast.kernels.token_wise.triton import MAX_ROW, aligned_rows, load_gain, normed, rms_norm_config

from . import reference


@triton.jit(do_not_specialize=["N", "rows_b", "rows_v", "stride_b", "stride_v"])
def _patch_rows(
    p_base, p_values, p_base_rows, p_value_rows, p_weight, p_x, p_y, N, rows_b, rows_v, stride_b, stride_v,
    eps: tl.float64, d: tl.constexpr, GEMMA: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    dtype = p_base.dtype.element_ty
    acc = tl.float64 if dtype == tl.float64 else tl.float32
    o_n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_n = o_n < N
    o_d = tl.arange(0, BD)
    m_d = o_d < d
    i_b = tl.load(p_base_rows + o_n, mask=m_n, other=0)  # [BM]
    i_v = tl.load(p_value_rows + o_n, mask=m_n, other=0)
    m_in = m_n & (i_b >= 0) & (i_b < rows_b) & (i_v >= -1) & (i_v < rows_v)
    p_row = tl.where(
        i_v < 0, p_base + tl.multiple_of(i_b * stride_b, VEC), p_values + tl.multiple_of(i_v * stride_v, VEC)
    )
    b_x = tl.load(p_row[:, None] + o_d[None, :], mask=m_in[:, None] & m_d[None, :], other=0.0)  # [BM, BD]
    # The interpreter has no constants of bf16.
    b_x = tl.where(m_in[:, None], b_x, tl.full((1, 1), float("nan"), tl.float32).to(dtype))
    o_y = (o_n * d)[:, None] + o_d[None, :]
    m_y = m_n[:, None] & m_d[None, :]
    tl.store(p_x + o_y, b_x, mask=m_y)
    tl.store(p_y + o_y, normed(b_x.to(acc), load_gain(p_weight, o_d, m_d, acc, GEMMA), eps, dtype, d, GEMMA), mask=m_y)


def patch_rows(
    base: Tensor, values: Tensor, base_rows: Tensor, value_rows: Tensor, weight: Tensor, eps: float, gemma: bool
) -> tuple[Tensor, Tensor]:
    n, d = base_rows.size(0), base.size(1)
    config = rms_norm_config(d, base.dtype)
    if config["BD"] * accumulator(base.dtype).itemsize > MAX_ROW:
        return reference.patch_rows(base, values, base_rows, value_rows, weight, eps, gemma)
    with on_device(base):
        x, y = base.new_empty(n, d), base.new_empty(n, d)
        base, values = aligned_rows(base, config["VEC"]), aligned_rows(values, config["VEC"])
        _patch_rows[(cdiv(n, config["BM"]),)](
            base, values, base_rows, value_rows, aligned(weight), x, y, n, base.size(0), values.size(0),
            base.stride(0), values.stride(0), eps, d=d, GEMMA=gemma, enable_fp_fusion=False, **config,
        )  # fmt: skip
        return x, y
