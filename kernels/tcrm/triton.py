"""The TCRM loss in Triton, with the contract of `reference.py`: a program for each response.

Each reads the last values of its pair, then its own response once. Lanes are summed in fp32, the responses' terms in
fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels.launch import on_device

from . import reference

# A cap on registers well above the need keeps ptxas from spilling for the sake of one more program per SM.
LAUNCH = {"BLOCK": 1024, "num_warps": 4, "maxnreg": 128}


@triton.jit
def _range(p_bounds, i_b, pairs, tokens):
    """First token and end of a response; both 0 where it is no range of tokens."""
    first, end = tl.load(p_bounds + i_b), tl.load(p_bounds + pairs + i_b)
    fits = (first >= 0) & (first < end) & (end <= tokens)
    return tl.where(fits, first, 0), tl.where(fits, end, 0)


@triton.jit
def _final(p_values, end):
    """The response's last value, NaN where it is no range."""
    return tl.load(p_values + end - 1, mask=end > 0, other=float("nan")).to(tl.float32)


@triton.jit
def _gap(final_chosen, final_rejected, p_margin, i_b):
    gap = final_chosen - final_rejected
    if p_margin is not None:
        gap -= tl.load(p_margin + i_b)
    return gap


@triton.jit
def _weight(first, end, MEAN: tl.constexpr):
    """What a response's terms are multiplied by: 1 over its tokens but the last, or 1."""
    weight = 1.0
    if MEAN:
        weight = 1.0 / tl.maximum(end - first - 1, 1).to(tl.float32)
    return weight


@triton.jit
def _squares(p_values, first, end, final, BLOCK: tl.constexpr):
    """Sums of (r_k − r_{k+1})² and of (r_k − r_K)² over all tokens of a response but the last."""
    b_smooth = tl.zeros([BLOCK], tl.float32)
    b_lookahead = tl.zeros([BLOCK], tl.float32)
    for i in range(first, end - 1, BLOCK):
        o_t = i + tl.arange(0, BLOCK)
        m_t = o_t < end - 1
        b_x = tl.load(p_values + o_t, mask=m_t, other=0.0).to(tl.float32)
        b_step = b_x - tl.load(p_values + o_t + 1, mask=m_t, other=0.0).to(tl.float32)
        b_ahead = tl.where(m_t, b_x - final, 0.0)
        b_smooth += b_step * b_step
        b_lookahead += b_ahead * b_ahead
    return tl.sum(b_smooth), tl.sum(b_lookahead)


@triton.jit
def _gradients(p_values, p_grad, first, end, final, smooth, lookahead, last, BLOCK: tl.constexpr):
    """Writes the gradients of a response: `last` at its last token."""
    for i in range(first, end - 1, BLOCK):
        o_t = i + tl.arange(0, BLOCK)
        m_t = o_t < end - 1
        b_x = tl.load(p_values + o_t, mask=m_t, other=0.0).to(tl.float32)
        b_next = tl.load(p_values + o_t + 1, mask=m_t, other=0.0).to(tl.float32)
        b_grad = smooth * (b_x - b_next) + lookahead * (b_x - final)
        tl.store(p_grad + o_t, b_grad.to(p_grad.dtype.element_ty), mask=m_t)
    tl.store(p_grad + end - 1, last.to(p_grad.dtype.element_ty), mask=end > 0)


