"""Inputs to token ids: listed, tokenised, checked and cut; their forms are in `rmfast.texts.forms`.

Every error names the input it belongs to, and carries its position in `.index`, so that a caller who streams a file
can report the line and go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from rmfast import arguments
from rmfast.texts.chat import Chat, template_kwargs, template_tools
from rmfast.texts.forms import BATCH, FORMATS, Encoded, Format, Forms, Text

Truncation = Literal["left", "right", "error"]


class InputError(ValueError):
    """An input that cannot be scored: `index` is its position among the inputs, `reason` says why."""

    def __init__(self, index: int, reason: str):
        super().__init__(f"input {index}: {reason}")
        self.index = index
        self.reason = reason


def words(tokenizer: Any, ids: list[int]) -> list[str]:
    """The tokens of a text, each by itself; their ids where there is no tokenizer."""
    return [str(i) for i in ids] if tokenizer is None else [tokenizer.decode([i]) for i in ids]


def listed(inputs: Any) -> list[Any]:
    """A sequence of inputs as a list, by place (a pandas Series goes by labels); a tokenizer's batch as its rows.

    Raises TypeError for one bare input, whose characters or fields would be scored.
    """
    if isinstance(inputs, Mapping) and inputs.get("input_ids") is not None:
        rows = _rows(inputs)
        if rows is not None:
            return rows
    got = type(inputs).__name__
    if hasattr(inputs, "columns"):  # of pandas, Polars, Arrow: to iterate over it gives columns
        raise TypeError(
            f"Expected inputs to be a sequence of inputs, got a table, {got}; give its rows as records (dicts)"
        )
    if isinstance(inputs, Mapping):
        got += f" with {', '.join(map(str, inputs))}"
    elif not isinstance(inputs, str | bytes) and getattr(inputs, "ndim", 1) != 0 and hasattr(inputs, "__getitem__"):
        return list(inputs)
    raise TypeError(f"Expected inputs to be a sequence of inputs, got {got}; wrap one input in [ ]")


def _rows(batch: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The texts of a tokenizer's result as records; None for the result of one text."""
    names = [name for name in BATCH if batch.get(name) is not None]
    ids = batch["input_ids"]
    if getattr(ids, "ndim", 2) != 2 or (isinstance(ids, list | tuple) and any(isinstance(x, int) for x in ids)):
        return None
    sizes = {name: len(batch[name]) for name in names}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"Expected inputs with as many rows in each of {', '.join(names)}, got {sizes}")
    return [dict(zip(names, row)) for row in zip(*(batch[name] for name in names))]


def check_inputs(inputs: Any) -> list[Any]:
    """The inputs as a list. Raises TypeError for one bare input where a sequence of inputs belongs."""
    items = listed(inputs)
    first = items[0] if items else None
    if isinstance(inputs, tuple) and len(inputs) == 2 and all(isinstance(part, str) for part in inputs):
        got = "one pair of strings"
    elif isinstance(first, Mapping) and ("role" in first or "content" in first):
        got = "one list of messages"
    elif isinstance(first, int | np.integer) or (isinstance(first, torch.Tensor) and first.ndim == 0):
        got = "one sequence of token ids"
    else:
        return items
    raise TypeError(f"Expected inputs to be a sequence of inputs, got {got}; wrap one input in [ ]")


def several(inputs: Any) -> bool:
    """Whether inputs are several, not one of them: a string, a pair, chat messages, a record, token ids."""
    if isinstance(inputs, tuple):
        return False
    try:
        check_inputs(inputs)
    except TypeError:
        return False
    return True


def encode(
    inputs: Sequence[Any],
    tokenizer: Any,
    *,
    causal: bool,
    vocab_size: int,
    max_length: int | None = None,
    truncation: Truncation = "error",
    format: Format | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Any] | None = None,
    errors: Literal["raise", "return"] = "raise",
) -> list[Any]:
    """Encode every input.

    Args:
        inputs: (prompt, response) pairs, message lists, records, strings, token-id sequences or `Encoded`, in any
            mixture; or a tokenizer's result for several texts.
        tokenizer: a transformers tokenizer, or None where every input is token ids.
        causal: whether the model is a decoder. Pairs without a chat template are then concatenated; an encoder gets
            its tokenizer's pair encoding.
        vocab_size: rows of the embedding; an id outside is an error.
        max_length: most tokens of one input, or None for no limit.
        truncation: the side that is cut from an input over max_length, or "error".
        format: how pairs become text: None (as above), "chat", "pair" or "concat"; or a function of one input that
            returns an input.
        chat_template_kwargs: what the chat template is given beside the messages; a record's own come on top.
        tools: JSON schemas or functions for the chat template; a record's own go in their place.
        errors: "raise" the first `InputError`, or "return" each in the place of its result.

    Returns:
        A list with an `Encoded` for each input (or, with errors="return", its `InputError`).

    Raises:
        InputError: (a ValueError) an input is empty, of an unknown kind, too long, or has ids outside the vocabulary.
        TypeError, ValueError: the inputs or options themselves are wrong.
    """
    if max_length is not None:
        arguments.whole("max_length", max_length, 1)
    arguments.word("truncation", truncation, ("error", "left", "right"))
    if format is not None and not callable(format):
        arguments.word("format", format, FORMATS)
    arguments.word("errors", errors, ("raise", "return"))
    items = listed(inputs) if callable(format) else check_inputs(inputs)  # a function's inputs may be anything
    template_kwargs(chat_template_kwargs), template_tools(tools)  # what is wrong here is not one input's error
    forms = Forms(Chat(tokenizer, chat_template_kwargs, tools), causal, format)
    results: list[Any] = [None] * len(items)

    def attempt(index: int, function: Callable[[], Any]) -> Any:
        try:
            results[index] = function()
        except Exception as error:
            # Whatever goes wrong inside one input (a template's own checks, a user's format function, text that is
            # not valid Unicode) is that input's error.
            results[index] = error if isinstance(error, InputError) else InputError(index, _reason(error))
            results[index].__cause__ = None if results[index] is error else error

    for i, item in enumerate(items):
        attempt(i, partial(forms.read, item))
    tokenise(results, tokenizer, causal, attempt)
    if not _all_fit(results, vocab_size, max_length):  # one by one this takes 3 µs for each input
        for i, result in enumerate(results):
            if isinstance(result, Encoded):
                attempt(i, partial(_finish, result, i, vocab_size, max_length, truncation))
    bad = next((result for result in results if isinstance(result, InputError)), None)
    if bad is not None and errors == "raise":
        raise bad
    return results


