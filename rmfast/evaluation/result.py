"""What an evaluation found: figures with their n and intervals, as a table, a plot, and in the leaderboards' shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from rmfast import arguments
from rmfast.evaluation.bootstrap import intervals
from rmfast.evaluation.layout import ALL, Item, Layout
from rmfast.plots import axes, needed, shown_table
from rmfast.resampling import clusters


class Figure(NamedTuple):
    """A figure with its interval from `low` to `high`, over `n` rows of `prompts` prompts; `ties` among them."""

    subset: str
    measure: str
    value: float
    low: float
    high: float
    n: int
    prompts: int
    ties: int


class Change(NamedTuple):
    """A figure of one model and of another on the same n rows, and the first less the second with its interval."""

    subset: str
    measure: str
    value: float
    other: float
    difference: float
    low: float
    high: float
    n: int
    prompts: int


R = TypeVar("R", Figure, Change)


@dataclass(frozen=True, eq=False)
class Table(Generic[R]):
    """Rows that are found by (subset, measure).

    Attributes:
        rows: the figures; of subset "all" those over several subsets.
        confidence: of the intervals.
    """

    rows: list[R]
    confidence: float

    def __getitem__(self, key: tuple[str, str]) -> R:
        for row in self.rows:
            if (row.subset, row.measure) == key:
                return row
        raise KeyError(key)

    def _repr_html_(self) -> str:
        """For notebooks: the rows as a table."""
        return shown_table(self.rows[0]._fields, self.rows, f"intervals of {self.confidence:.0%}")

    def to_dataframe(self) -> Any:
        """The rows as a pandas DataFrame; ImportError where pandas is not installed."""
        return needed("pandas", "to_dataframe").DataFrame(self.rows, columns=self.rows[0]._fields)

    def plot(self, ax: Any = None, *, beside: Mapping[str, Table[Any]] | None = None, label: str | None = None) -> Any:
        """A point and its interval for each row; returns the matplotlib Axes.

        Args:
            ax: the Axes to draw on; default a new figure.
            beside: other tables by name, whose rows of the same subset and measure are drawn beside these.
            label: what these are called, where there are others.

        Raises:
            ImportError: matplotlib is not installed.
        """
        ax = axes(ax, 7, min(12, 1.5 + 0.28 * len(self.rows)))
        tables: list[tuple[str | None, Table[Any]]] = [(label, self), *(beside or {}).items()]
        for place, (name, table) in enumerate(tables):
            shift = 0.3 * (place / max(1, len(tables) - 1) - 0.5) if len(tables) > 1 else 0.0
            points = []
            for at, row in enumerate(self.rows):
                points += [(at + shift, other) for other in table.rows if other[:2] == row[:2]]
            at_, value, low, high = np.array([(y, _main(row), row.low, row.high) for y, row in points]).T
            reach = np.nan_to_num(np.clip([value - low, high - value], 0, None))
            ax.errorbar(value, at_, xerr=reach, fmt="o", markersize=3.5, linewidth=1, capsize=2, label=name)
        ax.set_yticks(range(len(self.rows)), [f"{row.subset}: {row.measure}" for row in self.rows], fontsize=8)
        ax.invert_yaxis()
        ax.grid(axis="x", linewidth=0.4)
        if any(isinstance(row, Change) for row in self.rows):
            ax.axvline(0, color="0.5", linewidth=1)
        if any(name for name, _ in tables):
            ax.legend(fontsize=8)
        return ax


@dataclass(frozen=True, eq=False)
class Evaluation(Table[Figure]):
    """The figures of a model on a file. `str()` is a table, `minus` the paired differences to another model.

    Attributes:
        layout: of the file.
        items, scores: what was scored, and the (k,) scores of each.
        places: (n,) the place of each item in the file, from 0.
        left_out: rows of the file without scores.
        resamples, seed: of the bootstrap.
    """

    layout: Layout
    items: Sequence[Item] = field(repr=False)
    scores: Sequence[np.ndarray] = field(repr=False)
    places: np.ndarray = field(repr=False)
    left_out: int = 0
    resamples: int = 1000
    seed: int = 0

    def minus(self, other: Evaluation) -> Differences:
        """This model's figures less another's, on the rows that both have scored; resampled together.

        Raises:
            ValueError: the other evaluation is of another file or layout, or they have no row in common.
        """
        arguments.instance("other", other, Evaluation)
        both = np.intersect1d(self.places, other.places)
        mine, theirs = (
            [dict(zip(side.places.tolist(), range(len(side.items))))[place] for place in both.tolist()]
            for side in (self, other)
        )
        items = [self.items[i] for i in mine]
        same = all(
            (a.subset, a.prompt, a.correct, a.id) == (b.subset, b.prompt, b.correct, b.id)
            for a, b in zip(items, (other.items[i] for i in theirs))
        )
        if not len(both) or not same or other.layout != self.layout:
            raise ValueError("Expected evaluations of the same file, to be subtracted row by row")
        first = self.layout.measures(items, [self.scores[i] for i in mine])
        second = self.layout.measures(items, [other.scores[i] for i in theirs])
        of = clusters([item.prompt for item in items])
        once = np.ones((1, len(items)))
        changes = [_less(a.value, b.value) for a, b in zip(first, second)]
        places = [measure.where for measure in first]
        low, high = intervals(changes, of, self.resamples, self.confidence, self.seed, places, differences=True)
        rows = [
            Change(
                a.subset, a.measure, float(a.value(once)[0]), float(b.value(once)[0]), float(change(once)[0]),
                float(start), float(end), int(a.where.sum()), len(set(of[a.where])),
            )
            for a, b, change, start, end in zip(first, second, changes, low, high)
        ]  # fmt: skip
        return Differences(rows, self.confidence)

    def leaderboard(self, model: str, chat_template: str = "tokenizer") -> dict[str, Any]:
        """The figures as reward-bench's results have them: one number for each subset, and the sections or scores.

        Of subsets with several figures "Subset: measure"; a Ties score and a file's own score go by their subset.
        """
        found: dict[str, Any] = {"model": model, "model_type": "Seq. Classifier", "chat_template": chat_template}
        for row in self.rows:
            plain = row.measure in ("accuracy", "section", "score")
            found[row.subset if plain and row.subset not in found else f"{row.subset}: {row.measure}"] = row.value
        return found

    def leaderboard_scores(self, model: str, chat_template: str = "tokenizer") -> dict[str, Any]:
        """The scores of all rows as columns, as reward-bench's results have them, but for the texts."""
        columns = self.layout.columns(self.items, self.scores)
        return {**columns, "model": model, "model_type": "Seq. Classifier", "chat_template": chat_template}

    def __str__(self) -> str:
        names = ["subset", "measure", "value", f"{self.confidence:.0%} interval", "n", "prompts", "ties"]
        cells = [
            [r.subset, r.measure, _shown(r.value), f"[{_shown(r.low)}, {_shown(r.high)}]", *map(str, r[5:])]
            for r in self.rows
        ]
        more = f", {self.left_out} rows left out" if self.left_out else ""
        return "\n".join([f"{self.layout.name}: {len(self.items)} rows{more}", *lined([names, *cells])])