@triton.jit(do_not_specialize=["pairs", "tokens_chosen", "tokens_rejected", "smooth", "lookahead"])
def _forward(
    p_chosen, p_rejected, p_bounds, p_margin, p_terms, pairs, tokens_chosen, tokens_rejected, smooth, lookahead,
    MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p_terms (pairs, 2, 4): of each response its share of the loss, of Bradley-Terry, smoothness and lookahead."""
    i_b = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1)
    first_chosen, end_chosen = _range(p_bounds, i_b, pairs, tokens_chosen)
    first_rejected, end_rejected = _range(p_bounds + 2 * pairs, i_b, pairs, tokens_rejected)
    final_chosen, final_rejected = _final(p_chosen, end_chosen), _final(p_rejected, end_rejected)
    if i_s == 0:
        squares = _squares(p_chosen, first_chosen, end_chosen, final_chosen, BLOCK)
        weight = _weight(first_chosen, end_chosen, MEAN)
    else:
        squares = _squares(p_rejected, first_rejected, end_rejected, final_rejected, BLOCK)
        weight = _weight(first_rejected, end_rejected, MEAN)
    gap = _gap(final_chosen, final_rejected, p_margin, i_b)
    # −log σ(gap) = max(−gap, 0) + log(1 + e), the logarithm by its series where 1 + e rounds e away. NaN is one of e.
    e = tl.exp(-tl.abs(gap))
    bradley_terry = tl.where(gap < 0, -gap, 0.0) + tl.where(e < 1e-4, e - 0.5 * e * e, tl.log(1.0 + e))
    bradley_terry = tl.where(i_s == 0, bradley_terry, 0.0)
    terms_smooth, terms_lookahead = weight * squares[0], weight * squares[1]
    p_terms += (i_b * 2 + i_s) * 4
    tl.store(p_terms, bradley_terry + smooth * terms_smooth + lookahead * terms_lookahead)
    tl.store(p_terms + 1, bradley_terry)
    tl.store(p_terms + 2, terms_smooth)
    tl.store(p_terms + 3, terms_lookahead)


@triton.jit(do_not_specialize=["pairs", "tokens_chosen", "tokens_rejected", "smooth", "lookahead"])
def _backward(
    p_out_grad, p_chosen, p_rejected, p_bounds, p_margin, p_grad_chosen, p_grad_rejected,
    pairs, tokens_chosen, tokens_rejected, smooth, lookahead, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    first_chosen, end_chosen = _range(p_bounds, i_b, pairs, tokens_chosen)
    first_rejected, end_rejected = _range(p_bounds + 2 * pairs, i_b, pairs, tokens_rejected)
    final_chosen, final_rejected = _final(p_chosen, end_chosen), _final(p_rejected, end_rejected)
    gap = _gap(final_chosen, final_rejected, p_margin, i_b)
    e = tl.exp(-tl.abs(gap))
    scale = tl.load(p_out_grad) / pairs
    slope = scale * tl.where(gap < 0, 1.0, e) / (1.0 + e)
    if tl.program_id(1) == 0:
        weight = 2.0 * scale * _weight(first_chosen, end_chosen, MEAN)
        _gradients(
            p_chosen, p_grad_chosen, first_chosen, end_chosen, final_chosen, weight * smooth, weight * lookahead,
            -slope, BLOCK,
        )  # fmt: skip
    else:
        weight = 2.0 * scale * _weight(first_rejected, end_rejected, MEAN)
        _gradients(
            p_rejected, p_grad_rejected, first_rejected, end_rejected, final_rejected, weight * smooth,
            weight * lookahead, slope, BLOCK,
        )  # fmt: skip


def forward(
    chosen: Tensor,
    rejected: Tensor,
    bounds: Tensor,
    margin: Tensor | None,
    smooth: float,
    lookahead: float,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    if chosen.dtype == torch.float64:  # scalar arguments of a kernel are fp32
        return reference.forward(chosen, rejected, bounds, margin, smooth, lookahead, mean)
    pairs = bounds.size(1)
    with on_device(chosen):
        terms = chosen.new_empty((pairs, 2, 4), dtype=torch.float32)
        _forward[(pairs, 2)](
            chosen, rejected, bounds, margin, terms, pairs, chosen.size(0), rejected.size(0), smooth, lookahead,
            MEAN=mean, **LAUNCH,
        )  # fmt: skip
        means = terms.sum((0, 1), dtype=torch.float64) / pairs
        return means[0].float(), means[1:].float()


def backward(
    grad: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    bounds: Tensor,
    margin: Tensor | None,
    smooth: float,
    lookahead: float,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    if chosen.dtype == torch.float64:
        return reference.backward(grad, chosen, rejected, bounds, margin, smooth, lookahead, mean)
    with on_device(chosen):
        grad_chosen, grad_rejected = torch.zeros_like(chosen), torch.zeros_like(rejected)
        _backward[(bounds.size(1), 2)](
            grad, chosen, rejected, bounds, margin, grad_chosen, grad_rejected,
            bounds.size(1), chosen.size(0), rejected.size(0), smooth, lookahead,
            MEAN=mean, **LAUNCH,
        )  # fmt: skip
        return grad_chosen, grad_rejected