def _reason(error: Exception) -> str:
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


def tokenise(results: list[Any], tokenizer: Any, causal: bool, attempt: Callable) -> None:
    """Replace every `Text` in results by its `Encoded`, in few calls (fast tokenizers run one call on all cores)."""
    groups: dict[tuple[bool, bool], list[int]] = {}
    for i, item in enumerate(results):
        if isinstance(item, Text):
            groups.setdefault((item.special, item.second is not None), []).append(i)

    for where in groups.values():
        texts = [results[i] for i in where]
        try:
            for i, encoded in zip(where, _call_tokenizer(tokenizer, texts, causal)):
                results[i] = encoded
        except Exception:  # one text spoils the call: find it
            for i, text in zip(where, texts):
                attempt(i, lambda text=text: _call_tokenizer(tokenizer, [text], causal)[0])


def ids_of(text: Text, tokenizer: Any) -> np.ndarray:
    """The token ids of one text, for a causal model."""
    return _call_tokenizer(tokenizer, [text], True)[0].ids


def _call_tokenizer(tokenizer: Any, texts: list[Text], causal: bool) -> list[Encoded]:
    if tokenizer is None:
        raise ValueError("text needs a tokenizer, and this model was given none; pass tokenizer=, or token ids")
    second = [text.second for text in texts] if texts[0].second is not None else None
    batch = tokenizer(
        [text.text for text in texts],
        second,
        add_special_tokens=texts[0].special,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        padding=False,
        truncation=False,
        verbose=False,  # lengths are checked here, with the input's index
    )
    types = batch.get("token_type_ids")
    out = []
    for i, (text, row) in enumerate(zip(texts, batch["input_ids"])):
        ids = np.asarray(row, dtype=np.int64)
        added = np.asarray(batch["special_tokens_mask"][i], dtype=bool)
        keep = ~_doubled(ids, added) if causal else np.ones(len(ids), dtype=bool)
        ids, fixed = ids[keep], added[keep]
        fixed[: _leading(ids, text.text, tokenizer)] = True
        type_ids = None if types is None else np.asarray(types[i], dtype=np.int64)[keep]
        out.append(Encoded(ids, type_ids, fixed, text.characters))
    return out


def _doubled(ids: np.ndarray, added: np.ndarray) -> np.ndarray:
    """(T,) bool: the special tokens that the tokenizer adds where the text has written the same (BOS, EOS) itself."""
    doubled = np.zeros(len(ids), dtype=bool)
    for end, inner in ((0, 1), (-1, -2)):
        if len(ids) > 1:
            doubled[end] |= added[end] and not added[inner] and ids[end] == ids[inner]
    return doubled


def _leading(ids: np.ndarray, text: str, tokenizer: Any) -> int:
    """How many tokens a leading BOS takes, with the white space before it."""
    bos = getattr(tokenizer, "bos_token", None)
    where = np.flatnonzero(ids == tokenizer.bos_token_id)
    if not bos or not len(where):
        return 0
    return int(where[0]) + 1 if where[0] == 0 or text.lstrip().startswith(bos) else 0


def _all_fit(results: list[Any], vocab_size: int, max_length: int | None) -> bool:
    """Whether `_finish` would give every input back as it is."""
    given = [result.ids for result in results if isinstance(result, Encoded)]
    lengths = [len(ids) for ids in given]
    if not given or min(lengths) == 0 or (max_length is not None and max(lengths) > max_length):
        return False
    ids = np.concatenate(given)
    return bool(ids.min() >= 0 and ids.max() < vocab_size)


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
    return replace(item, ids=item.ids[keep], types=types, fixed=fixed, cut=item.cut + int((~keep).sum()))


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


@contextmanager
def inputs_of(name: str) -> Iterator[None]:
    """Errors of inputs that are encoded here say which argument they are."""
    try:
        yield
    except InputError as error:
        raise InputError(error.index, f"(of {name}) {error.reason}") from error
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
