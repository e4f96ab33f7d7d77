"""Inputs to token ids: formatting (chat template, pairs), tokenising, checking and truncating.

Every error names the input it belongs to, and carries its position in `.index`, so that a caller who streams a file
can report the line and go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

Truncation = Literal["left", "right", "error"]
Format = Literal["chat", "pair", "concat"] | Callable[[Any], Any]
FORMATS = ("chat", "pair", "concat")


class InputError(ValueError):
    """An input that cannot be scored: `index` is its position among the inputs, `reason` says why."""

    def __init__(self, index: int, reason: str):
        super().__init__(f"input {index}: {reason}")
        self.index = index
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Encoded:
    """One input, ready to score: `ids` (T,) int64, and `types` (T,) int64 where an encoder's tokenizer makes them."""

    ids: np.ndarray
    types: np.ndarray | None = None
    fixed: np.ndarray | None = None  # (T,) bool: tokens that truncation keeps (BOS, [CLS], [SEP], ...)
    characters: int | None = None  # of the response, before truncation; None for an input of token ids

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Text:
    """Text to tokenise: one string, or two for the tokenizer's own pair encoding."""

    text: str
    second: str | None = None
    characters: int | None = None  # of the response: a pair's second, the last message, or all of a string


def words(tokenizer: Any, ids: list[int]) -> list[str]:
    """The tokens of a text, each by itself; their ids where there is no tokenizer."""
    return [str(i) for i in ids] if tokenizer is None else [tokenizer.decode([i]) for i in ids]


def several(inputs: Any) -> bool:
    """Whether inputs is a list of them, not one of them: chat messages, token ids."""
    return isinstance(inputs, list) and not (inputs and isinstance(inputs[0], dict | int | np.integer))


def encode(
    inputs: Sequence[Any],
    tokenizer: Any,
    *,
    causal: bool,
    vocab_size: int,
    max_length: int | None = None,
    truncation: Truncation = "error",
    format: Format | None = None,
    errors: Literal["raise", "return"] = "raise",
) -> list[Any]:
    """Encode every input.

    Args:
        inputs: (prompt, response) pairs, message lists, strings, token-id sequences or `Encoded`, in any mixture.
        tokenizer: a transformers tokenizer, or None where every input is token ids.
        causal: whether the model is a decoder. Pairs without a chat template are then concatenated; an encoder gets
            its tokenizer's pair encoding.
        vocab_size: rows of the embedding; an id outside is an error.
        max_length: most tokens of one input, or None for no limit.
        truncation: the side that is cut from an input over max_length, or "error".
        format: how pairs become text: None (as above), "chat", "pair" or "concat"; or a function of one input that
            returns an input.
        errors: "raise" the first `InputError`, or "return" each in the place of its result.

    Returns:
        A list with an `Encoded` for each input (or, with errors="return", its `InputError`).

    Raises:
        InputError: (a ValueError) an input is empty, of an unknown kind, too long, or has ids outside the vocabulary.
        TypeError, ValueError: the inputs or options themselves are wrong.
    """
    if not callable(format):  # whose inputs may be anything
        check_inputs(inputs)
    if truncation not in ("left", "right", "error"):
        raise ValueError(f'Expected truncation to be "left", "right" or "error", got {truncation!r}')
    if not (format is None or callable(format) or format in FORMATS):
        raise ValueError(f"Expected format to be None, one of {', '.join(FORMATS)}, or a function, got {format!r}")
    if errors not in ("raise", "return"):
        raise ValueError(f'Expected errors to be "raise" or "return", got {errors!r}')
    if max_length is not None and max_length < 1:
        raise ValueError(f"Expected max_length to be at least 1, got {max_length}")

    results: list[Any] = [None] * len(inputs)

    def attempt(index: int, function: Callable[[], Any]) -> Any:
        try:
            results[index] = function()
        except Exception as error:
            # Whatever goes wrong inside one input (a template's own checks, a user's format function, text that is
            # not valid Unicode) is that input's error.
            results[index] = error if isinstance(error, InputError) else InputError(index, _reason(error))
            results[index].__cause__ = None if results[index] is error else error

    for i, item in enumerate(inputs):
        attempt(i, partial(prepare, item, i, tokenizer, causal, format))
    tokenise(results, tokenizer, causal, attempt)
    for i, result in enumerate(results):
        if isinstance(result, Encoded):
            attempt(i, partial(_finish, result, i, vocab_size, max_length, truncation))
    bad = next((result for result in results if isinstance(result, InputError)), None)
    if bad is not None and errors == "raise":
        raise bad
    return results


