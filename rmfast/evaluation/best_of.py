"""RewardBench 2: the best of several responses, and Ties, where several are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmfast.evaluation.layout import (
    ALL,
    Item,
    Layout,
    Measure,
    combined,
    is_texts,
    mean,
    of_subset,
    text_in,
    texts_in,
    whole_in,
)

# The shares of a Ties score, and its tie-breaker on top.
_SHARES = {"tied accuracy": 0.30, "reference accuracy": 0.30, "gap over spread": 0.20, "both gaps over spread": 0.20}
_TIE_BREAKER = 0.01


class RewardBench2(Layout):
    """Columns id, prompt, chosen (a list), rejected (a list), num_correct, total_completions and subset.

    The scores of a row are those of chosen and then rejected. A row counts 1/m where its first response is among the m
    that have the highest score, else 0; the score of a file is the plain mean of its subsets'.

    Rows of the subset Ties are `ref:N` (one right response) or `tied:N` (several) by their id. With gap = the worst
    right response − the best wrong one, and spread = the best right one − the worst right one of tied:N,

        0.30 mean(gap of tied > 0) + 0.30 mean(gap of ref > 0)
        + 0.20 mean(gap of tied > spread) + 0.20 mean(min(gap of ref, gap of tied) > spread)
        + 0.01 mean(tanh(min(gap of ref, gap of tied) / spread − 1)), where 0 / 0 gives 0,

    the last three over the N that have both. It can be a little over 1.
    """

    name = "rewardbench2"

    def fits(self, row: Mapping[str, Any]) -> bool:
        return "num_correct" in row and is_texts(row.get("chosen")) and is_texts(row.get("rejected"))

    def item(self, row: Mapping[str, Any]) -> Item:
        prompt, subset, id_ = text_in(row, "prompt"), text_in(row, "subset"), row.get("id")
        chosen, rejected = texts_in(row, "chosen"), texts_in(row, "rejected")
        correct = whole_in(row, "num_correct")
        if correct != len(chosen):
            raise ValueError(f"has num_correct {correct} and {len(chosen)} chosen responses: expected as many")
        total = len(chosen) + len(rejected)
        if row.get("total_completions") is not None and whole_in(row, "total_completions") != total:
            raise ValueError(f"has total_completions {row['total_completions']} and {total} responses")
        key = prompt
        if _is_ties(subset):
            kind, number = _ties_id(id_)
            key = f"Ties {number}"
            if (kind == "ref") != (correct == 1):
                raise ValueError(f"is {id_} and has {correct} right responses: expected 1 of ref, several of tied")
        elif correct != 1:
            raise ValueError(f"has {correct} right responses: expected 1 outside of the subset Ties")
        return Item(subset, key, tuple((prompt, text) for text in chosen + rejected), correct, id_)

    def measures(self, items: Sequence[Item], scores: Sequence[np.ndarray]) -> list[Measure]:
        top = np.array([_best(each) for each in scores])
        ties = np.array([_tied(each, item.correct) for item, each in zip(items, scores)])
        subsets = of_subset(items)
        found: list[Measure] = []
        whole: list[Measure] = []  # one of each subset
        for name, where in subsets.items():
            if _is_ties(name):
                parts = _ties(name, items, scores, where, ties)
                found += parts
                whole += [part for part in parts if part.measure == "score"]
            else:
                whole.append(Measure(name, "accuracy", mean(top, where), where, ties))
                found.append(whole[-1])
        if len(whole) == len(subsets) > 1:
            value = combined([measure.value for measure in whole])
            found.append(Measure(ALL, "score", value, np.ones(len(items), bool), ties))
        return found

    def columns(self, items: Sequence[Item], scores: Sequence[np.ndarray]) -> dict[str, list[Any]]:
        return {
            "id": [item.id for item in items],
            "subset": [item.subset for item in items],
            "num_correct": [item.correct for item in items],
            "scores": [each.tolist() for each in scores],
            "results": [None if _is_ties(item.subset) else _best(each) for item, each in zip(items, scores)],
        }


def _is_ties(subset: str) -> bool:
    return subset.lower() == "ties"


def _ties_id(given: Any) -> tuple[str, str]:
    kind, _, number = str(given).partition(":")
    if kind not in ("ref", "tied") or not number:
        raise ValueError(f"has the id {given!r}: expected ref:N or tied:N in the subset Ties")
    return kind, number


def _best(scores: np.ndarray) -> float:
    """1/m where the first of the scores is among the m highest, else 0."""
    highest = scores == scores.max()
    return float(highest[0] / highest.sum())


def _tied(scores: np.ndarray, correct: int) -> bool:
    """Whether a right and a wrong response have the same score, in the one place that matters: worst right, best wrong.

    With one right response only a tie at the top counts.
    """
    worst, best = scores[:correct].min(), scores[correct:].max()
    return bool(worst == best)


def _ties(
    subset: str, items: Sequence[Item], scores: Sequence[np.ndarray], where: np.ndarray, ties: np.ndarray
) -> list[Measure]:
    """The parts of a Ties score, and the score itself where there are tied prompts with their references."""
    n = len(items)
    gap, spread, partner = np.zeros(n), np.zeros(n), np.full(n, -1)
    sides: dict[str, dict[str, int]] = {"ref": {}, "tied": {}}
    for i in np.flatnonzero(where).tolist():
        kind, number = _ties_id(items[i].id)
        if number in sides[kind]:
            raise ValueError(f"Expected each id of the subset Ties once, got {items[i].id} again")
        sides[kind][number] = i
        right = scores[i][: items[i].correct]
        gap[i] = right.min() - scores[i][items[i].correct :].max()
        spread[i] = right.max() - right.min()
    for number, i in sides["tied"].items():
        partner[i] = sides["ref"].get(number, -1)
    tied, ref = np.zeros(n, bool), np.zeros(n, bool)
    tied[list(sides["tied"].values())], ref[list(sides["ref"].values())] = True, True
    paired = partner >= 0
    least = np.minimum(gap, gap[partner])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = least / spread
    breaker = np.where(np.isnan(ratio), 0.0, np.tanh(ratio - 1))
    parts = [
        ("tied accuracy", gap > 0, tied),
        ("reference accuracy", gap > 0, ref),
        ("gap over spread", gap > spread, paired),
        ("both gaps over spread", least > spread, paired),
    ]
    found = [Measure(subset, name, mean(values, over), over, ties) for name, values, over in parts if over.any()]
    if len(found) == len(parts):
        values = combined([part.value for part in found], [_SHARES[part.measure] for part in found])
        more = mean(breaker, paired)
        found.append(Measure(subset, "score", lambda w: values(w) + _TIE_BREAKER * more(w), where, ties))
    return found
