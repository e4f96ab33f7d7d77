"""The forms of an input (pairs, conversations, records, strings, token ids), and the text that each becomes.

What is wrong with an input is a ValueError here, without its place among the inputs.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from rmfast.texts.chat import Chat, characters_of, is_messages
from rmfast.texts.pairs import join

Format = Literal["chat", "pair", "concat"] | Callable[[Any], Any]
FORMATS = ("chat", "pair", "concat")
_RECORDS = ("input_ids", "messages", "response", "text")  # by the first that one has; a prompt may go with a response
BATCH = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True, eq=False)
class Encoded:
    """One input, ready to score: `ids` (T,) int64, and `types` (T,) int64 where an encoder's tokenizer makes them."""

    ids: np.ndarray
    types: np.ndarray | None = None
    fixed: np.ndarray | None = None  # (T,) bool: tokens that truncation keeps (BOS, [CLS], [SEP], ...); None for ids
    characters: int | None = None  # of the response, before truncation; None for an input of token ids
    cut: int = 0  # tokens that truncation took

    def __len__(self) -> int:
        return len(self.ids)

    def ending_in(self, token: int) -> Encoded:
        """A text with a token at its end, once; token ids as they are."""
        if self.fixed is None or self.ids[-1] == token:
            return self
        return replace(self, ids=np.append(self.ids, token), fixed=np.append(self.fixed, True))


@dataclass(frozen=True)
class Text:
    """Text to tokenise: one string, or two for the tokenizer's own pair encoding."""

    text: str
    second: str | None = None
    characters: int | None = None  # of the response: a pair's second, the last message, or all of a string
    special: bool = True  # whether the tokenizer adds its special tokens: a chat template has written its own


@dataclass(frozen=True)
class Forms:
    """How inputs are read: see `rmfast.texts.inputs.encode` for the attributes."""

    chat: Chat
    causal: bool
    format: Format | None = None

    def read(self, item: Any) -> Text | Encoded:
        """An input as token ids, or as the text that will be tokenised."""
        forms, item = self._plain(item)
        if isinstance(item, Encoded):
            return item
        if isinstance(item, str):
            return _text(item, len(item))
        if isinstance(item, tuple):
            return forms._pair(*item)
        return _text(forms.chat.render(item), characters_of(item[-1]), special=False)

    def prompt(self, item: Any) -> Text | None:
        """An input without its response; None where it doesn't say which part that is."""
        forms, item = self._plain(item)
        if isinstance(item, tuple):
            prompt = item[0]
            return Text(prompt) if forms._kind(prompt) != "chat" else forms.opening(_turns(prompt))
        if isinstance(item, list) and item[-1].get("role") == "assistant" and len(item) > 1:
            return forms.opening(item[:-1])
        return None

    def opening(self, prompt: Any) -> Text:
        """A prompt alone: text, or messages with the template's header of the response."""
        if isinstance(prompt, str):
            return Text(prompt)
        return Text(self.chat.render(prompt, add_generation_prompt=True, continue_final_message=None), special=False)

    def _plain(self, item: Any) -> tuple[Forms, Any]:
        """An input as `Encoded`, a string, a tuple of a prompt and a response's text, or a list of messages."""
        if callable(self.format):
            return replace(self, format=None)._plain(self.format(item))
        if isinstance(item, np.ndarray) and item.dtype.kind not in "iu":  # of strings, or of objects (messages)
            item = item.tolist()
        if isinstance(item, Encoded):
            return self, item
        if isinstance(item, Mapping):
            return replace(self, chat=self.chat.of(item)), self._record(item)
        if (ids := _as_ids(item)) is not None:
            return self, Encoded(ids)
        if isinstance(item, str):
            return self, str(item)  # NumPy's strings are no strings to tokenizers
        if isinstance(item, list | tuple):
            if len(item) == 0:
                raise ValueError("it is empty")
            if is_messages(item):
                return self, list(item)
            # A list of two lists may as well be two conversations.
            if len(item) == 2 and (isinstance(item, tuple) or any(isinstance(part, str) for part in item)):
                return self, _joined(*item)
        got = f"{type(item).__name__}" + (f" of {len(item)}" if isinstance(item, list | tuple) else "")
        raise ValueError(
            "expected a string, a (prompt, response) pair, a list of messages, a record with one of the keys "
            f"{', '.join(_RECORDS)}, or a sequence of token ids, got {got}"
        )

    def _record(self, record: Mapping[str, Any]) -> Any:
        there = [key for key in _RECORDS if key in record]
        key = next((key for key in there if record[key] is not None), there[0] if there else None)
        if key == "input_ids":
            return _unpadded(*(record.get(name) for name in BATCH))
        if key == "response" and record.get("prompt") is not None:
            return _joined(record["prompt"], record["response"])
        if key is None or (key == "messages" and not is_messages(record[key])):
            expected = f"with one of the keys {', '.join(_RECORDS)}" if key is None else "with a list of messages"
            got = ", ".join(map(str, record)) if key is None else reprlib.repr(record[key])
            raise ValueError(f"expected a record {expected}, got {got}")
        if key == "text" and not isinstance(record[key], str):
            raise ValueError(f"its text is {reprlib.repr(record[key])}: expected text")
        return _side(key, record[key])

    def _kind(self, prompt: Any) -> str:
        """What a pair with this prompt becomes."""
        if self.format is not None:
            return str(self.format)
        return "chat" if self.chat.templated or not isinstance(prompt, str) else "concat" if self.causal else "pair"

    def _pair(self, prompt: Any, response: str) -> Text:
        kind = self._kind(prompt)
        if kind == "chat":
            if prompt == "" and not response:
                raise ValueError("it is empty")
            turns = [*_turns(prompt), {"role": "assistant", "content": response}]
            return _text(self.chat.render(turns), len(response), special=False)
        if not isinstance(prompt, str):
            raise ValueError(f"with format={kind!r} the prompt must be a string, got {type(prompt).__name__}")
        if kind == "concat":
            return _text(prompt + response, len(response))
        if not prompt and not response:
            raise ValueError("it is empty")
        return Text(prompt, response, len(response))


