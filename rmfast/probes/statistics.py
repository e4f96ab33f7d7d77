"""Effects of edits: paired differences by prompt, and tests over all probes at once.

A prompt counts once, however many responses it has: its value is the mean of its responses' differences. A standard
error over responses that share prompts is far too small where some prompts have many of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats

from rmfast.resampling import drawn

POWER = 0.8


class Effect(NamedTuple):
    """What one probe does to the reward, over `n` responses to `prompts` prompts.

    mean, low, high: reward of the edited less that of its control, a prompt counting once. spreads: mean in units of
    the reward's spread between responses to a prompt. d, d_low, d_high: mean over the standard deviation between
    prompts. moved: share of responses moved by more than a typical preference margin. p: two-sided, of a mean of 0;
    p_holm: after Holm's correction for all probes. detectable: the least mean that is found with a power of 80% at the
    corrected level.
    """

    probe: str
    axis: str
    dose: float
    n: int
    prompts: int
    mean: float
    low: float
    high: float
    spreads: float
    d: float
    d_low: float
    d_high: float
    moved: float
    p: float
    p_holm: float
    detectable: float


class Tested(NamedTuple):
    """The standard error of a mean over prompts, p value and degrees of freedom."""

    error: float
    p: float
    degrees: int


def by_prompt(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """(G,) the mean of each prompt's values (n,), of the prompts `of` (n,)."""
    return np.bincount(of, weights=values) / np.bincount(of)


def t_test(values: np.ndarray) -> Tested:
    """The t test of a mean of 0, over prompts (G,).

    p is at least 2^(1 − G), that of a sign test of values that all have one sign: equal ones, as quantised rewards have
    them, would give 0.
    """
    count = len(values)
    if count < 2:
        return Tested(float("nan"), 1.0, 0)
    error, mean = float(values.std(ddof=1)) / count**0.5, float(values.mean())
    if error <= 1e-12 * abs(mean):
        p = 1.0 if mean == 0 else 0.0
    else:
        p = float(2 * stats.t.sf(abs(mean) / error, count - 1))
    return Tested(error, max(p, 2.0 ** (1 - count)), count - 1)


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's correction: the step-down Bonferroni, which holds whatever the tests share."""
    order = np.argsort(p, kind="stable")
    scaled = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    out = np.empty(len(p))
    out[order] = np.minimum(scaled, 1)
    return out


def detectable(test: Tested, level: float) -> float:
    """The least mean that a two-sided test at this level finds with a power of 80%."""
    if not test.degrees:
        return float("nan")
    return float(test.error * (stats.t.isf(level / 2, test.degrees) + stats.t.isf(1 - POWER, test.degrees)))


def standardised(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(b,) mean over standard deviation of values (n,) under weights (b, n); 0 where all are 0."""
    total = weights.sum(1)
    mean = weights @ values / total
    spread = np.sqrt(np.maximum(weights @ values**2 / total - mean**2, 0))
    return np.divide(mean, spread, out=np.where(mean == 0, 0.0, np.copysign(np.inf, mean)), where=spread > 0)


def intervals(values: np.ndarray, resamples: int, confidence: float, seed: int) -> np.ndarray:
    """(2, 2): low and high of the mean, and of d, by percentiles of a bootstrap over prompts (G,)."""
    each = [
        np.stack([weights @ values / weights.sum(1), standardised(values, weights)])
        for weights in drawn(np.arange(len(values)), resamples, seed)
    ]
    tail = (1 - confidence) / 2
    found = np.concatenate(each, axis=1)
    return np.quantile(found, [tail, 1 - tail], axis=1, method="nearest").T


def spread_within(rewards: np.ndarray, of: np.ndarray) -> float:
    """The standard deviation of rewards of responses to one prompt, pooled over prompts of several; over all responses,
    where no prompt has several."""
    count = np.bincount(of)
    means = np.bincount(of, weights=rewards) / count
    degrees = int((count - 1).sum())
    if not degrees:
        return float(rewards.std(ddof=1)) if len(rewards) > 1 else float("nan")
    return float(np.sqrt(((rewards - means[of]) ** 2).sum() / degrees))
