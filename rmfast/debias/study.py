"""Pairs to fit a clamp on, in folds: texts run once up to the last token, neurons ranked without each fold."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from rmfast.debias.apply import intervened
from rmfast.debias.interventions import NeuronClamp, Positions
from rmfast.debias.last_token import LastTokenRuns
from rmfast.debias.measure import Attributes
from rmfast.debias.neurons import LEAST_PAIRS, Neurons, localised
from rmfast.debias.search import Tried
from rmfast.engine.scorer import Scorer
from rmfast.resampling import clusters
from rmfast.texts.pairs import Pair

NONE: frozenset[int] = frozenset()


class Study:
    """Rewards of pairs under clamps that were found on other pairs, or on all.

    Args:
        rm: a model of one reward.
        pairs: n of them.
        found: attributes of their 2n texts.
        folds: parts of about one size, in which pairs of one prompt stay together; 1 for no folds.
        positions: where neurons are clamped.
        seed: of the folds.
        encoding: as for `score`.
        running: batch_tokens and progress, as for `LastTokenRuns`.
        held: most folds that neurons are ranked without, at once.

    Attributes:
        parts: (n_f,) places of the pairs of each fold.
        of: (n,) the number of each pair's prompt.
        seconds: of each step.
    """

    def __init__(
        self,
        rm: Scorer,
        pairs: Sequence[Pair],
        found: Attributes,
        folds: int,
        positions: Positions,
        seed: int,
        encoding: Mapping[str, Any],
        running: Mapping[str, Any],
        held: int,
    ) -> None:
        self.rm, self.positions, self.seconds = rm, positions, Stopwatch()
        self._running = {**running, "max_length": encoding.get("max_length")}
        self.of = prompts_of(pairs)
        self.parts = _parts(self.of, folds, seed, held)
        self._found = found
        with self.seconds("attributes and tokens"):
            self._encoded = [
                rm.encode([text for i in part for text in pairs[i].inputs], **encoding) for part in self.parts
            ]
        with self.seconds("prefixes"):
            self._runs = [LastTokenRuns(rm, encoded, **self._running) for encoded in self._encoded]
        self._neurons: dict[frozenset[int], Neurons] = {}
        self._tried: dict[Any, np.ndarray] = {}
        with self.seconds("rewards without the clamp"):
            self.before = self.joined([runs.rewards().double().numpy() for runs in self._runs])

    def rank(self, without: Iterable[frozenset[int]]) -> None:
        """Rank the neurons by the texts of all folds but some, for each of these sets of folds, in one pass."""
        sets = [each for each in dict.fromkeys(without) if each not in self._neurons]
        order = np.concatenate(self.parts)
        rows = np.stack([2 * order, 2 * order + 1], axis=1).ravel()  # of the texts, as the runs have them
        fold = np.repeat(np.arange(len(self.parts)), [2 * len(part) for part in self.parts])
        some = [np.flatnonzero(~np.isin(fold, [*each])) for each in sets]
        with self.seconds("localisation"):
            values = Attributes(self._found.names, self._found.values[rows])
            self._neurons.update(zip(sets, localised(self.rm, self._runs, values, some)))

    def neurons(self, without: frozenset[int] = NONE) -> Neurons:
        """As they were ranked without these folds."""
        return self._neurons[without]

    def clamp(self, ks: Mapping[str, int], without: frozenset[int] = NONE, **metadata: Any) -> NeuronClamp:
        """Of the neurons as ranked without these folds; an attribute that is constant in the others is left alone."""
        neurons = self._neurons[without]
        varies = dict(zip(neurons.attributes, np.any(neurons.spearman, axis=0).tolist()))
        return neurons.clamp({name: k if varies[name] else 0 for name, k in ks.items()}, self.positions, **metadata)

    def rewards(self, part: int, clamp: NeuronClamp) -> np.ndarray:
        """(n_f, 2) of the pairs of one fold."""
        if not len(clamp):
            return self.before[self.parts[part]]
        if self.positions == "last":
            return self._runs[part].rewards(clamp).double().numpy().reshape(-1, 2)
        running = {name: value for name, value in self._running.items() if name != "progress"}
        return intervened(self.rm, [clamp]).score(self._encoded[part], **running).double().numpy().reshape(-1, 2)

    def inner(self, without: frozenset[int]) -> list[tuple[int, frozenset[int]]]:
        """The folds on which k is chosen, and what the neurons that are clamped there were ranked without."""
        some = [part for part in range(len(self.parts)) if part not in without]
        return [(part, without | {part} if len(some) > 1 else without) for part in some]

    def attempt(self, ks: Mapping[str, int], without: frozenset[int] = NONE) -> Tried:
        """A setting on all folds but some, on each with the neurons as ranked without it, too."""
        rewards = [self.under(ks, part, left_out) for part, left_out in self.inner(without)]
        return Tried(dict(ks), len(self.clamp(ks, without)), np.concatenate(rewards))

    def under(self, ks: Mapping[str, int], part: int, without: frozenset[int]) -> np.ndarray:
        """(n_f, 2) rewards of the pairs of one fold under the clamp of a setting, run once."""
        key = part, without, tuple(sorted(ks.items()))
        if key not in self._tried:
            self._tried[key] = self.rewards(part, self.clamp(ks, without))
        return self._tried[key]

    def places(self, without: frozenset[int] = NONE) -> np.ndarray:
        """(m,) the places of the pairs of all folds but some, as `attempt` has their rewards."""
        return np.concatenate([self.parts[part] for part, _ in self.inner(without)])

    def joined(self, rewards: Sequence[np.ndarray]) -> np.ndarray:
        """(n, 2) in the order of the pairs, of rewards of each fold."""
        out = np.empty((len(self.of), 2))
        out[np.concatenate(self.parts)] = np.concatenate([each.reshape(-1, 2) for each in rewards])
        return out


def prompts_of(pairs: Sequence[Pair]) -> np.ndarray:
    """(n,) the number of each pair's prompt; pairs without a prompt, or that all have one, are each their own."""
    prompts = [pair.prompt for pair in pairs]
    if len(set(prompts)) == 1:
        return np.arange(len(pairs))
    return clusters([prompt or f"\0{i}" for i, prompt in enumerate(prompts)])


def _parts(of: np.ndarray, folds: int, seed: int, held: int) -> list[np.ndarray]:
    """(n_f,) places of each fold; a prompt's pairs go to the fold that has fewest pairs so far."""
    sizes = np.bincount(of)
    if len(sizes) < folds:
        raise ValueError(f"Expected pairs of at least {folds} prompts for as many folds, got {len(sizes)}")
    filled, fold_of = np.zeros(folds, np.int64), np.empty(len(sizes), np.int64)
    for prompt in np.random.default_rng(seed).permutation(len(sizes)):
        fold_of[prompt] = filled.argmin()
        filled[fold_of[prompt]] += sizes[prompt]
    if (least := len(of) - int(np.sort(filled)[folds - held :].sum())) < LEAST_PAIRS:
        raise ValueError(
            f"Expected more pairs, or fewer folds than {folds}: neurons are ranked by at least {LEAST_PAIRS} pairs, "
            f"and without {held} of the folds there may be {least}"
        )
    return [np.flatnonzero(fold_of[of] == fold) for fold in range(folds)]


class Stopwatch(dict[str, float]):
    """Seconds of each named step."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self[name] = round(self.get(name, 0.0) + time.perf_counter() - start, 3)
