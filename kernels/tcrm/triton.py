"""The TCRM loss in Triton, with the contract of `reference.py`: a program for each response.

Each reads the last values of its pair, then its own response once, and writes the gradient in the same pass. Lanes are
summed in fp32; the responses' terms are added up in fp64.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference

BLOCK = 1024


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
def _body(p_values, p_grad, first, end, final, weight_smooth, weight_lookahead, BLOCK: tl.constexpr):
    """Sums of squares over all tokens but the last of a response; writes their gradients."""
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
        tl.store(p_grad + o_t, weight_smooth * b_step + weight_lookahead * b_ahead, mask=m_t)
    return tl.sum(b_smooth), tl.sum(b_lookahead)


@triton.jit(do_not_specialize=["pairs", "tokens_chosen", "tokens_rejected", "smooth", "lookahead"])
def _tcrm(
    p_chosen, p_rejected, p_bounds, p_margin, p_terms, p_grad_chosen, p_grad_rejected,
    pairs, tokens_chosen, tokens_rejected, smooth, lookahead, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p_terms (pairs, 2, 4): of each response its share of the loss, of Bradley-Terry, smoothness and lookahead."""
    i_b = tl.program_id(0).to(tl.int64)
    i_s = tl.program_id(1)
    first_chosen, end_chosen = _range(p_bounds, i_b, pairs, tokens_chosen)
    first_rejected, end_rejected = _range(p_bounds + 2 * pairs, i_b, pairs, tokens_rejected)
    final_chosen, final_rejected = _final(p_chosen, end_chosen), _final(p_rejected, end_rejected)
    gap = final_chosen - final_rejected
    if p_margin is not None:
        gap -= tl.load(p_margin + i_b)
    # −log σ(gap) = max(−gap, 0) + log(1 + e) and σ(−gap) by the exponential that can't overflow; a NaN passes through.
    e = tl.exp(-tl.abs(gap))
    # log(1 + e) by its series where 1 + e rounds e away.
    bradley_terry = tl.where(gap < 0, -gap, 0.0) + tl.where(e < 1e-4, e - 0.5 * e * e, tl.log(1.0 + e))
    slope = tl.where(gap < 0, 1.0, e) / ((1.0 + e) * pairs)

    k = tl.maximum(tl.where(i_s == 0, end_chosen - first_chosen, end_rejected - first_rejected) - 1, 1).to(tl.float32)
    each = 1.0
    if MEAN:
        each = 1.0 / k
    scale = 2.0 * each / pairs
    bradley_terry = tl.where(i_s == 0, bradley_terry, 0.0)
    if i_s == 0:
        squares = _body(
            p_chosen, p_grad_chosen, first_chosen, end_chosen, final_chosen, smooth * scale, lookahead * scale, BLOCK
        )
        tl.store(p_grad_chosen + end_chosen - 1, -slope, mask=end_chosen > 0)
    else:
        squares = _body(
            p_rejected, p_grad_rejected, first_rejected, end_rejected, final_rejected, smooth * scale,
            lookahead * scale, BLOCK,
        )  # fmt: skip
        tl.store(p_grad_rejected + end_rejected - 1, slope, mask=end_rejected > 0)
    terms_smooth, terms_lookahead = each * squares[0], each * squares[1]
    p_terms += (i_b * 2 + i_s) * 4
    tl.store(p_terms, bradley_terry + smooth * terms_smooth + lookahead * terms_lookahead)
    tl.store(p_terms + 1, bradley_terry)
    tl.store(p_terms + 2, terms_smooth)
    tl.store(p_terms + 3, terms_lookahead)


def forward(
    chosen: Tensor,
    rejected: Tensor,
    bounds: Tensor,
    margin: Tensor | None,
    smooth: float,
    lookahead: float,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if chosen.dtype == torch.float64:  # scalar arguments of a kernel are fp32
        return reference.forward(chosen, rejected, bounds, margin, smooth, lookahead, mean)
    pairs = bounds.size(1)
    device = torch.cuda.device(chosen.device) if chosen.device.type == "cuda" else contextlib.nullcontext()
    with device:
        terms = chosen.new_empty((pairs, 2, 4), dtype=torch.float32)
        grad_chosen, grad_rejected = (torch.zeros_like(v, dtype=torch.float32) for v in (chosen, rejected))
        _tcrm[(pairs, 2)](
            chosen, rejected, bounds, margin, terms, grad_chosen, grad_rejected,
            pairs, chosen.size(0), rejected.size(0), smooth, lookahead, MEAN=mean, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        means = terms.sum((0, 1), dtype=torch.float64) / pairs
        return means[0].float(), means[1:].float(), grad_chosen, grad_rejected
