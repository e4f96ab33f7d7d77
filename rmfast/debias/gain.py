"""What a clamp gains and costs on pairs that it was not fitted on, with intervals that hold for few changed pairs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from rmfast.debias.measure import Attributes, Row, right

SAME = 0.1  # standard deviations of the differences within pairs: below, two texts have as much of an attribute


def interval(
    change: np.ndarray, of: np.ndarray, confidence: float, *, extra: float = 0.0, unit: float = 1.0
) -> tuple[float, float, float]:
    """A mean with its interval, of changes (n,) of pairs in clusters `of` (n,).

    The interval is the mean plus and minus normal quantiles of its standard error between clusters, after one more
    cluster with a change of `unit` and one of −unit (Agresti and Min, Statistics in Medicine 2005). Without these, or
    with percentiles of a bootstrap, 4 pairs put right and none put wrong would exclude 0 at 95%, which a sign test does
    at 6 only. unit=0 is the plain interval, for changes of any size.

    Args:
        extra: a variance to add to that of the mean.

    Returns:
        value, low, high; NaN for no pairs.
    """
    if not len(change):
        return float("nan"), float("nan"), float("nan")
    mean, error = _error(change, of, unit)
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * float(np.sqrt(error**2 + extra))
    return float(change.mean()), mean - reach, mean + reach


def standard_error(change: np.ndarray, of: np.ndarray) -> float:
    """Of the mean of changes (n,) of pairs in clusters `of` (n,)."""
    return _error(change, of, 0.0)[1]


def _error(change: np.ndarray, of: np.ndarray, unit: float) -> tuple[float, float]:
    """The mean with two more clusters of ± unit (0: without), and its standard error."""
    _, at = np.unique(of, return_inverse=True)
    totals, sizes = np.bincount(at, weights=change), np.bincount(at).astype(float)
    if unit:
        totals, sizes = np.append(totals, [unit, -unit]), np.append(sizes, [1.0, 1.0])
    mean, count = float(totals.sum() / sizes.sum()), len(totals)
    if count < 2:
        return mean, float("nan")
    squares = float(((totals - sizes * mean) ** 2).sum()) * count / (count - 1)
    return mean, float(np.sqrt(squares) / sizes.sum())


def gains(before: np.ndarray, after: np.ndarray, found: Attributes, of: np.ndarray, confidence: float) -> list[Row]:
    """Rows of rewards before and after a clamp, (n, 2) each, of pairs in clusters `of` (n,).

    Of attribute "" the "gain": the change in the share of pairs that the reward gets right, a tie being half right. Of
    each attribute the same on the pairs whose chosen text has more of it ("gain_more"), or less ("gain_less"), or as
    much ("gain_same": within a tenth of the standard deviation of the differences). On these last, where there is
    nothing to take out, also "shift_same", the mean change of their rewards in standard deviations of all rewards, and
    "moved_same", the mean size of the change of their margin in standard deviations of all margins.
    """
    change = right(after) - right(before)
    rows = [Row("", "gain", *interval(change, of, confidence), len(change))]
    spread, margins = float(before.std()) or 1.0, np.diff(before, axis=1)[:, 0]
    moved = np.abs(np.diff(after - before, axis=1)[:, 0]) / (float(margins.std()) or 1.0)
    shift = (after - before).mean(axis=1) / spread
    for name in found.names:
        more = -np.diff(found[name].reshape(-1, 2))[:, 0]
        same = np.abs(more) <= SAME * more.std()
        for measure, some in (("more", ~same & (more > 0)), ("less", ~same & (more < 0)), ("same", same)):
            found_in = interval(change[some], of[some], confidence)
            rows.append(Row(name, f"gain_{measure}", *found_in, int(some.sum())))
        for measure, values in (("shift", shift), ("moved", moved)):
            found_in = interval(values[same], of[same], confidence, unit=0.0)
            rows.append(Row(name, f"{measure}_same", *found_in, int(same.sum())))
    return rows


def over_random(
    before: np.ndarray, after: np.ndarray, randoms: Sequence[np.ndarray], of: np.ndarray, confidence: float
) -> list[Row]:
    """Rows of what as many random neurons gain, the mean of several draws, and of a clamp's gain over that.

    Between the draws the gain varies, too: the variance of their mean is added to that of the pairs.
    """
    if not randoms:
        return []
    change, n = right(after) - right(before), len(before)
    drawn = np.stack([right(each) - right(before) for each in randoms])
    extra = float(drawn.mean(axis=1).var(ddof=1)) / len(drawn) if len(drawn) > 1 else 0.0
    return [
        Row("", "gain_random", *interval(drawn.mean(axis=0), of, confidence, extra=extra), n),
        Row("", "gain_over_random", *interval(change - drawn.mean(axis=0), of, confidence, extra=extra), n),
    ]
