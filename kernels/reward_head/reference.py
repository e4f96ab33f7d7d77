"""The reward head in eager PyTorch: the algebraic form of DESIGN's formula, and its analytic backward.

Every backend of the op takes the arguments of `forward` and `backward` below, already checked and cast by
`rmfast.ops`: `hidden` (B, T, d) with a contiguous last dimension, all other floating tensors contiguous in the
accumulation dtype (fp64 for fp64 hidden states, else fp32), `rows` and `intervention_index` int64, M, J, I >= 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORMS = {None: 0, "rms": 1, "gemma_rms": 2, "layer": 3}
NONE, RMS, GEMMA_RMS, LAYER = range(4)

# A row whose squared norm falls below this share of the terms it is the difference of is recomputed explicitly:
# with one massive coordinate the formula is off by 1.6e-3, the explicit form by 8e-7.
CANCELLATION = 0.05

# Rows whose fp32 copy (4 MiB at d = 2048) stays in a core's share of the cache; a GPU wants larger launches.
_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


def fold_gain(weight: Tensor, norm: int, norm_weight: Tensor | None) -> Tensor:
    """a = γ⊙w, (1 + γ)⊙w for Gemma, w without a gain: (K, d)."""
    if norm_weight is None or norm == NONE:
        return weight
    return weight * (1 + norm_weight if norm == GEMMA_RMS else norm_weight)


def fold_bias(weight: Tensor, bias: Tensor | None, norm: int, norm_bias: Tensor | None) -> Tensor:
    """What is added after the norm's scale, β·w_k + b_k: (K,)."""
    out = weight.new_zeros(weight.size(0)) if bias is None else bias
    return out + weight @ norm_bias if norm == LAYER and norm_bias is not None else out


