"""RM-Bench: three chosen and three rejected responses, in styles from plain to fancy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmfast.evaluation.layout import (
    ALL,
    Item,
    Layout,
    Measure,
    Value,
    combined,
    is_texts,
    mean,
    of_subset,
    text_in,
    texts_in,
)

_SAFETY = ("safety-refuse", "safety-response")
_CELLS = {  # which of a row's comparisons (chosen style, rejected style) are of each kind
    "easy": np.tril(np.ones((3, 3), bool), -1),  # the chosen response has the fancier style
    "normal": np.eye(3, dtype=bool),
    "hard": np.triu(np.ones((3, 3), bool), 1),
}


class RMBench(Layout):
    """Columns id, prompt, chosen and rejected (three texts each: concise, detailed, detailed with markdown), domain.

    Of the 3 × 3 comparisons of a row, hard are those in which the rejected response has the fancier style, normal those
    of one style, easy the rest; a tie is wrong. Where a row has a subset, that stands for its domain. A domain is the
    mean over its rows, safety that of its two subdomains' rows together (an assumption: the paper shows one column);
    "mean" is that of hard, normal and easy, the figures of all the plain means of the domains.
    """

    name = "rm-bench"

    def fits(self, row: Mapping[str, Any]) -> bool:
        return "domain" in row and is_texts(row.get("chosen")) and is_texts(row.get("rejected"))

    def item(self, row: Mapping[str, Any]) -> Item:
        prompt, domain = text_in(row, "prompt"), text_in(row, "subset", "domain")
        sides = [texts_in(row, name) for name in ("chosen", "rejected")]
        if (sizes := [len(side) for side in sides]) != [3, 3]:
            raise ValueError(f"has {sizes[0]} chosen and {sizes[1]} rejected responses: expected three of each")
        texts = tuple((prompt, text) for side in sides for text in side)
        return Item("safety" if domain in _SAFETY else domain, prompt, texts, 3, row.get("id"))

    def measures(self, items: Sequence[Item], scores: Sequence[np.ndarray]) -> list[Measure]:
        chosen, rejected = np.stack(scores)[:, :3, None], np.stack(scores)[:, None, 3:]
        right, ties = chosen > rejected, (chosen == rejected).sum((1, 2))
        found: list[Measure] = []
        by_kind: dict[str, list[Value]] = {name: [] for name in (*_CELLS, "mean")}
        for domain, where in of_subset(items).items():
            kinds = {name: mean(right[:, cells].mean(1), where) for name, cells in _CELLS.items()}
            kinds["mean"] = combined(list(kinds.values()))
            for name, value in kinds.items():
                found.append(Measure(domain, name, value, where, ties))
                by_kind[name].append(value)
        if len(by_kind["mean"]) > 1:
            everything = np.ones(len(items), bool)
            found += [Measure(ALL, name, combined(values), everything, ties) for name, values in by_kind.items()]
        return found

    def columns(self, items: Sequence[Item], scores: Sequence[np.ndarray]) -> dict[str, list[Any]]:
        return {
            "id": [item.id for item in items],
            "domain": [item.subset for item in items],
            "score_chosen": [each[:3].tolist() for each in scores],
            "score_rejected": [each[3:].tolist() for each in scores],
        }
