"""The neuron statistics in Triton, with the contract of `reference.py`.

A program holds some neurons' whole columns and sorts words of a value's 32 ordered bits above the text's number; runs
of equal values come from two scans. float64 would need words of more than 64 bits, and longer columns more registers
than there are: `why_not` says so, and the eager reference runs.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels.launch import cdiv, on_device, power_of_2

MAX_TEXTS = 2048


@triton.jit
def _first_of_run(key_a, place_a, key_b, place_b):
    return key_b, tl.where(key_a == key_b, place_a, place_b)


@triton.jit
def _value(b_key):
    """The float32 whose sign and magnitude are the key's."""
    b_bits = tl.where(b_key < 0, (-b_key) | -2147483648, b_key)
    return b_bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["N", "M", "A", "stride_n", "stride_m"])
def _neuron_stats(
    p_x, p_ranks, p_squares, p_spearman, p_median, N, M, A, stride_n, stride_m, BM: tl.constexpr, BN: tl.constexpr
):
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    m_m = o_m < M
    m_n = (o_n < N)[None, :]
    m_x = m_m[:, None] & m_n
    o_x = (o_m * stride_m)[:, None] + (o_n.to(tl.int64) * stride_n)[None, :]
    b_bits = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)  # [BM, BN]
    b_key = tl.where(b_bits < 0, -(b_bits & 0x7FFFFFFF), b_bits)
    b_word = (b_key.to(tl.int64) << 32) | o_n[None, :].to(tl.int64)
    b_word = tl.sort(tl.where(m_n, b_word, 0x7FFFFFFFFFFFFFFF), dim=1)
    b_key = (b_word >> 32).to(tl.int32)
    b_text = b_word.to(tl.int32)
    b_place = tl.broadcast_to(o_n[None, :], (BM, BN))
    _, b_start = tl.associative_scan((b_key, b_place), 1, _first_of_run)
    # Ends by a scan of the keys turned round: https://github.com/triton-lang/triton/issues/4362 has one of pairs with
    # reverse=True give wrong results.
    _, b_back = tl.associative_scan((tl.flip(b_key, 1), b_place), 1, _first_of_run)
    b_end = BN - 1 - tl.flip(b_back, 1)
    b_rank = tl.where(m_n, b_start + tl.minimum(b_end, N - 1) - (N - 1), 0)

    b_lower = _value(tl.sum(tl.where(b_place == (N - 1) // 2, b_key, 0), 1))
    b_upper = _value(tl.sum(tl.where(b_place == N // 2, b_key, 0), 1))
    b_nan = (tl.max(tl.where(m_n, b_key, 0), 1) > 0x7F800000) | (tl.min(b_key, 1) < -0x7F800000)
    m_odd = (tl.zeros([BM], tl.int32) + N) % 2 == 1
    b_median = tl.where(m_odd, b_lower, (b_lower + b_upper) * 0.5)
    tl.store(p_median + o_m, tl.where(b_nan, float("nan"), b_median), mask=m_m)

    b_squares = tl.sum((b_rank * b_rank).to(tl.int64), 1).to(tl.float64)
    for i_a in range(A):
        b_other = tl.load(p_ranks + b_text * A + i_a, mask=m_x, other=0)
        b_sum = tl.sum((b_rank * b_other).to(tl.int64), 1).to(tl.float64)
        b_square = b_squares * tl.load(p_squares + i_a)
        b_value = tl.where(b_square == 0, 0.0, b_sum / tl.sqrt(b_square)).to(tl.float32)
        tl.store(p_spearman + o_m * A + i_a, tl.where(b_nan, float("nan"), b_value), mask=m_m)


@functools.cache
def config(n: int) -> dict[str, int]:
    """Tiles of at most 2048 words, 16 for a thread: with twice as many 2048 texts spill.

    A cap on registers well above the need keeps ptxas from spilling for the sake of one more program per SM.
    """
    words = power_of_2(n)
    return {"BM": min(64, 2048 // words), "BN": words, "num_warps": 4, "maxnreg": 255}


def why_not(activations: Tensor) -> str | None:
    """Why the kernel cannot run on these activations, or None."""
    if activations.dtype == torch.float64:
        return "it sorts 32 bits of a value; float64 has 64"
    if activations.size(0) > MAX_TEXTS:
        return f"it sorts at most {MAX_TEXTS} texts in registers, got {activations.size(0)}"
    return None


def neuron_stats(activations: Tensor, ranks: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    n, m = activations.shape
    with on_device(activations):
        spearman = activations.new_empty((m, ranks.size(1)), dtype=torch.float32)
        median = activations.new_empty(m, dtype=torch.float32)
        settings = config(n)
        _neuron_stats[(cdiv(m, settings["BM"]),)](
            activations, ranks, squares, spearman, median, n, m, ranks.size(1), *activations.stride(),
            enable_fp_fusion=False, **settings,
        )  # fmt: skip
        return spearman, median
