"""Intervals of a benchmark's figures, by a bootstrap over prompts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from rmfast.evaluation.layout import Value
from rmfast.resampling import drawn

_SAME = 1e-9  # sums of the same numbers in another order


def intervals(
    values: Sequence[Value], of: np.ndarray, resamples: int, confidence: float, seed: int,
    where: Sequence[np.ndarray] | None = None, differences: bool = False,
) -> np.ndarray:  # fmt: skip
    """(2, F): the percentiles of each value's resamples, of those that hold some of its items.

    Args:
        where: of values that are proportions, the items (n,) bool of each. Where all resamples of one are equal, as
            where all items are right, percentiles would claim certainty: its interval is Clopper and Pearson's for so
            many prompts, also where it combines several subsets.
        differences: the values are of two models' proportions, one less the other. Of equal resamples of n prompts that
            says, by the same bound, that the share of prompts of any other difference is below 1 - tail^(1/n): there
            one model's proportion may be higher by as much, and the other's lower.
    """
    each = [np.stack([value(weights) for value in values], axis=1) for weights in drawn(of, resamples, seed)]
    drawn_values, tail = np.concatenate(each), (1 - confidence) / 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All-NaN slice")
        found = np.nanquantile(drawn_values, [tail, 1 - tail], axis=0)
    for place, items in enumerate(where or []):
        there = drawn_values[~np.isnan(drawn_values[:, place]), place]
        if there.size and np.ptp(there) < _SAME:
            value, count = float(there[0]), len(set(of[items].tolist()))
            if differences:
                off = 1 - tail ** (1 / count)
                reach = off if abs(value) < _SAME else 2 * off
                found[:, place] = max(value - reach, -1.0), min(value + reach, 1.0)
            else:
                found[:, place] = _clopper_pearson(min(max(value, 0.0), 1.0), count, tail)
    return found


def _clopper_pearson(value: float, count: int, tail: float) -> tuple[float, float]:
    """The proportions under which `value` or more, and `value` or less, of `count` has probability `tail`."""
    from scipy.special import betaincinv

    right = value * count
    wrong = count - right
    low = 0.0 if right < _SAME else float(betaincinv(right, wrong + 1, tail))
    high = 1.0 if wrong < _SAME else float(betaincinv(right + 1, wrong, 1 - tail))
    return low, high