def _reason(error: Exception) -> str:
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


def check_inputs(inputs: Any) -> None:
    """Refuse one bare input where a sequence of inputs belongs: iterating it would score its characters or fields."""
    if isinstance(inputs, str | bytes | dict) or not hasattr(inputs, "__len__") or not hasattr(inputs, "__getitem__"):
        got = type(inputs).__name__
    elif isinstance(inputs, tuple) and len(inputs) == 2 and all(isinstance(part, str) for part in inputs):
        got = "one pair of strings"
    elif len(inputs) and isinstance(inputs[0], dict):
        got = "one list of messages"
    elif len(inputs) and (isinstance(inputs[0], int | np.integer) or getattr(inputs[0], "ndim", 1) == 0):
        got = "one sequence of token ids"
    else:
        return
    raise TypeError(f"Expected inputs to be a sequence of inputs, got {got}; wrap one input in [ ]")


def prepare(item: Any, index: int, tokenizer: Any, causal: bool, format: Format | None) -> Text | Encoded:
    """Turn one input into token ids, or into the text that will be tokenised."""
    if isinstance(item, Encoded):
        return item
    if callable(format):
        return prepare(format(item), index, tokenizer, causal, None)
    ids = _as_ids(item)
    if ids is not None:
        return Encoded(ids)
    if isinstance(item, str):
        return _text(index, item, len(item))
    if isinstance(item, list | tuple):
        if len(item) == 0:
            raise InputError(index, "it is empty")
        if all(isinstance(message, dict) for message in item):
            return _text(index, _render(tokenizer, list(item), index), _content_characters(item[-1]))
        if len(item) == 2 and isinstance(item[1], str) and isinstance(item[0], str | list | tuple):
            return _pair(item[0], item[1], index, tokenizer, causal, format)
    raise InputError(
        index,
        "expected a string, a (prompt, response) pair, a list of messages or a sequence of token ids, "
        f"got {type(item).__name__}",
    )


def _pair(
    prompt: Any, response: str, index: int, tokenizer: Any, causal: bool, format: Format | None
) -> Text | Encoded:
    templated = getattr(tokenizer, "chat_template", None) is not None
    if format is None:
        format = "chat" if templated or not isinstance(prompt, str) else "concat" if causal else "pair"
    if isinstance(prompt, str):
        if not prompt and not response:
            raise InputError(index, "it is empty")
        turns = [{"role": "user", "content": prompt}]
    elif format == "chat" and prompt and all(isinstance(message, dict) for message in prompt):
        turns = list(prompt)
    else:
        raise InputError(index, f"with format={format!r} the prompt must be a string, got {type(prompt).__name__}")
    if format == "chat":
        rendered = _render(tokenizer, [*turns, {"role": "assistant", "content": response}], index)
        return _text(index, rendered, len(response))
    if format == "pair":
        return Text(prompt, response, len(response))
    return Text(prompt + response, None, len(response))


def _text(index: int, text: str, characters: int) -> Text:
    if not text:
        raise InputError(index, "it is empty")
    return Text(text, None, characters)


def _content_characters(message: dict) -> int:
    """Of a chat message, whose content may also come in parts."""
    content = message.get("content") or ""
    parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return sum(map(len, parts))


def _render(tokenizer: Any, messages: list[dict], index: int) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(index, "messages need a tokenizer with a chat template; give format= a function, or token ids")
    return tokenizer.apply_chat_template(messages, tokenize=False)


def _as_ids(item: Any) -> np.ndarray | None:
    """The item as (T,) int64 token ids, or None where it is something else."""
    if isinstance(item, torch.Tensor):
        if item.ndim != 1 or item.is_floating_point() or item.dtype == torch.bool:
            return None
        return item.detach().cpu().numpy().astype(np.int64)
    if isinstance(item, np.ndarray):
        return item.astype(np.int64) if item.ndim == 1 and item.dtype.kind in "iu" else None
    if not isinstance(item, list | tuple) or not item:
        return None
    if any(isinstance(x, bool) or not isinstance(x, int | np.integer) for x in item):
        return None
    return np.asarray(item, dtype=np.int64)


