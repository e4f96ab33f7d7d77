"""Directions of a concept from labelled activations, and how they tell held-out pairs apart, for any labels at once.

Activations are of n pairs, with the concept and without it. Labels of a pair are right (1) or exchanged (−1): shuffled
labels exchange those of some prompts. A pair is told right where the text that is labelled as with the concept lies
further along the direction; of any direction that knows nothing that is half of the pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

METHODS = ("mean_difference", "logistic")


class MeanDifference:
    """u = mean of (with − without) over the pairs."""

    def __init__(self, with_: np.ndarray, without: np.ndarray) -> None:
        self.apart = with_ - without
        self.gram = self.apart @ self.apart.T

    def directions(self, labels: np.ndarray, some: np.ndarray) -> np.ndarray:
        """(L, d) of these pairs under labels (L, n)."""
        return labels[:, some] @ self.apart[some] / len(some)

    def margins(self, labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        """(L, test) how much further along the direction of the training pairs a test pair's text with the concept,
        by its label, lies."""
        return labels[:, test] * (labels[:, train] @ self.gram[np.ix_(train, test)])


class Logistic:
    """The weights of a logistic regression with an L2 penalty (scikit-learn) on standardised activations.

    They lie in the span of the activations, so that it is fit there, in 2n dimensions at most.
    """

    def __init__(self, with_: np.ndarray, without: np.ndarray, penalty: float) -> None:
        x = np.concatenate([with_, without])
        self.spread = x.std(0)
        self.spread[self.spread <= 1e-12 * np.abs(x).max()] = np.inf  # what is the same for all says nothing
        u, s, self.basis = np.linalg.svd((x - x.mean(0)) / self.spread, full_matrices=False)
        self.features, self.count, self.penalty = u * s, len(with_), penalty

    def _weights(self, labels: np.ndarray, some: np.ndarray) -> np.ndarray:
        """(r,) from these pairs under labels (n,)."""
        rows = np.concatenate([some, some + self.count])
        with_ = np.concatenate([labels[some], -labels[some]]) > 0
        model = classifier()(C=self.penalty, max_iter=1000)
        return model.fit(self.features[rows], with_).coef_[0]

    def directions(self, labels: np.ndarray, some: np.ndarray) -> np.ndarray:
        """(L, d) of these pairs under labels (L, n)."""
        return np.stack([self._weights(each, some) @ self.basis / self.spread for each in labels])

    def margins(self, labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        """(L, test), as for mean differences."""
        apart = self.features[test] - self.features[test + self.count]
        return np.stack([each[test] * (apart @ self._weights(each, train)) for each in labels])


def classifier() -> Any:
    """scikit-learn's logistic regression."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(f'logistic probes need scikit-learn (pip install "rmfast[concepts]"): {error}') from error
    return LogisticRegression


def folds(of: np.ndarray, count: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(train, test) indices of pairs whose prompts `of` (n,) are dealt out into so many parts."""
    prompts = int(of.max()) + 1
    part = np.random.default_rng(seed).permutation(prompts) % count
    for i in range(count):
        held_out = part[of] == i
        yield np.flatnonzero(~held_out), np.flatnonzero(held_out)


def told_right(
    method: MeanDifference | Logistic, labels: np.ndarray, of: np.ndarray, count: int, seed: int
) -> np.ndarray:
    """(L, n): 1 for each pair that the direction of other prompts' pairs tells right, a half for a tie."""
    right = np.empty(labels.shape)
    for train, test in folds(of, count, seed):
        margins = method.margins(labels, train, test)
        right[:, test] = (margins > 0) + 0.5 * (margins == 0)
    return right


def held_out(
    method: MeanDifference | Logistic, with_: np.ndarray, without: np.ndarray, of: np.ndarray, count: int, seed: int
) -> np.ndarray:
    """(2, n) projections of each pair's texts on the direction of other prompts' pairs, from their mean on."""
    out = np.empty((2, len(of)))
    for train, test in folds(of, count, seed):
        direction = method.directions(np.ones((1, len(of))), train)[0]
        direction /= np.linalg.norm(direction) or 1.0
        mean = (with_[train].mean(0) + without[train].mean(0)) / 2
        out[:, test] = [(side[test] - mean) @ direction for side in (with_, without)]
    return out


def shuffled_labels(of: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(count, n) labels that exchange the texts of a prompt's pairs, or don't, by a coin for each prompt."""
    coins = np.random.default_rng([seed, 1]).choice([-1.0, 1.0], (count, int(of.max()) + 1))
    return coins[:, of]
