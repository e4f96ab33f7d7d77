"""What scores alone tell: how far margins can be trusted, and how rewards go with lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rmfast.audit.data import Bin, Calibration, Dot, Lengths, Trend, finite, number, span
from rmfast.evaluation.bootstrap import intervals
from rmfast.evaluation.layout import Value, mean
from rmfast.evaluation.result import Evaluation
from rmfast.resampling import clusters

_BINS, _LEAST = 10, 10  # ranges of margins or lengths; pairs in each at least, where there are so many
_BARS = 30
_DOTS = 2000  # texts that are drawn: more would fill page and plot


def rewards_of(found: Evaluation) -> np.ndarray:
    """(n, 2): chosen and rejected."""
    return np.array([np.asarray(each, np.float64) for each in found.scores]).reshape(-1, 2)


def calibration(found: Evaluation) -> Calibration:
    """Accuracy in ranges of |margin| that hold as many pairs each, beside the Bradley–Terry probability.

    Intervals are those of a bootstrap over prompts. A tie counts a half.
    """
    rewards = rewards_of(found)
    margins = rewards[:, 0] - rewards[:, 1]
    sizes, right = np.abs(margins), (margins > 0) + 0.5 * (margins == 0)
    predicted = 1 / (1 + np.exp(-sizes))
    places = _ranges(sizes)
    means = _means(right, places)
    low, high = _intervals(found, means, places)
    bins: list[Bin] = []
    error = 0.0
    for where, value, a, b in zip(places, means, low, high):
        accuracy = float(value(np.ones((1, len(margins))))[0])
        error += where.mean() * abs(accuracy - predicted[where].mean())
        bins.append(
            {
                **span(accuracy, a, b, where.sum()), "start": float(sizes[where].min()),
                "end": float(sizes[where].max()), "margin": float(sizes[where].mean()),
                "predicted": float(predicted[where].mean()),
            }
        )  # fmt: skip
    reach = float(sizes.max()) or 1.0
    edges = np.linspace(-reach, reach, 2 * (_BARS // 2) + 1)
    counts, _ = np.histogram(margins, edges)
    bars = [{"start": float(a), "end": float(b), "n": int(n)} for a, b, n in zip(edges, edges[1:], counts)]
    return {"bins": bins, "bars": bars, "error": float(error)}  # type: ignore[typeddict-item]


def lengths(found: Evaluation, characters: np.ndarray, seed: int) -> Lengths:
    """Rewards against characters (n, 2) of the responses: some texts, and the mean reward by ranges of length."""
    rewards, flat = rewards_of(found).ravel(), characters.ravel()
    places = _ranges(flat)
    over_texts = _means(rewards, places)
    means = [_per_pair(value) for value in over_texts]
    low, high = _intervals(found, means)
    once = np.ones((1, len(found.items)))
    trend: list[Trend] = [
        {**span(value(once)[0], a, b, where.sum()), "characters": float(flat[where].mean())}
        for where, value, a, b in zip(places, means, low, high)
    ]
    some = np.sort(np.random.default_rng(seed).permutation(len(flat))[:_DOTS])
    dots: list[Dot] = [
        {"characters": int(flat[i]), "reward": number(rewards[i]) or 0.0, "side": ("chosen", "rejected")[i % 2]}
        for i in some.tolist()
    ]
    return {"dots": dots, "trend": trend, "texts": len(flat)}


def _ranges(values: np.ndarray) -> list[np.ndarray]:
    """Masks (n,) of at most ten ranges of values with about as many in each; equal values are in one."""
    count = int(np.clip(len(values) // _LEAST, 1, _BINS))
    edges = np.unique(np.quantile(values, np.linspace(0, 1, count + 1)))
    at = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, max(len(edges) - 2, 0))
    return [at == place for place in np.unique(at)]


def _means(values: np.ndarray, places: Sequence[np.ndarray]) -> list[Value]:
    return [mean(values, where) for where in places]


def _per_pair(value: Value) -> Value:
    """A value of weights of the texts as one of weights of the pairs."""
    return lambda weights: value(np.repeat(weights, 2, axis=1))


def _intervals(
    found: Evaluation, values: Sequence[Value], where: Sequence[np.ndarray] | None = None
) -> np.ndarray:  # fmt: skip
    of = clusters([item.prompt for item in found.items])
    return intervals(values, of, found.resamples, found.confidence, found.seed, where)


def figures(found: Evaluation) -> list:
    """The rows of an evaluation as plain data."""
    return [
        {
            **span(row.value, row.low, row.high, row.n), "subset": row.subset, "measure": row.measure,
            "prompts": row.prompts, "ties": row.ties,
        }
        for row in found.rows
        if finite(row.value) is not None
    ]  # fmt: skip