def tokenise(results: list[Any], tokenizer: Any, causal: bool, attempt: Callable) -> None:
    """Replace every `Text` in results by its `Encoded`, in few calls (fast tokenizers run one call on all cores)."""
    groups: dict[tuple[bool, bool], list[int]] = {}
    bos = getattr(tokenizer, "bos_token", None) or None
    for i, item in enumerate(results):
        if isinstance(item, Text):
            # A template (or the caller) that wrote BOS must not get a second one from the tokenizer.
            has_bos = causal and bos is not None and item.text.startswith(bos)
            groups.setdefault((not has_bos, item.second is not None), []).append(i)

    for (special, _), where in groups.items():
        texts = [results[i] for i in where]
        try:
            for i, encoded in zip(where, _call_tokenizer(tokenizer, texts, special, bos)):
                results[i] = encoded
        except Exception:  # one text spoils the call: find it
            for i, text in zip(where, texts):
                attempt(i, lambda text=text: _call_tokenizer(tokenizer, [text], special, bos)[0])  # noqa: B023


def _call_tokenizer(tokenizer: Any, texts: list[Text], special: bool, bos: str | None) -> list[Encoded]:
    if tokenizer is None:
        raise ValueError("text needs a tokenizer, and this model was given none; pass tokenizer=, or token ids")
    second = [text.second for text in texts] if texts[0].second is not None else None
    batch = tokenizer(
        [text.text for text in texts],
        second,
        add_special_tokens=special,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        padding=False,
        truncation=False,
        verbose=False,  # lengths are checked here, with the input's index
    )
    types = batch.get("token_type_ids")
    out = []
    for i, ids in enumerate(batch["input_ids"]):
        fixed = np.asarray(batch["special_tokens_mask"][i], dtype=bool)
        if bos is not None and len(ids) and ids[0] == tokenizer.bos_token_id:
            fixed[0] = True
        type_ids = None if types is None else np.asarray(types[i], dtype=np.int64)
        out.append(Encoded(np.asarray(ids, dtype=np.int64), type_ids, fixed, texts[i].characters))
    return out


def _finish(item: Encoded, index: int, vocab_size: int, max_length: int | None, truncation: Truncation) -> Encoded:
    """Check the ids and cut the input to max_length."""
    if len(item) == 0:
        raise InputError(index, "it is empty: it has no tokens")
    bad = (item.ids < 0) | (item.ids >= vocab_size)
    if bad.any():
        where = int(bad.argmax())
        raise InputError(index, f"token id {item.ids[where]} at position {where} is outside of [0, {vocab_size})")
    if max_length is None or len(item) <= max_length:
        return item
    if truncation == "error":
        raise InputError(
            index, f'it has {len(item)} tokens, over max_length={max_length}; truncation="left" or "right" would cut it'
        )
    keep = _kept(item, max_length, truncation)
    if keep is None:
        raise InputError(index, f"max_length={max_length} leaves no room beside the special tokens")
    types, fixed = (None if x is None else x[keep] for x in (item.types, item.fixed))
    return Encoded(item.ids[keep], types, fixed, item.characters)


def _kept(item: Encoded, max_length: int, side: Truncation) -> np.ndarray | None:
    """(T,) bool: the tokens left after cutting to max_length, or None where the fixed tokens alone fill it.

    Fixed tokens stay. Of the runs between them (two for a pair) the longest is cut first, as tokenizers do
    (`longest_first`), but without touching the tokenizer's own, shared, truncation state.
    """
    fixed = np.zeros(len(item), bool) if item.fixed is None else item.fixed
    edges = np.flatnonzero(np.diff(np.concatenate([[True], fixed, [True]]).astype(np.int8)))
    runs = edges.reshape(-1, 2)  # [start, stop) of each run of tokens that may be cut
    left = runs[:, 1] - runs[:, 0]
    excess = len(item) - max_length
    if left.sum() <= excess:
        return None
    while excess:
        longest = left.max()
        shorter = left[left < longest]
        step = max(1, min(excess, longest - (shorter.max() if len(shorter) else 0)) // int((left == longest).sum()))
        for i in np.flatnonzero(left == longest):
            cut = min(step, excess)
            left[i] -= cut
            excess -= cut
    keep = fixed.copy()
    for (start, stop), n in zip(runs, left):
        if side == "right":
            keep[start : start + n] = True
        else:
            keep[stop - n : stop] = True
    return keep
