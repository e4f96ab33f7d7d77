"""A batch of somebody else's table as new columns of it: rewards, or rewards at every token, and what was wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from rmfast import arguments
from rmfast.texts.columns import BadRow, Columns, Names, inputs_of, mode_of
from rmfast.texts.tables import Row

METHODS = {"score": "reward", "token_values": "values"}
_ENCODING = ("max_length", "truncation", "format", "chat_template_kwargs", "tools")


def columns_of(given: Any, present: Iterable[str]) -> tuple[Columns, Names]:
    """What rows hold, and how their table calls its columns.

    Args:
        given: the columns to score, of prompt, response, chosen, rejected, messages, text; a mapping from these to the
            table's own names; None for those of these names that the table has.
        present: the table's.

    Raises:
        ValueError, TypeError: they say nothing that is known, or the table has no such columns.
    """
    present, known = list(present), [each.name for each in fields(Names)]
    if given is None:
        return mode_of(present, Names(), 'say which with columns={"prompt": "its name", ...}'), Names()
    if not isinstance(given, Mapping):
        given = {name: name for name in arguments.words("columns", given, known)}
    arguments.words("columns", list(given), known)
    for theirs in given.values():
        if arguments.instance("a column", theirs, str) not in present:
            raise ValueError(f"Expected columns to be of {', '.join(present)}, got {theirs}")
    of: dict[str, str] = dict(given)
    mode = mode_of(of, Names(), "these are not columns that are scored together")
    return mode, Names(**{name: of.get(name, "") for name in known})  # a prompt of pairs only where it is given


@dataclass(frozen=True)
class Batches:
    """How batches of a table gain columns.

    Attributes:
        mode, names: as `columns_of` gives them.
        column: the new one; of pairs its names end in _chosen and _rejected.
        method: "score" or "token_values".
        on_error: "column" for null and the reason in a column `error`, "raise" for an error.
        options: of `RewardModel.score`.
    """

    mode: Columns
    names: Names
    column: str
    method: str = "score"
    on_error: Literal["column", "raise"] = "column"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rewards(self) -> list[str]:
        """The new columns of numbers."""
        return [self.column + end for end in (("_chosen", "_rejected") if self.mode == "pairs" else ("",))]

    def expect_new(self, present: Iterable[str]) -> None:
        """ValueError where the table has a column that would be written."""
        new = [*self.rewards, *(["error"] if self.on_error == "column" else [])]
        if taken := sorted(set(present) & set(new)):
            raise ValueError(f"Expected the new column {taken[0]!r} not to be in the table: give another column=")

    def score(self, rm: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        """The new columns of these rows, each as long as they are.

        Raises ValueError at the first bad row, with on_error="raise".
        """
        errors: dict[int, str] = {}
        given: list[tuple[int, Any]] = []  # (row, input)
        for number, row in enumerate(rows):
            try:
                given += [(number, item) for item in inputs_of(Row(number, dict(row)), self.mode, self.names)]
            except BadRow as error:
                errors[number] = str(error)
        encoding = {name: value for name, value in self.options.items() if name in _ENCODING}
        running = {name: value for name, value in self.options.items() if name not in _ENCODING}
        encoded = rm.encode([item for _, item in given], errors="return", **encoding)
        texts = []
        for (number, _), item in zip(given, encoded, strict=True):
            if isinstance(item, Exception):
                errors.setdefault(number, getattr(item, "reason", str(item)))
            else:
                texts.append((number, item))
        found: dict[int, list[Any]] = {}
        for number, value in self._run(rm, texts, errors, running):
            if not np.isfinite(value).all():
                errors.setdefault(number, f"its {self.column} is not finite")
            found.setdefault(number, []).append(value.tolist())
        if errors and self.on_error == "raise":
            number = min(errors)
            raise ValueError(f"row {number} of a batch of {len(rows)}: {errors[number]}")
        none = [None] * len(self.rewards)
        cells = [none if number in errors else found[number] for number in range(len(rows))]
        new: dict[str, list[Any]] = {name: [row[i] for row in cells] for i, name in enumerate(self.rewards)}
        return new if self.on_error == "raise" else {**new, "error": [errors.get(i) for i in range(len(rows))]}

    def _run(
        self, rm: Any, texts: list[tuple[int, Any]], errors: dict[int, str], running: dict[str, Any]
    ) -> list[tuple[int, Any]]:
        """(row, value) of each text that has one; `errors` gains the rows that the model refuses."""
        while True:
            good = [(number, item) for number, item in texts if number not in errors]
            try:
                values = getattr(rm, self.method)([item for _, item in good], **running) if good else []
            except ValueError as error:
                if not hasattr(error, "index"):
                    raise
                # An InputError that `encode` can't foresee: a text without the token that `pooling` names.
                errors[good[error.index][0]] = getattr(error, "reason", str(error))
                continue
            return [(number, value.numpy()) for (number, _), value in zip(good, values, strict=True)]
