"""ProcessBench: where a process reward model finds the first wrong step of a solution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rmfast.evaluation.layout import (
    ALL,
    Item,
    Layout,
    Measure,
    Value,
    combined,
    mean,
    of_subset,
    text_in,
    texts_in,
    whole_in,
)
from rmfast.heads.function import FunctionHead

if TYPE_CHECKING:
    from rmfast.engine.scorer import Scorer

_HALF = 0.5


@dataclass(frozen=True)
class ProcessBench(Layout):
    """Columns id, problem, steps (a list of texts) and label: the index of the first wrong step, −1 for none.

    The subset is the row's own, else what stands before the last "-" of its id (an assumption: ids are gsm8k-0,
    math-12, ...). What is found is the first step whose value is under the threshold, −1 where there is none. Of each
    subset the accuracy on the rows with a wrong step, that on those without, and their harmonic mean, F1; of all the
    mean of the F1.

    The text is the problem, and as the response to it the steps, each with the tag behind it. A step's value is what
    `RewardModel.step_scores` makes of the reward there, as the head says: the probability that the step is right. A
    head that is a function gives values of its own, and needs a threshold.

    Attributes:
        tag: the text behind each step, one token, at which it is valued.
        threshold: the value under which a step is wrong; default 0.5.
    """

    tag: str = ""
    threshold: float | None = None
    name = "processbench"
    method = "step_scores"

    def fits(self, row: Mapping[str, Any]) -> bool:
        return all(column in row for column in ("problem", "steps", "label"))

    def item(self, row: Mapping[str, Any]) -> Item:
        problem, steps, label = text_in(row, "problem"), texts_in(row, "steps"), whole_in(row, "label")
        if not -1 <= label < len(steps):
            raise ValueError(f"has label {label} and {len(steps)} steps: expected the index of one, or -1")
        for place, text in enumerate((problem, *steps)):
            if self.tag in text:
                where = f"step {place - 1}" if place else "problem"
                raise ValueError(f"has the tag {self.tag!r} in its {where}: expected it behind the steps alone")
        subset = text_in(row, "subset") if row.get("subset") else str(row.get("id") or "").rpartition("-")[0]
        text = "".join(step + self.tag for step in steps)
        return Item(subset, problem, ((problem, text),), len(steps), row.get("id"), label)

    def expect(self, rm: Scorer) -> None:
        self._tag_id(rm)
        if self.threshold is None and isinstance(rm.binding.program, FunctionHead):
            raise ValueError("Expected a threshold for this model, whose head is a function of its own")

    def arguments(self, rm: Scorer) -> dict[str, Any]:
        return {"step_tag_id": self._tag_id(rm)}

    def count(self, item: Item) -> int:
        return item.correct

    def scores_of(self, results: Sequence[Any]) -> list[float]:
        return np.asarray(results[0], np.float64).tolist()

    def _tag_id(self, rm: Scorer) -> int:
        if rm.tokenizer is None:
            raise ValueError("Expected a model with a tokenizer, to find the tags in its tokens, got none")
        ids = rm.tokenizer.encode(self.tag, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"Expected the tag to be one token of this model, got {self.tag!r}, which is {len(ids)}")
        return ids[0]

    def measures(self, items: Sequence[Item], scores: Sequence[np.ndarray]) -> list[Measure]:
        labels = np.array([item.label for item in items])
        right = np.array([self.found(each) for each in scores]) == labels
        ties, found, f1s = np.zeros(len(items)), [], []
        for subset, where in of_subset(items).items():
            sides = [where & (labels >= 0), where & (labels < 0)]
            values = [mean(right, side) for side in sides]
            for name, value, side in zip(("error accuracy", "correct accuracy"), values, sides):
                if side.any():
                    found.append(Measure(subset or ALL, name, value, side, ties))
            if all(side.any() for side in sides):
                f1s.append(_harmonic(*values))
                found.append(Measure(subset or ALL, "F1", f1s[-1], where, ties))
        if len(f1s) == len(of_subset(items)) > 1:
            found.append(Measure(ALL, "F1", combined(f1s), np.ones(len(items), bool), ties))
        return found

    def columns(self, items: Sequence[Item], scores: Sequence[np.ndarray]) -> dict[str, list[Any]]:
        found = [self.found(each) for each in scores]
        return {
            "id": [item.id for item in items],
            "subset": [item.subset for item in items],
            "label": [item.label for item in items],
            "scores": [each.tolist() for each in scores],
            "prediction": found,
            "match": [place == item.label for place, item in zip(found, items)],
        }

    def found(self, values: np.ndarray) -> int:
        """The first step whose value is under the threshold, or −1."""
        wrong = np.flatnonzero(values < (_HALF if self.threshold is None else self.threshold))
        return int(wrong[0]) if len(wrong) else -1


def _harmonic(first: Value, second: Value) -> Value:
    def value(weights: np.ndarray) -> np.ndarray:
        a, b = first(weights), second(weights)
        with np.errstate(invalid="ignore"):
            return np.where(a + b == 0, 0.0, 2 * a * b / (a + b))

    return value