def _text(text: str, characters: int, special: bool = True) -> Text:
    if not text:
        raise ValueError("it is empty")
    return Text(text, None, characters, special)


def _turns(prompt: Any) -> list[Any]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _joined(prompt: Any, response: Any) -> Any:
    """A prompt and a response, each text or messages: a tuple where the response is text, else a conversation."""
    return join(_side("prompt", prompt), _side("response", response))


def _side(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return str(value)
    if is_messages(value):
        return list(value)
    raise ValueError(f"its {name} is {reprlib.repr(value)}: expected text or a list of messages")


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
    # By the kinds that occur, not by element: a text of 20 ids takes 1 µs, not 4.
    if any(issubclass(kind, bool) or not issubclass(kind, int | np.integer) for kind in set(map(type, item))):
        return None
    try:
        return np.asarray(item, dtype=np.int64)
    except OverflowError:
        raise ValueError(f"token id {reprlib.repr(max(item, key=abs))} is outside of any vocabulary") from None


def _unpadded(ids: Any, mask: Any, types: Any) -> Encoded:
    """A tokenizer's result for one text, without what its attention mask leaves out at the ends."""
    found = _whole("input_ids", ids, None)
    kept = np.ones_like(found) if mask is None else _whole("attention_mask", mask, len(found))
    if not np.isin(kept, (0, 1)).all() or (np.diff(np.flatnonzero(kept)) > 1).any():
        raise ValueError(f"its attention_mask is {kept.tolist()}: expected 1 for its tokens and 0 for pads at the ends")
    keep = kept == 1
    return Encoded(found[keep], None if types is None else _whole("token_type_ids", types, len(found))[keep])


def _whole(name: str, given: Any, length: int | None) -> np.ndarray:
    row = given[0] if getattr(given, "ndim", 1) == 2 and len(given) == 1 else given  # a batch of one text
    # An empty list has no ints that would say what it is.
    array = np.zeros(0, np.int64) if isinstance(row, list) and not row else _as_ids(row)
    if array is None:
        raise ValueError(f"its {name} is {reprlib.repr(given)}: expected a sequence of whole numbers")
    if length not in (None, len(array)):
        raise ValueError(f"its {name} has length {len(array)}, its input_ids {length}")
    return array
