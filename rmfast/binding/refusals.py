"""Why a head is refused, in words: what it reads, and what its output is, where these are common other rules."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rmfast.binding.norms import Call

_ONE_TOKEN = "rmfast's rewards are read at one token, or at each"
# (..., T, n) -> (..., n)
_READS: dict[str, Callable[[Tensor], Tensor]] = {
    "the mean of all tokens'": lambda x: x.mean(-2),
    "the sum of all tokens'": lambda x: x.sum(-2),
    "the largest of all tokens'": lambda x: x.amax(-2),
}
_SQUASHES: dict[str, Callable[[Tensor], Tensor]] = {
    "the sigmoid": torch.sigmoid,
    "the tanh": torch.tanh,
    "the log-sigmoid": torch.nn.functional.logsigmoid,
    "the softmax": lambda x: x.softmax(-1),
}


def rule_of(tail: list[Call], states: Tensor, logits: Tensor) -> str | None:
    """The rule by which the modules after the body make the logits, if it is one of those that are known by name.

    Args: the modules' calls, the hidden states (1, T, d) that the body gave, the model's logits.
    """
    if not tail or not isinstance(tail[0].given, Tensor) or not isinstance(tail[-1].result, Tensor):
        return None
    first, last, given, made = tail[0].name, tail[-1].name, tail[0].given, tail[-1].result
    tokens = states.size(1)
    per_token = made.dim() > 1 and made.size(-2) == tokens
    for i in range(tokens - 1):
        if _close(given, states[..., i, :], 0.0) or (per_token and _close(logits, made[..., i, :], 0.0)):
            return (
                f"it reads token {i + 1} of {tokens}, and not the last. Where that is the model's way without a "
                "special token that it looks for, give pooling= that token's id"
            )
    rounding = max(1e-5, 2 * torch.finfo(made.dtype).eps)
    for what, read in _READS.items():
        if _close(given, read(states), rounding * states.abs().max()):
            return f"{first} reads {what} hidden states; {_ONE_TOKEN}"
        if per_token and _close(logits, read(made), rounding * made.abs().max()):
            return f"its output is {what} {last}; {_ONE_TOKEN}"
    for what, squash in _SQUASHES.items():
        if any(_close(logits, squash(x), rounding) for x in ([made, made[..., -1, :]] if per_token else [made])):
            return f"its output is {what} of {last}; rmfast scores raw logits, so its forward must return these"
    return None


def _close(a: Tensor, b: Tensor, atol: float | Tensor) -> bool:
    return a.numel() == b.numel() and bool((a.reshape(-1) - b.reshape(-1).to(a)).abs().max() <= atol)
