"""Items of responses to one prompt, two of each name: what is measured on several dimensions or biases takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rmfast import arguments
from rmfast.texts.pairs import is_messages, is_side

Item = tuple[Any, dict[str, tuple[Any, Any]]]  # a prompt, and two responses by name


def read_named_pairs(items: Iterable[Any], name: str, sides: tuple[str, str]) -> list[Item]:
    """Items (prompt, {name: (one, other)}) of responses to one prompt, two of each name; text or messages.

    Raises:
        ValueError: an item of another form, with its place; `name` and `sides` say what is expected.
        TypeError: items is nothing that holds some in an order.
    """
    two = f"({', '.join(sides)})"
    expected = f"(prompt, {{{name}: {two}}})"
    found = []
    for i, item in enumerate(arguments.sequence("items", items, f"a sequence of {expected}")):
        if not (isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[1], Mapping) and item[1]):
            raise ValueError(f"Expected item {i} to be {expected}, got {arguments.shown(item)}")
        prompt, named = item
        if not (isinstance(prompt, str) or is_messages(prompt)):
            raise ValueError(f"Expected the prompt of item {i} as text or messages, got {arguments.shown(prompt)}")
        for key, responses in named.items():
            if not isinstance(key, str):
                raise ValueError(f"Expected {name} in item {i} to be text, got {arguments.shown(key)}")
            if not (isinstance(responses, list | tuple) and len(responses) == 2 and all(map(is_side, responses))):
                raise ValueError(f"Expected {two} of {key!r} in item {i}, got {arguments.shown(responses)}")
        found.append((prompt, {key: (first, second) for key, (first, second) in named.items()}))
    if not found:
        raise ValueError(f"Expected items to be {expected} each, got none")
    return found
