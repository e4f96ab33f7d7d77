"""What `fit` and `validate` are asked, checked before the model runs for minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rmfast.arguments import sequence, whole, word
from rmfast.debias.apply import projections
from rmfast.debias.interventions import Positions
from rmfast.debias.measure import Attributes, Wanted
from rmfast.debias.neurons import fitting, k_of_each, whole_k
from rmfast.debias.search import RULES, Rule, Tried, needs_optuna, search
from rmfast.debias.study import Study
from rmfast.engine.options import checked_run
from rmfast.engine.scorer import Scorer
from rmfast.texts.pairs import Pair

K = int | float | Mapping[str, int | float] | Literal["search"]


@dataclass(frozen=True, eq=False)
class Request:
    """Checked arguments of `fit` and `validate`: `ks` is what k was given, or None where it is searched for."""

    rm: Scorer
    pairs: list[Pair]
    found: Attributes
    ks: dict[str, int] | None
    choices: list[int]
    rule: Rule
    folds: int
    trials: int
    positions: Positions
    seed: int
    progress: bool
    batch_tokens: int | None

    def study(self, encoding: Mapping[str, Any], held: int) -> Study:
        """The pairs in folds, of which `held` at most are left out at once when neurons are ranked."""
        running = {"batch_tokens": self.batch_tokens, "progress": self.progress}
        return Study(self.rm, self.pairs, self.found, self.folds, self.positions, self.seed, encoding, running, held)

    def tried(self, study: Study, without: frozenset[int]) -> list[Tried]:
        """Settings, on all folds but some: those of a search, or the one that was given."""
        if self.ks is not None:
            return [study.attempt(self.ks, without)]
        return search(
            lambda ks: study.attempt(ks, without), self.found.names, self.choices, self.trials, self.seed, self.progress
        )

    def about(self, settings: int) -> dict[str, Any]:
        """Of a search, for a clamp's metadata."""
        return {
            "trials": self.trials, "settings": settings, "choices": self.choices, "seed": self.seed, "rule": self.rule,
            "folds": self.folds,
        }  # fmt: skip


def request(
    rm: Scorer, pairs: Sequence[Any], *, attributes: Wanted, k: K, rule: Rule, folds: int, trials: int,
    choices: Sequence[int | float], positions: Positions, seed: int, progress: bool, batch_tokens: int | None,
) -> Request:  # fmt: skip
    """ValueError, TypeError, ImportError as `fit` says."""
    word("positions", positions, ("last", "all"))
    word("rule", rule, RULES)
    if isinstance(k, str) and k != "search":
        raise ValueError(f'Expected k to be "search", an int, or one for each attribute, got {k!r}')
    trials, seed = whole("trials", trials, 1), whole("seed", seed, 0, 2**32 - 1)
    folds = whole("folds", folds, 1)
    given = [
        each if isinstance(each, float | np.floating) else whole("choices", each, 0)  # kept as JSON: not of numpy
        for each in sequence("choices", choices, "a sequence of ints, or of shares of the model's neurons")
    ]
    batch_tokens = checked_run(batch_tokens, progress)
    read, found = fitting(rm, pairs, attributes)
    most = sum(projections(rm).values())
    every = [whole_k("choices", each, most) if isinstance(each, float | np.floating) else each for each in given]
    some = sorted({each for each in every if each <= most})
    ks = None if isinstance(k, str) else k_of_each(k, found.names, most)
    if ks is None:
        if not some:
            raise ValueError(f"Expected choices at most the model's {most} neurons, got {every}")
        needs_optuna(found.names, some, trials)
    return Request(rm, read, found, ks, some, rule, folds, trials, positions, seed, progress, batch_tokens)
