"""Intervals of a benchmark's figures, by a bootstrap over prompts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from rmfast.evaluation.layout import Value
from rmfast.resampling import drawn


def intervals(values: Sequence[Value], of: np.ndarray, resamples: int, confidence: float, seed: int) -> np.ndarray:
    """(2, F): the percentiles of each value's resamples, of those that hold some of its items."""
    each = [np.stack([value(weights) for value in values], axis=1) for weights in drawn(of, resamples, seed)]
    tail = (1 - confidence) / 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All-NaN slice")
        return np.nanquantile(np.concatenate(each), [tail, 1 - tail], axis=0)
