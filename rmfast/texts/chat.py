"""Conversations: messages that are checked, and the text that a tokenizer's chat template makes of them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# What may stand in a message without content: the columns of chat APIs for turns that call tools or only think.
_INSTEAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
# What `Chat.render` gives itself, and what is done with the text, which is tokenised with those of all inputs.
_RESERVED = (
    "conversation", "messages", "tools", "tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask",
    "sanitize_control_tokens", "tokenizer_kwargs", "padding", "truncation", "max_length",
)  # fmt: skip


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template, and what it is given beside the messages.

    `kwargs` is a mapping and `tools` a list of JSON schemas or functions; both may be JSON, as data sets hold them.
    """

    tokenizer: Any
    kwargs: Mapping[str, Any] | str | None = None
    tools: Any = None

    @property
    def templated(self) -> bool:
        return getattr(self.tokenizer, "chat_template", None) is not None

    def of(self, record: Mapping[str, Any]) -> Chat:
        """With what a record says of its own in chat_template_kwargs and tools."""
        kwargs, tools = record.get("chat_template_kwargs"), record.get("tools")
        merged = self.kwargs if kwargs is None else {**template_kwargs(self.kwargs), **template_kwargs(kwargs)}
        return Chat(self.tokenizer, merged, self.tools if tools is None else tools)

    def render(self, messages: Any, **more: Any) -> str:
        """The template's text. Raises ValueError, or whatever the template does."""
        if not self.templated:
            raise ValueError("messages need a tokenizer with a chat template; give format= a function, or token ids")
        given = {"tools": template_tools(self.tools), **template_kwargs(self.kwargs), **more}
        given = {name: value for name, value in given.items() if value is not None}
        return self.tokenizer.apply_chat_template(
            list(map(_checked, range(len(messages)), messages)), **given, tokenize=False
        )


def template_kwargs(given: Any) -> dict[str, Any]:
    """chat_template_kwargs as a dict. Columns of Parquet fill what other rows have with None, which is left out."""
    found = {} if given is None else _loaded("chat_template_kwargs", given)
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"Expected chat_template_kwargs to be a mapping of names to values, got {given!r}")
    if reserved := [name for name in _RESERVED if name in found]:
        raise ValueError(
            f"Expected chat_template_kwargs without {', '.join(reserved)}, which it can't change (tools have "
            f"an argument of their own), got {given!r}"
        )
    return {name: _plain(value) for name, value in found.items() if value is not None}


def template_tools(given: Any) -> list[Any] | None:
    found = None if given is None else _plain(_loaded("tools", given))
    if isinstance(found, tuple):
        found = list(found)
    if found is not None and not (
        isinstance(found, list) and all(isinstance(t, Mapping) or callable(t) for t in found)
    ):
        raise ValueError(f"Expected tools to be a list of JSON schemas or functions, got {given!r}")
    return found


def _loaded(name: str, given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        raise ValueError(f"Expected {name} to be JSON where it is a string, got {given!r}") from None


def _plain(value: Any) -> Any:
    """With lists and numbers of Python's for NumPy's, which pandas makes of Parquet's and no template knows."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def is_messages(value: Any) -> bool:
    """Whether a value is meant as a conversation; `Chat.render` says what is wrong with one."""
    if isinstance(value, np.ndarray) and not value.ndim:
        return False
    return (
        isinstance(value, list | tuple | np.ndarray) and len(value) > 0 and all(isinstance(m, Mapping) for m in value)
    )


def messages_in(text: str) -> list[Any] | None:
    """The conversation that a text writes out, as JSON or as Python's repr; None where it is ordinary text.

    Raises ValueError for one that neither reads (NumPy's, which has no commas, or one that was cut short).
    """
    if not re.match(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""", text):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return found if is_messages(found) and all("role" in m or "from" in m for m in found) else None
    raise ValueError("begins like a list of messages, but neither JSON nor Python reads it")


def characters_of(message: Mapping[str, Any]) -> int:
    """Of a message, whose content may also come in parts."""
    content = message.get("content")
    parts = [content] if isinstance(content, str) or content is None else content
    return sum(len(part if isinstance(part, str) else part.get("text") or "") for part in parts if part is not None)


def _checked(place: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates take it, without what is None. One without role or content would render as nothing."""
    found = {name: _plain(value) for name, value in message.items() if value is not None}
    role, content = found.get("role"), found.get("content")
    if not (isinstance(role, str) and role) or (content is None and not any(found.get(name) for name in _INSTEAD)):
        lacking = "content" if isinstance(role, str) and role else "role"
        raise ValueError(f"its message {place} has no {lacking}: expected role and content, got {', '.join(found)}")
    if isinstance(content, list | tuple):
        found["content"] = [_part(place, part) for part in content]
    elif not isinstance(content, str | None):
        raise ValueError(f"its message {place} has content {content!r}: expected text, or a list of parts")
    return found


def _part(place: int, part: Any) -> Any:
    """Of a content: Parquet fills the keys that other parts have with None, and templates ask which keys are there."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f"its message {place} has the part {part!r} in its content: expected text, or a mapping")
    found = {name: value for name, value in part.items() if value is not None}
    if found.get("type", "text") == "text" and not isinstance(found.get("text"), str):
        raise ValueError(f"its message {place} has a part without text in its content, {dict(part)!r}")
    return found
