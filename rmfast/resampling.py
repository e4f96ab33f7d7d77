"""Resamples of clusters: items that share a prompt are drawn together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

_AT_ONCE = 1 << 20  # weights at a time, 8 MiB


def clusters(prompts: Sequence[str]) -> np.ndarray:
    """(n,) the number of each item's prompt."""
    known: dict[str, int] = {}
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
