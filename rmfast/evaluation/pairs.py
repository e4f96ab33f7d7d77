"""Preference pairs: of users' files with a subset column, and RewardBench 1 with its sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmfast.evaluation.layout import ALL, Item, Layout, Measure, combined, is_texts, key_of, mean, of_subset
from rmfast.texts.pairs import read_pairs

# RewardBench 1: the subsets of its sections, and the counts by which they are weighted. That of math-prm is not its
# size, 447: its weight is that of the six subsets of code together.
SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 250,
        "xstest-should-respond": 154,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
_SUBSETS = {name for section in SECTIONS.values() for name in section}


class Pairs(Layout):
    """Columns chosen, rejected and, where there are, prompt, subset and id: accuracy, where a tie is half right.

    Texts or messages, as `rmfast.texts.pairs.read_pairs` takes them.
    """

    name = "pairs"
    tie = 0.5

    def fits(self, row: Mapping[str, Any]) -> bool:
        return "chosen" in row and "rejected" in row and not is_texts(row["chosen"])

    def item(self, row: Mapping[str, Any]) -> Item:
        given = {**row, "prompt": row.get("prompt") or None}
        try:
            (pair,) = read_pairs([given])
        except ValueError as error:
            raise ValueError(str(error).replace("pair 0", "it", 1)) from None
        own = {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name) is not None}
        inputs = tuple({"prompt": given["prompt"], "response": row[name], **own} for name in ("chosen", "rejected"))
        subset = row.get("subset")
        return Item("" if subset is None else str(subset), key_of(pair.prompt), inputs, id=row.get("id"))

    def measures(self, items: Sequence[Item], scores: Sequence[np.ndarray]) -> list[Measure]:
        credit, ties, found = self._accuracies(items, scores)
        if len(found) > 1:
            everything = np.ones(len(items), bool)
            values = [measure.value for measure in found]
            found.append(Measure(ALL, "accuracy", mean(credit, everything), everything, ties))
            found.append(Measure(ALL, "mean of subsets", combined(values), everything, ties))
        return found

    def columns(self, items: Sequence[Item], scores: Sequence[np.ndarray]) -> dict[str, list[Any]]:
        return {
            "id": [item.id for item in items],
            "subset": [item.subset for item in items],
            "scores_chosen": [float(pair[0]) for pair in scores],
            "scores_rejected": [float(pair[1]) for pair in scores],
            "results": [int(pair[0] > pair[1]) for pair in scores],
        }

    def _accuracies(
        self, items: Sequence[Item], scores: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, list[Measure]]:
        """(n,) what each pair counts, (n,) which are ties, and the accuracy of each subset."""
        margin = np.array([pair[0] - pair[1] for pair in scores])
        ties = margin == 0
        credit = (margin > 0) + self.tie * ties
        subsets = of_subset(items)
        unnamed = ALL if len(subsets) == 1 else "(none)"
        found = [
            Measure(name or unnamed, "accuracy", mean(credit, where), where, ties) for name, where in subsets.items()
        ]
        return credit, ties, found


class RewardBench(Pairs):
    """RewardBench 1: pairs of its 23 subsets, where a tie is wrong, as in its own code.

    A section is the mean of its subsets, weighted by the published counts (`SECTIONS`); of a file that lacks some, of
    those that are there. The score, where all four sections are there, is their plain mean, without the prior sets that
    an early leaderboard added.
    """

    name = "rewardbench"
    tie = 0.0

    def fits(self, row: Mapping[str, Any]) -> bool:
        return super().fits(row) and row.get("subset") in _SUBSETS

    def item(self, row: Mapping[str, Any]) -> Item:
        if row.get("subset") not in _SUBSETS:
            raise ValueError(f"its subset {row.get('subset')!r} is none of RewardBench's; layout pairs takes any")
        return super().item(row)

    def measures(self, items: Sequence[Item], scores: Sequence[np.ndarray]) -> list[Measure]:
        _, ties, found = self._accuracies(items, scores)
        by_name = {measure.subset: measure for measure in found}
        sections = []
        for section, counts in SECTIONS.items():
            there = {name: count for name, count in counts.items() if name in by_name}
            if there:
                value = combined([by_name[name].value for name in there], list(there.values()))
                where = np.any([by_name[name].where for name in there], axis=0)
                sections.append(Measure(section, "section", value, where, ties))
        if len(sections) == len(SECTIONS):
            value = combined([section.value for section in sections])
            sections.append(Measure(ALL, "score", value, np.ones(len(items), bool), ties))
        return found + sections
