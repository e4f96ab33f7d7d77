"""The TCRM loss in eager PyTorch: the contract of all backends, and what runs where none is built.

bounds (4, B): first and end of each chosen response, first and end of each rejected one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(
    chosen: Tensor,
    rejected: Tensor,
    bounds: Tensor,
    margin: Tensor | None,
    smooth: float,
    lookahead: float,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """Loss () and its terms (3,), in the accumulation dtype."""
    sides = [_side(chosen, bounds[0], bounds[1], mean), _side(rejected, bounds[2], bounds[3], mean)]
    pairs = bounds.size(1)
    terms = torch.stack(
        [
            -logsigmoid(_gap(sides, margin)).mean(),
            torch.stack([(weight * step * step).sum() for _, step, _, weight in sides]).sum() / pairs,
            torch.stack([(weight * ahead * ahead).sum() for _, _, ahead, weight in sides]).sum() / pairs,
        ]
    )
    return terms[0] + smooth * terms[1] + lookahead * terms[2], terms


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
    """Gradients in chosen and rejected, in their dtype, of a loss with gradient `grad` ()."""
    sides = [_side(chosen, bounds[0], bounds[1], mean), _side(rejected, bounds[2], bounds[3], mean)]
    scale = grad / bounds.size(1)
    slope = scale * torch.sigmoid(-_gap(sides, margin))
    grads = []
    for (_, step, ahead, weight), end, final in zip(sides, (bounds[1], bounds[3]), (-slope, slope)):
        out = 2 * scale * weight * (smooth * step + lookahead * ahead)
        grads.append(out.index_copy(0, (end - 1).clamp(0, out.size(0) - 1), final).to(chosen.dtype))
    return grads[0], grads[1]


def _gap(sides: list[tuple[Tensor, ...]], margin: Tensor | None) -> Tensor:
    gap = sides[0][0] - sides[1][0]
    return gap if margin is None else gap - margin


def _side(values: Tensor, first: Tensor, end: Tensor, mean: bool) -> tuple[Tensor, ...]:
    """The last value of each response (B,), NaN for one that is no range of tokens; and by token (N,), 0 where none
    belongs: r_k − r_{k+1}, r_k − r_K, the weight of the two.
    """
    values = values.to(accumulator(values.dtype))
    tokens, pairs = values.size(0), end.size(0)
    fits = (first >= 0) & (first < end) & (end <= tokens)
    final = values[(end - 1).clamp(0, tokens - 1)].where(fits, torch.nan)
    token = torch.arange(tokens, device=values.device)
    owner = torch.searchsorted(end.contiguous(), token, right=True).clamp(max=pairs - 1)
    inside = (token >= first[owner]) & (token < end[owner] - 1)
    weight = (end - first - 1).clamp(min=1).to(values.dtype).reciprocal()[owner] if mean else torch.ones_like(values)
    return final, (values - values.roll(-1)).where(inside, 0), (values - final[owner]).where(inside, 0), weight
