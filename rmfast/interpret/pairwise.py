"""`Pairwise`: figures of each two of some things, as a table and a map; and their test by permutations."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from rmfast import arguments
from rmfast.plots import axes, heat_map, needed, shown_table
from rmfast.resampling import as_json

LEAST_PROMPTS = 20  # below, percentiles of a bootstrap say little


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Pairwise:
    """Figures of each two of some things, over the same prompts.

    Attributes:
        names: of the things.
        rows: for each two of them, in order, their names and figures, a NamedTuple.
        prompts: how many, each of which counts once.
        confidence: of the intervals.
    """

    measure: ClassVar[str] = "value"  # the figure that is drawn
    names: list[str]
    rows: Sequence[Any]
    prompts: int
    confidence: float

    def __getitem__(self, two: tuple[str, str]) -> Any:
        """The row of two of the names, in any order."""
        wanted = {arguments.word("each of a pair of names", name, self.names) for name in two}
        for row in self.rows:
            if {row.first, row.second} == wanted:
                return row
        raise KeyError(two)

    def matrix(self, figure: str | None = None) -> np.ndarray:
        """(D, D) of one figure, 1 on the diagonal for `measure`, else NaN."""
        figure = self.measure if figure is None else arguments.word("figure", figure, self.rows[0]._fields[2:])
        out = np.full((len(self.names),) * 2, np.nan)
        if figure == self.measure:
            np.fill_diagonal(out, 1)
        for row in self.rows:
            i, j = self.names.index(row.first), self.names.index(row.second)
            out[i, j] = out[j, i] = getattr(row, figure)
        return out

    def to_dataframe(self) -> Any:
        """The rows as a pandas DataFrame."""
        return needed("pandas", "to_dataframe").DataFrame(self.rows, columns=list(self.rows[0]._fields))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Rows and what they rest on as JSON; null for what is not defined."""
        about = {"names": self.names, "prompts": self.prompts, "confidence": self.confidence, **self._about()}
        rows = [as_json(row) for row in self.rows]
        text = json.dumps({**about, "rows": rows}, indent=2, allow_nan=False) + "\n"
        arguments.path("path", path).write_text(text, encoding="utf-8")

    def _about(self) -> dict[str, Any]:
        return {}

    def _head(self) -> list[str]:
        return [f"{type(self).__name__} over {self.prompts} prompts, intervals of {self.confidence:.0%}"]

    def __repr__(self) -> str:
        fields = self.rows[0]._fields
        cells = [[*fields], *([_cell(value) for value in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
        return "\n".join([*self._head(), *lines])

    def _repr_html_(self) -> str:
        """For notebooks: the rows as a table."""
        return shown_table(self.rows[0]._fields, self.rows, "; ".join(self._head()))

    def plot(self, figure: str | None = None, ax: Any = None) -> Any:
        """A map of one figure of each two (default `measure`), from −1 to 1; returns the axes."""
        size = 3.5 + 0.3 * len(self.names)
        ax = axes(ax, size + 1, size)
        heat_map(ax, self.matrix(figure), self.names, self.names, figure or self.measure, reach=1.0, aspect="equal")
        ax.set_ylabel("")
        return ax


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return "–" if math.isnan(value) else f"{value:.3g}"


def adjusted(observed: np.ndarray, shuffled: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """p values (m,) of |observed| (m,), each by itself, and over all of them together.

    Args:
        shuffled: the same figures under draws of the null, (b, m) at a time. Together they are held against the largest
            of a draw (Westfall and Young's single step), which keeps the chance of any false finding.
    """
    size = np.abs(observed)
    # What is as large but for rounding is as large.
    size = size - 1e-9 * np.maximum(size, 1e-300)
    alone, together, count = np.zeros(len(size)), np.zeros(len(size)), 0
    for some in shuffled:
        found = np.abs(some)
        alone += (found >= size).sum(0)
        together += (found.max(1, keepdims=True) >= size).sum(0)
        count += len(found)
    return (1 + alone) / (1 + count), (1 + together) / (1 + count)


def checked(confidence: Any, resamples: Any, permutations: Any, seed: Any) -> tuple[float, int, int, int]:
    """The arguments of intervals and tests, by name."""
    return (
        arguments.number("confidence", confidence, 0, 1, above=True, below=True),
        arguments.whole("resamples", resamples, 1),
        arguments.whole("permutations", permutations, 1),
        arguments.whole("seed", seed, 0),
    )


def expect_prompts(name: str, count: int) -> None:
    if count < LEAST_PROMPTS:
        raise ValueError(f"Expected {name} of at least {LEAST_PROMPTS} prompts, got {count}")
