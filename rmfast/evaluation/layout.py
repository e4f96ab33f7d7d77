"""What a benchmark's file is to an evaluation: items to score, and figures as functions of weights of the items."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rmfast.engine.scorer import Scorer

Value = Callable[[np.ndarray], np.ndarray]  # of weights (B, n) of the items: (B,)
ALL = "all"  # the subset of figures over several


@dataclass(frozen=True)
class Item:
    """One row of a file.

    Attributes:
        subset: by which figures are told apart.
        prompt: what items of one cluster share: they are drawn together by the bootstrap.
        inputs: the texts to score, as `RewardModel.score` takes them.
        correct: so many of them, from the first on, are right (of styles: are chosen); of a solution, its steps.
        id: the row's own, or None.
        label: of steps, the index of the first wrong one, −1 for none.
    """

    subset: str
    prompt: str
    inputs: tuple[Any, ...]
    correct: int = 1
    id: Any = None
    label: int | None = None


@dataclass(frozen=True)
class Measure:
    """A figure: `value` of weights, over the items `where` (n,) bool, of which `ties` (n,) counts the ties of each."""

    subset: str
    measure: str
    value: Value
    where: np.ndarray
    ties: np.ndarray


class Layout(ABC):
    """The layout of a benchmark's rows, and its formulas.

    Attributes:
        name: of the layout.
        method: of the model, that makes the scores.
    """

    name: str
    method = "score"

    @abstractmethod
    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row's columns are those of this layout."""

    @abstractmethod
    def item(self, row: Mapping[str, Any]) -> Item:
        """The row's texts. Raises ValueError for one that differs from the layout."""

    def expect(self, rm: Scorer) -> None:
        """ValueError for a model that can't score such items."""
        expect_one_reward(rm)

    def count(self, item: Item) -> int:
        """How many scores an item has."""
        return len(item.inputs)

    def arguments(self, rm: Scorer) -> dict[str, Any]:
        """What the model's method is given beside the texts."""
        return {}

    def scores_of(self, results: Sequence[Any]) -> list[float]:
        """The scores of an item, from what the model's method gives for each of its texts."""
        return [float(result) for result in results]

    @abstractmethod
    def measures(self, items: Sequence[Item], scores: Sequence[np.ndarray]) -> list[Measure]:
        """The figures of items with the scores of their inputs, one (k,) float64 each."""

    @abstractmethod
    def columns(self, items: Sequence[Item], scores: Sequence[np.ndarray]) -> dict[str, list[Any]]:
        """The scores in the shape that the benchmark's own tools write."""


def expect_one_reward(rm: Scorer) -> None:
    """ValueError for a model of several rewards."""
    if rm.num_labels != 1:
        raise ValueError(
            f"Expected a model of one reward, got one of {rm.num_labels}: responses have no order under several"
        )


def mean(values: np.ndarray, where: np.ndarray) -> Value:
    """The mean of values (n,) over items `where` (n,) bool; NaN under weights that leave none."""
    taken, counted = np.where(where, values, 0.0), where.astype(np.float64)

    def value(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return weights @ taken / (weights @ counted)

    return value


def combined(values: Sequence[Value], shares: Sequence[float] | None = None) -> Value:
    """The mean of several values, with shares in proportion to these."""
    parts = np.full(len(values), 1.0) if shares is None else np.asarray(shares, np.float64)
    parts = parts / parts.sum()
    return lambda weights: sum(part * value(weights) for part, value in zip(parts, values))  # type: ignore[return-value]


def of_subset(items: Sequence[Item]) -> dict[str, np.ndarray]:
    """Which items (n,) bool are of each subset, in the order in which these first occur."""
    names = np.array([item.subset for item in items], dtype=object)
    return {name: names == name for name in dict.fromkeys(names.tolist())}


# Cells of a row -------------------------------------------------------------------------------------------------------


def text_in(row: Mapping[str, Any], *names: str) -> str:
    """The text or whole number in the first of some columns that a row has, as text; ValueError where there is none."""
    for name in names:
        if (cell := row.get(name)) is not None and cell != "":
            if isinstance(cell, str) or (isinstance(cell, int) and not isinstance(cell, bool)):
                return str(cell)
            raise ValueError(f"column {name!r} holds {type(cell).__name__}, expected text")
    raise ValueError(f"column {' or '.join(map(repr, names))} is missing or empty")


def texts_in(row: Mapping[str, Any], name: str) -> list[str]:
    """The texts in a column: a list, or in CSV one as JSON."""
    cell = row.get(name)
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError:
            raise ValueError(f"column {name!r} holds text, expected a list of texts") from None
    if not isinstance(cell, list | tuple) or not cell or not all(isinstance(each, str) for each in cell):
        raise ValueError(f"column {name!r} is no list of texts")
    if blank := [i for i, each in enumerate(cell) if not each.strip()]:
        raise ValueError(f"column {name!r} has an empty text at {blank[0]}")
    return list(cell)


def is_texts(cell: Any) -> bool:
    """Whether a cell is a list of texts, also as JSON."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = json.loads(cell)
        except ValueError:
            return False
    return isinstance(cell, list | tuple) and bool(cell) and all(isinstance(each, str) for each in cell)


def whole_in(row: Mapping[str, Any], name: str) -> int:
    """The whole number in a column; in CSV it is text."""
    cell = row.get(name)
    if isinstance(cell, str):
        try:
            cell = int(cell)
        except ValueError:
            cell = None
    if isinstance(cell, bool) or not isinstance(cell, int):
        raise ValueError(f"column {name!r} holds no whole number but {row.get(name)!r}")
    return cell


def key_of(prompt: Any) -> str:
    """What tells prompts apart, texts or messages."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False, default=str)