@dataclass(frozen=True, eq=False)
class Differences(Table[Change]):
    """The figures of two models on the same rows, and their differences; `str()` is a table."""

    def __str__(self) -> str:
        names = ["subset", "measure", "value", "against", "difference", f"{self.confidence:.0%} interval", "n"]
        cells = [
            [
                r.subset, r.measure, _shown(r.value), _shown(r.other),
                *(_signed(r.difference), f"[{_signed(r.low)}, {_signed(r.high)}]", str(r.n)),
            ]
            for r in self.rows
        ]  # fmt: skip
        return "\n".join(lined([names, *cells]))


def figures(layout: Layout, items: Sequence[Item], scores: Sequence[np.ndarray], **bootstrap: Any) -> list[Figure]:
    """The figures of a layout, with intervals of a bootstrap over prompts (resamples, confidence, seed)."""
    found = layout.measures(items, scores)
    if len({(measure.subset, measure.measure) for measure in found}) < len(found):
        raise ValueError(
            f"Expected data without a subset called {ALL!r}, which figures over several subsets are called"
        )
    of = clusters([item.prompt for item in items])
    once = np.ones((1, len(items)))
    places = [measure.where for measure in found]
    low, high = intervals([measure.value for measure in found], of, **bootstrap, where=places)
    return [
        Figure(
            m.subset, m.measure, float(m.value(once)[0]), float(start), float(end), int(m.where.sum()),
            len(set(of[m.where])), int(m.ties[m.where].sum()),
        )
        for m, start, end in zip(found, low, high)
    ]  # fmt: skip


def _less(first: Any, second: Any) -> Any:
    return lambda weights: first(weights) - second(weights)


def _main(row: Figure | Change) -> float:
    return row.difference if isinstance(row, Change) else row.value


def _shown(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4f}"


def _signed(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:+.4f}"


def lined(cells: list[list[str]]) -> list[str]:
    """Rows in columns: the first two begin on the left, numbers end on the right."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    return [
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in cells
    ]
