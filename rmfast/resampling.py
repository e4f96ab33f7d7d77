"""Resamples of clusters: items that share a prompt are drawn together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np

_AT_ONCE = 1 << 20  # weights at a time, 8 MiB


def clusters(prompts: Sequence[Hashable]) -> np.ndarray:
    """(n,) the number of each item's prompt."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(prompt, len(known)) for prompt in prompts], np.int64)


def drawn(of: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Weights (b, n) of the items, some resamples at a time: how often the cluster `of` (n,) each was drawn.

    As many clusters are drawn as there are. The draws depend on seed and `of` alone, so that two models' figures of the
    same items can be subtracted resample by resample.
    """
    count, rng = int(of.max()) + 1, np.random.default_rng(seed)
    size = max(1, _AT_ONCE // max(count, len(of)))
    for start in range(0, resamples, size):
        times = rng.multinomial(count, np.full(count, 1 / count), size=min(size, resamples - start))
        yield times[:, of].astype(np.float64)


def cluster_means(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """(G, ...) the mean of each cluster's values (n, ...), of the clusters `of` (n,): a prompt counts once."""
    count = np.bincount(of)
    sums = np.zeros((len(count), *values.shape[1:]))
    np.add.at(sums, of, values)
    return sums / count.reshape(-1, *[1] * (values.ndim - 1))


def percentiles(draws: np.ndarray, confidence: float) -> np.ndarray:
    """(2, ...) low and high of resamples (B, ...); NaN where no resample has a number."""
    tail = (1 - confidence) / 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All-NaN")
        return np.nanquantile(draws, [tail, 1 - tail], axis=0)


def as_json(row: Any) -> dict[str, Any]:
    """A named tuple's fields; None for figures that are not finite, which JSON lacks."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row._asdict().items()}