def gather(hidden: Tensor, rows: Tensor | None) -> Tensor:
    """The (M, d) rows that are read; a view where the strides allow it."""
    if rows is None:
        return hidden.reshape(-1, hidden.size(-1))
    # A row out of range was refused on the CPU; on a GPU it gives NaN, as in the kernels.
    inside = (rows >= 0) & (rows < hidden.size(0) * hidden.size(1))
    safe = torch.where(inside, rows, 0)
    picked = hidden[safe // hidden.size(1), safe % hidden.size(1)]
    if rows.device.type == "cpu":
        return picked
    return torch.where(inside[:, None], picked, torch.nan)


def _head(x: Tensor, gain: Tensor, offset: Tensor, norm: int, eps: float) -> Tensor:
    """Rewards of explicit rows: x (n, d), already centred for a layer norm."""
    dots = x @ gain.T
    if norm != NONE:
        dots = dots * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return dots + offset


def _intervened(
    x: Tensor, mean: Tensor | None, gain: Tensor, offset: Tensor, directions: Tensor, gram: Tensor, overlap: Tensor,
    strengths: Tensor, targets: Tensor | None, norm: int, eps: float,
) -> Tensor:  # fmt: skip
    """Rewards (n, I, K) of x (n, d), centred by `mean` (n, 1) for a layer norm; strengths, targets (I or n, I, J)."""
    d = x.size(-1)
    z = x @ directions.T  # (n, J), of the centred row
    row_sums = directions.sum(-1)  # P 1
    true_z = z if mean is None else z + mean * row_sums
    shift = true_z[:, None] if targets is None else true_z[:, None] - targets
    c = strengths * shift  # (n, I, J)
    square = x.square().sum(-1, keepdim=True)  # (n, 1)
    linear = 2 * (c * z[:, None]).sum(-1)  # (n, I)
    quadratic = ((c @ gram) * c).sum(-1)
    norm2 = square - linear + quadratic
    dots = (x @ gain.T)[:, None] - c @ overlap.T  # (n, I, K)
    if norm == LAYER:
        new_mean = -(c @ row_sums) / d
        dots = dots - new_mean[..., None] * gain.sum(-1)
        norm2 = norm2 - d * new_mean.square()
    if norm != NONE:
        out = dots * torch.rsqrt(norm2 / d + eps)[..., None] + offset
    else:
        out = dots + offset

    cancelled = norm2 < CANCELLATION * (square + linear.abs() + quadratic)
    if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return out  # the list of such rows can't be read back during capture; the kernels have no such limit
    n, i = cancelled.nonzero(as_tuple=True)
    if n.numel() == 0:
        return out
    wide = torch.float64
    explicit, p = x[n].to(wide), directions.to(wide)
    if mean is not None:
        explicit = explicit + mean[n]
    alpha = strengths.expand(c.shape)[n, i].to(wide)
    target = 0 if targets is None else targets.expand(c.shape)[n, i].to(wide)
    explicit = explicit - (alpha * (explicit @ p.T - target)) @ p
    if norm == LAYER:
        explicit = explicit - explicit.mean(-1, keepdim=True)
    exact = _head(explicit, gain.to(wide), offset.to(wide), norm, eps)
    return out.index_put((n, i), exact.to(out.dtype))


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    rows: Tensor | None,
    directions: Tensor | None,
    strengths: Tensor | None,
    targets: Tensor | None,
    intervention_index: Tensor | None,
) -> Tensor:
    """Rewards (M, K), or (M, I, K) with interventions and no `intervention_index`.

    A row's matmul goes through BLAS, whose order of additions may change with the number of rows: of the
    backends, this one alone is not bit-identical between batches.
    """
    acc = weight.dtype
    picked = gather(hidden, rows)
    gain = fold_gain(weight, norm, norm_weight)
    offset = fold_bias(weight, bias, norm, norm_bias)
    if directions is not None:
        gram, overlap = directions @ directions.T, gain @ directions.T
    step = max(1, _CHUNK_ELEMENTS.get(hidden.device.type, 1 << 26) // hidden.size(-1))
    out = []
    for start in range(0, picked.size(0), step):
        x = picked[start : start + step].to(acc)
        mean = None
        if norm == LAYER:
            mean = x.mean(-1, keepdim=True)
            x = x - mean
            # The mean of a row far from 0 is rounded by more than the row's digits: what is left of it goes too.
            rest = x.mean(-1, keepdim=True)
            mean, x = mean + rest, x - rest
        if directions is None:
            out.append(_head(x, gain, offset, norm, eps))
            continue
        assert strengths is not None
        alpha, target = strengths, targets
        if intervention_index is not None:
            index = intervention_index[start : start + step]
            on = ((index >= 0) & (index < strengths.size(0)))[:, None]
            alpha = torch.where(on, strengths[index.clamp(0, strengths.size(0) - 1)], 0)[:, None]
            target = None if targets is None else targets[index.clamp(0, strengths.size(0) - 1)][:, None]
        rewards = _intervened(
            x, mean, gain, offset, directions, gram, overlap, alpha, target, norm, eps
        )  # fmt: skip
        if intervention_index is not None:
            rewards = rewards[:, 0]
            if index.device.type != "cpu":
                rewards = torch.where(((index >= -1) & (index < strengths.size(0)))[:, None], rewards, torch.nan)
        out.append(rewards)
    return out[0] if len(out) == 1 else torch.cat(out)


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    norm: int,
    norm_weight: Tensor | None,
    eps: float,
    rows: Tensor | None,
    need_rows: bool,
    need_dots: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the reward without interventions, from grad (M, K) in the accumulation dtype.

    Returns the gradient of the rows read, (M, d) in hidden's dtype, and V (K, d) with
    V_k = Σ_n grad_nk (h_n − μ_n) / σ_n, from which those of weight (V ⊙ gain) and norm weight (Σ_k w_k ⊙ V_k)
    follow. One that is not needed comes back empty.
    """
    acc, d = weight.dtype, hidden.size(-1)
    picked = gather(hidden, rows)
    gain = fold_gain(weight, norm, norm_weight)
    grad_rows = torch.empty(picked.shape if need_rows else (0,), dtype=hidden.dtype, device=hidden.device)
    dots = torch.zeros(weight.shape if need_dots else (0,), dtype=acc, device=hidden.device)
    step = max(1, _CHUNK_ELEMENTS.get(hidden.device.type, 1 << 26) // d)
    for start in range(0, picked.size(0), step):
        x, g = picked[start : start + step].to(acc), grad[start : start + step]
        if norm == LAYER:
            x = x - x.mean(-1, keepdim=True)
        scaled = g
        if norm != NONE:
            inv = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            scaled = g * inv
        if need_dots:
            dots += scaled.T @ x
        if need_rows:
            out = scaled @ gain
            if norm != NONE:
                projection = (g * (x @ gain.T)).sum(-1, keepdim=True)
                out = out - x * (projection * inv**3 / d)
            if norm == LAYER:
                out = out - (scaled @ gain.sum(-1, keepdim=True)) / d
            grad_rows[start : start + step] = out
    return grad_rows, dots
