"""Why a model is refused, in words: attention that drops a softcap; heads of common rules of another kind, by what they
read and what they give."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

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


def dropped_softcap(root: nn.Module) -> float | None:
    """The softcap of a model's attention logits where it runs by SDPA, which takes none and drops it without a word.

    transformers runs Gemma 2, T5Gemma and VaultGemma so by default up to 5.23; from 5.24 on it refuses to.
    """
    for module in root.modules():
        cap, config = getattr(module, "attn_logit_softcapping", None), getattr(module, "config", None)
        # The choice itself: under a run of the packed engine the name without "_internal" is that engine's.
        if cap is not None and getattr(config, "_attn_implementation_internal", None) == "sdpa" and not _caps():
            return float(cap)
    return None


def _caps() -> bool:
    """Whether transformers' SDPA takes a softcap."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return "softcap" in inspect.signature(sdpa_attention_forward).parameters


def expect_own_attention(root: nn.Module) -> None:
    """Raises ValueError where a model's attention drops a part of it."""
    if (cap := dropped_softcap(root)) is not None:
        raise ValueError(
            f"{type(root).__name__} runs its attention by SDPA, which drops the softcap of {cap:g} on its logits "
            '(attn_logit_softcapping): its rewards would be wrong. Load it with attn_implementation="eager", as '
            'rmfast.load does, or call model.set_attn_implementation("eager") first'
        )


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
