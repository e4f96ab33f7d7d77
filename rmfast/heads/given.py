"""What a caller gives as a head, for one model and tokenizer."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import Any

import numpy as np
from torch import nn

from rmfast.arguments import shown
from rmfast.binding.modules import text_config, unwrap
from rmfast.heads.function import FunctionHead
from rmfast.heads.gated import Gated
from rmfast.heads.head import Head
from rmfast.heads.tokens import TokenHead
from rmfast.texts.chat import Chat

# What stands between a prompt and its response in the ids of published gated models, by model type: used where there is
# no chat template to tell.
PATTERNS = {
    "llama": (128009, 128006, 78191, 128007, 271),  # <|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n
    "gemma2": (107, 108, 106, 2516, 108),  # <end_of_turn>\n<start_of_turn>model\n
}
_PROMPT, _RESPONSE = "qPROMPTq", "qRESPONSEq"  # which no template has


def head_of(given: Any, model: nn.Module, tokenizer: Any) -> Head:
    """A head: a program, a `TokenHead` or a function of hidden states.

    Raises:
        TypeError: it is none of these.
        ValueError: the model has no such tokens; a gated head has no pattern, and the tokenizer gives none.
    """
    if isinstance(given, TokenHead):
        return given.of(unwrap(model), tokenizer)
    if isinstance(given, Gated) and not given.pattern:
        return given.found(pattern_of(tokenizer, getattr(text_config(unwrap(model)), "model_type", None)))
    if isinstance(given, Head):
        return given
    expect_head(given)
    return FunctionHead(of=given, reading="last but pad")


def expect_head(given: Any) -> None:
    """TypeError for what is no head."""
    if not (isinstance(given, TokenHead | Head) or callable(given)):
        raise TypeError(
            f"Expected head to be of rmfast.heads, a rmfast.TokenHead or a function of hidden states, got "
            f"{shown(given)}"
        )


def pattern_of(tokenizer: Any, model_type: str | None) -> tuple[int, ...]:
    """The token ids that a chat template puts between a prompt and its response.

    Raises:
        ValueError: there is no template, or nothing between, and the model type is none of `PATTERNS`.
    """
    if Chat(tokenizer).templated:
        text = Chat(tokenizer).render(
            [{"role": "user", "content": _PROMPT}, {"role": "assistant", "content": _RESPONSE}]
        )
        between = text.partition(_PROMPT)[2].partition(_RESPONSE)[0]
        # Between other words: a tokenizer may begin a text by itself with a space of its own.
        one, two = (tokenizer.encode(f"{a}{between}{b}", add_special_tokens=False) for a, b in ("ab", "cd"))
        same = SequenceMatcher(None, one, two, autojunk=False).find_longest_match()
        if same.size:
            return tuple(one[same.a : same.a + same.size])
    if model_type in PATTERNS:
        return PATTERNS[model_type]
    raise ValueError(
        "Expected a tokenizer whose chat template puts something between a prompt and its response: a gated head reads "
        "the prompt's end there. Give the head a pattern of token ids, dataclasses.replace(head, pattern=...)"
    )


def last_occurrence(ids: np.ndarray, pattern: tuple[int, ...]) -> int | None:
    """The first index of the last occurrence of a pattern in ids (T,)."""
    found = occurrences(ids, pattern)
    return int(found[-1]) if len(found) else None


def occurrences(ids: np.ndarray, pattern: tuple[int, ...]) -> np.ndarray:
    """The first index of each occurrence of a pattern in ids (T,), int64."""
    if len(ids) < len(pattern):
        return np.zeros(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(pattern))
    return np.flatnonzero((windows == np.array(pattern)).all(1))
