"""Rows of a file as what a model scores: the cells of a row, and the columns that a file has and gains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

from rmfast.cli.options import Options
from rmfast.texts.columns import BadRow, Columns, Names, cell_of, inputs_of, mode_of, template_columns
from rmfast.texts.files import Source
from rmfast.texts.tables import Row, read_rows


@contextlib.contextmanager
def located(row: Row, path: Path) -> Iterator[None]:
    """Says of a bad row where it is."""
    try:
        if row.error:
            raise BadRow(row.error)
        yield
    except BadRow as error:
        raise BadRow(f"{path.name}, line {row.line}: {error}") from None


class RowLayout(Protocol):
    """What the rows of an input hold, and the columns that they gain."""

    def new_columns(self) -> list[str]: ...
    def inputs(self, row: Row) -> list[Any]: ...
    def cells(self, model: Any, row: Row, results: list[tuple[Any, Any]]) -> dict[str, Any]: ...


class Layout:
    """Texts, conversations, prompts with responses, or pairs, by the names of columns."""

    def __init__(self, options: Options, source: Source, kind: str, column: str, tokens: bool) -> None:
        """Choose the mode by the columns of the first readable row, and see that the new columns are free."""
        self.options, self.column, self.tokens = options, column, tokens
        self.names = Names(**{field.name: getattr(options, f"{field.name}_column") for field in fields(Names)})
        self.cuts = options.truncation != "error"
        self.mode: Columns | None = options.columns
        data = next((row.data for row in read_rows(source, kind) if not row.error), None)
        if data is None:
            return
        if self.mode is None:
            self.mode = self._mode_of(data)
        if taken := self._taken(data):
            raise ValueError(
                f"Expected the new column {taken[0]!r} not to be in the input: rename that, or see --output-column"
            )

    def new_columns(self) -> list[str]:
        """Those that every written row has beside its own, but for `error`."""
        names = [self.column, *(["tokens", "token_ids"] if self.tokens else []), *(["truncated"] if self.cuts else [])]
        return [name + suffix for name in names for suffix in self._suffixes()]

    def inputs(self, row: Row) -> list[Any]:
        """The row's texts, as the model takes them: one, or two for a pair. Raises BadRow."""
        if row.error:
            raise BadRow(row.error)
        if taken := self._taken(row.data):  # rows of JSONL may differ in their columns
            raise BadRow(f"has a column {taken[0]!r} of its own: give another --output-column")
        assert self.mode is not None
        return inputs_of(row, self.mode, self.names)

    def cells(self, model: Any, row: Row, results: list[tuple[Any, Any]]) -> dict[str, Any]:
        """The new columns of a row, from (encoded input, reward) of its texts."""
        cells = {self.column + suffix: result for suffix, (_, result) in zip(self._suffixes(), results, strict=True)}
        for suffix, (item, _) in zip(self._suffixes(), results, strict=True):
            if self.cuts:
                cells["truncated" + suffix] = item.cut > 0
            if self.tokens:
                ids = item.ids.tolist()
                cells["tokens" + suffix] = model.tokenizer.convert_ids_to_tokens(ids)
                cells["token_ids" + suffix] = ids
        return cells

    def _mode_of(self, data: dict[str, Any]) -> Columns:
        return mode_of(data, self.names, "--prompt-column, --response-column and the like say what yours are called")

    def _taken(self, data: dict[str, Any]) -> list[str]:
        """The new columns that a row already has."""
        new = [*self.new_columns(), "error"] if self.options.on_error == "null" else self.new_columns()
        return sorted(set(data) & set(new))

    def _suffixes(self) -> tuple[str, ...]:
        return ("_chosen", "_rejected") if self.mode == "pairs" else ("",)


def preference(row: Row, path: Path, columns: Iterable[str] = ()) -> dict[str, Any]:
    """The pair of one row, with the prompt where there is one, and with such of some other columns as it has."""
    with located(row, path):
        sides = {name: cell_of(row, name) for name in ("chosen", "rejected")}
        own = {**template_columns(row), **{name: row.data[name] for name in columns if name in row.data}}
        return (
            {**own, **sides} if row.data.get("prompt") is None else {**own, "prompt": cell_of(row, "prompt"), **sides}
        )
