"""Preference pairs in the forms that data sets have them: what is scored, and the texts of prompt and responses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt: their texts, and both as `RewardModel.score` takes them (chosen, rejected).

    `row` is the mapping that it was read from, whatever else that has; empty for a triple.
    """

    prompt: str
    chosen: str
    rejected: str
    inputs: tuple[Any, Any]
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


def read_pairs(pairs: Iterable[Any]) -> list[Pair]:
    """Pairs from (prompt, chosen, rejected) triples or mappings with these keys, in any mixture.

    A mapping may also have tools and chat_template_kwargs, for the chat template.

    Prompt and responses are text or lists of messages ({"role", "content"}). Without a prompt (None, or no such key)
    chosen and rejected are whole texts or conversations, and what both begin with is the prompt: TRL's preference
    formats, standard and conversational, with explicit or implicit prompt.

    Raises:
        ValueError: a pair without both sides, or of another form; the message has its place among the pairs.
        TypeError: pairs is one pair, or nothing that holds pairs.
    """
    one = isinstance(pairs, str | Mapping) or (isinstance(pairs, tuple) and len(pairs) == 3 and is_side(pairs[1]))
    if one or not isinstance(pairs, Iterable):
        raise TypeError(
            "Expected pairs to be a sequence of (prompt, chosen, rejected) triples or of mappings with these keys, got "
            + ("one pair; wrap it in [ ]" if one and not isinstance(pairs, str) else type(pairs).__name__)
        )
    return [_pair(i, item) for i, item in enumerate(pairs)]


def _pair(index: int, item: Any) -> Pair:
    own: dict[str, Any] = {}
    if isinstance(item, Mapping):
        own = {name: item[name] for name in ("tools", "chat_template_kwargs") if item.get(name) is not None}
        prompt, chosen, rejected = (item.get(key) for key in ("prompt", "chosen", "rejected"))
    elif isinstance(item, list | tuple) and len(item) == 3:
        prompt, chosen, rejected = item
    else:
        got = f"{len(item)} entries" if isinstance(item, list | tuple) else type(item).__name__
        raise ValueError(
            f"pair {index}: expected (prompt, chosen, rejected), or a mapping with keys chosen, rejected and, unless "
            f"these hold it, prompt; got {got}"
        )
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not is_side(side):
            got = "it is empty or missing" if not side or isinstance(side, str) else f"got {type(side).__name__}"
            raise ValueError(f"pair {index} has no {name}: {got}; each pair needs both sides, as text or messages")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(f"pair {index}: expected chosen and rejected both as text or both as messages")
    if not (prompt is None or isinstance(prompt, str) or is_messages(prompt)):
        raise ValueError(f"pair {index}: expected prompt as text or messages, got {type(prompt).__name__}")
    whole = join(prompt, chosen), join(prompt, rejected)
    records = [{"prompt": prompt, "response": side, **own} for side in (chosen, rejected)]
    inputs = (records[0], records[1]) if own else whole
    if not isinstance(chosen, str) or prompt is None:  # whole texts or conversations: split where they part
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*whole)))
        shared = min(shared, *(len(side) - 1 for side in whole))  # a response is never empty
        while isinstance(chosen, str) and shared and not whole[0][shared - 1].isspace():
            shared -= 1  # responses that begin with "Yes" and "Yesterday" keep their first words
        prompt, chosen, rejected = whole[0][:shared], whole[0][shared:], whole[1][shared:]
    row = item if isinstance(item, Mapping) else {}
    return Pair(text_of(prompt), text_of(chosen), text_of(rejected), inputs, row)


def join(prompt: Any, response: Any) -> Any:
    """A prompt (text, messages or None) and a response (text or messages) as one input of `RewardModel.score`."""
    if prompt is None:
        return response
    if isinstance(response, str):
        return (prompt, response)
    if isinstance(prompt, list):
        return response if response[: len(prompt)] == prompt else [*prompt, *response]
    # Datasets with a text prompt often repeat it as the first turn of the conversation.
    return response if response[0].get("role") != "assistant" else [{"role": "user", "content": prompt}, *response]


def text_of(content: Any) -> str:
    """A text as it is; the contents of messages, and the text parts of a content of parts, with newlines between."""
    if isinstance(content, str):
        return content
    parts = [part.get("content") or part.get("text") or "" for part in content or []]
    return "\n".join(part if isinstance(part, str) else text_of(part) for part in parts)


def is_messages(value: Any) -> bool:
    """Whether it is a conversation of at least one message."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def is_side(value: Any) -> bool:
    """Whether it can be a response: text or messages, not empty."""
    return bool(value.strip()) if isinstance(value, str) else is_messages(value)
