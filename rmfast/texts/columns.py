"""What the rows of a table hold, by the names of its columns: texts, conversations, responses to prompts, pairs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from rmfast.texts.chat import is_messages, messages_in
from rmfast.texts.tables import Row

Columns = Literal["pairs", "response", "messages", "text"]


@dataclass(frozen=True)
class Names:
    """How a table calls its columns."""

    prompt: str = "prompt"
    response: str = "response"
    chosen: str = "chosen"
    rejected: str = "rejected"
    messages: str = "messages"
    text: str = "text"

    def of(self, mode: Columns) -> tuple[str, ...]:
        """Those that a row must have; a pair may have a prompt besides."""
        found: dict[Columns, tuple[str, ...]] = {
            "pairs": (self.chosen, self.rejected),
            "messages": (self.messages,),
            "response": (self.prompt, self.response),
            "text": (self.text,),
        }
        return found[mode]


class BadRow(ValueError):
    """A row that can't be scored; the message says why."""


def cell_of(row: Row, column: str, parse: bool = False) -> Any:
    """The text or messages in a column, which in CSV are written out; with `parse` they may be elsewhere. Or BadRow."""
    if column not in row.data:
        raise BadRow(f"column {column!r} is missing")
    cell = row.data[column]
    if cell is None or cell == [] or (isinstance(cell, str) and not cell.strip()):
        raise BadRow(f"column {column!r} is empty")
    if isinstance(cell, str) and (parse or not row.typed):
        try:
            written = messages_in(cell)
        except ValueError as error:
            raise BadRow(f"column {column!r} {error}") from None
        if written is None and parse:
            raise BadRow(f"column {column!r} holds no list of messages")
        cell = cell if written is None else written
    if is_messages(cell):
        return cell
    if not isinstance(cell, str):
        raise BadRow(f"column {column!r} holds neither text nor messages but {type(cell).__name__}")
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"column {column!r} is not valid Unicode: {error.reason}") from None
    return cell


def template_columns(row: Row) -> dict[str, Any]:
    """What a row says for the chat template; written out as JSON where it is text."""
    names = ("tools", "chat_template_kwargs")
    return {name: row.data[name] for name in names if row.data.get(name) not in (None, "")}


def mode_of(columns: Iterable[str], names: Names, hint: str) -> Columns:
    """What rows with these columns hold. Raises ValueError, with a hint, where they hold nothing that is known."""
    found = list(columns)
    modes: tuple[Columns, ...] = ("pairs", "messages", "response", "text")
    for mode in modes:
        if all(name in found for name in names.of(mode)):
            return mode
    expected = " or ".join("+".join(names.of(mode)) for mode in modes)
    raise ValueError(f"Expected columns {expected}, got {', '.join(found) or 'none'}; {hint}")


def inputs_of(row: Row, mode: Columns, names: Names) -> list[Any]:
    """The row's texts, as a model takes them: one, or two for a pair. Raises BadRow."""
    own = template_columns(row)
    if mode == "pairs":
        prompt = cell_of(row, names.prompt) if row.data.get(names.prompt) is not None else None
        sides = [cell_of(row, column) for column in names.of(mode)]
        return [{"prompt": prompt, "response": side, **own} for side in sides]
    if mode == "response":
        return [{"prompt": cell_of(row, names.prompt), "response": cell_of(row, names.response), **own}]
    (column,) = names.of(mode)
    cell = cell_of(row, column, parse=mode == "messages")
    if isinstance(cell, str) != (mode == "text"):
        raise BadRow(f"column {column!r} holds {'messages' if mode == 'text' else 'no list of messages'}")
    return [cell if mode == "text" else {"messages": cell, **own}]
