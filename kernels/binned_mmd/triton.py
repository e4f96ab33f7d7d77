"""The sum of MMD² over bins in Triton: `forward` with the contract of `reference.py`, by its own `line` and `weigh`.

A program of `line` takes BM rows and loops over all rows of their groups: each pair is visited twice, and no two
programs write to one place, so no atomics. Sums over tiles are in fp64.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels.launch import cdiv, on_device

from . import reference

LOG2E = tl.constexpr(1.4426950408889634)

# 8 pairs a thread, and programs enough for all SMs at a few thousand rows.
LINE = {"BM": 16, "BN": 64, "num_warps": 4}
WEIGH = {"BM": 16, "BN": 64, "num_warps": 4}


@triton.jit
def _kernels(b_squares, p_rates, H: tl.constexpr):
    """Sums over rates of kernels, and of rate times kernel."""
    b_kernels = tl.zeros(b_squares.shape, tl.float32)
    b_slopes = tl.zeros(b_squares.shape, tl.float32)
    for i_h in tl.static_range(H):
        rate = tl.load(p_rates + i_h)
        b_e = tl.exp2(-(rate * LOG2E) * b_squares)
        b_kernels += b_e
        b_slopes += rate * b_e
    return b_kernels, b_slopes


@triton.jit
def _ranges(p_ranges, o_m, m_m, N):
    """First and end of the rows' bins and of their groups, empty where there is no row. Indices of rows fit 32 bits."""
    p_ranges += o_m
    stride = tl.cast(N, tl.int64)
    bin_first = tl.load(p_ranges, mask=m_m, other=0).to(tl.int32)
    bin_end = tl.load(p_ranges + stride, mask=m_m, other=0).to(tl.int32)
    group_first = tl.load(p_ranges + 2 * stride, mask=m_m, other=0).to(tl.int32)
    group_end = tl.load(p_ranges + 3 * stride, mask=m_m, other=0).to(tl.int32)
    return bin_first, bin_end, group_first, group_end


@triton.jit
def _coefficients(o_m, o_n, bin_first, bin_end, group_first, group_end, b_alpha_m, b_alpha_n, b_same):
    o_j = o_n[None, :]
    b_c = -2.0 * b_alpha_m[:, None] * b_alpha_n[None, :]
    b_c = tl.where((o_j >= group_first[:, None]) & (o_j < group_end[:, None]), b_c, 0.0)
    b_c = tl.where((o_j >= bin_first[:, None]) & (o_j < bin_end[:, None]), b_same[:, None], b_c)
    return tl.where(o_j == o_m[:, None], 0.0, b_c)


@triton.jit(do_not_specialize=["N"])
def _line(
    p_x, p_ranges, p_alpha, p_same, p_rates, p_value, p_grad, N,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = o_m < N
    b_x = tl.load(p_x + o_m, mask=m_m, other=0.0)
    b_alpha, b_same = tl.load(p_alpha + o_m, mask=m_m, other=0.0), tl.load(p_same + o_m, mask=m_m, other=0.0)
    bin_first, bin_end, group_first, group_end = _ranges(p_ranges, o_m, m_m, N)
    first = tl.min(tl.where(m_m, group_first, N))
    last = tl.max(group_end)
    b_value = tl.zeros([BM], tl.float64)
    b_grad = tl.zeros([BM], tl.float64)
    for i_n in range(first, last, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < last
        b_gap = b_x[:, None] - tl.load(p_x + o_n, mask=m_n, other=0.0)[None, :]  # [BM, BN]
        b_alpha_n = tl.load(p_alpha + o_n, mask=m_n, other=0.0)
        b_c = _coefficients(o_m, o_n, bin_first, bin_end, group_first, group_end, b_alpha, b_alpha_n, b_same)
        b_kernels, b_slopes = _kernels(b_gap * b_gap, p_rates, H)
        b_value += tl.sum(b_c * b_kernels, 1).to(tl.float64)
        if p_grad is not None:
            b_grad += tl.sum(b_c * b_slopes * b_gap, 1).to(tl.float64)
    tl.store(p_value + o_m, b_value / H, mask=m_m)
    if p_grad is not None:
        tl.store(p_grad + o_m, (b_grad * (-4.0 / H)).to(tl.float32), mask=m_m)


@triton.jit(do_not_specialize=["N", "row", "column", "height", "width"])
def _weigh(
    p_dots, p_squares, p_ranges, p_alpha, p_same, p_rates, p_value, N, row, column, height, width,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    o_r, o_c = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    m_r, m_c = o_r < height, o_c < width
    o_m, o_n = row + o_r, column + o_c
    p_tile = p_dots + o_r[:, None].to(tl.int64) * width + o_c[None, :]
    m_tile = m_r[:, None] & m_c[None, :]
    b_dots = tl.load(p_tile, mask=m_tile, other=0.0)  # [BM, BN]
    b_squares = tl.load(p_squares + o_m, mask=m_r, other=0.0)[:, None]
    b_squares += tl.load(p_squares + o_n, mask=m_c, other=0.0)[None, :] - 2.0 * b_dots
    # Not tl.maximum, which drops a NaN.
    b_kernels, b_slopes = _kernels(tl.where(b_squares < 0.0, 0.0, b_squares), p_rates, H)
    bin_first, bin_end, group_first, group_end = _ranges(p_ranges, o_m, m_r, N)
    b_alpha_m, b_alpha_n = tl.load(p_alpha + o_m, mask=m_r, other=0.0), tl.load(p_alpha + o_n, mask=m_c, other=0.0)
    b_same = tl.load(p_same + o_m, mask=m_r, other=0.0)
    b_c = _coefficients(o_m, o_n, bin_first, bin_end, group_first, group_end, b_alpha_m, b_alpha_n, b_same)
    b_c = tl.where(m_tile, b_c, 0.0)
    tl.store(p_tile, b_c * b_slopes / H, mask=m_tile)
    tl.store(p_value + i_m * tl.num_programs(1) + i_n, tl.sum(b_c * b_kernels) / H)


def line(
    x: Tensor, ranges: Tensor, alpha: Tensor, same: Tensor, rates: Tensor, need_grad: bool
) -> tuple[Tensor, Tensor]:
    rows = x.size(0)
    with on_device(x):
        value = x.new_empty(rows, dtype=torch.float64)
        grad = torch.empty_like(x) if need_grad else None
        _line[(cdiv(rows, LINE["BM"]),)](
            x, ranges, alpha, same, rates, value, grad, rows, H=rates.size(0), **LINE
        )  # fmt: skip
        return value.sum(), x.new_empty(0) if grad is None else grad


def weigh(
    dots: Tensor, squares: Tensor, ranges: Tensor, alpha: Tensor, same: Tensor, rates: Tensor, row: int, column: int
) -> Tensor:
    height, width = dots.shape
    with on_device(dots):
        grid = cdiv(height, WEIGH["BM"]), cdiv(width, WEIGH["BN"])
        value = dots.new_empty(grid)
        _weigh[grid](
            dots, squares, ranges, alpha, same, rates, value, alpha.size(0), row, column, height, width,
            H=rates.size(0), **WEIGH,
        )  # fmt: skip
        return value.sum(dtype=torch.float64)


_narrow = functools.partial(reference.forward, line=line, weigh=weigh)


def forward(
    x: Tensor, ranges: Tensor, alpha: Tensor, same: Tensor, rates: Tensor, need_grad: bool
) -> tuple[Tensor, Tensor]:
    run = reference.forward if x.dtype == torch.float64 else _narrow  # the kernels are for fp32
    return run(x, ranges, alpha, same, rates, need_grad)
