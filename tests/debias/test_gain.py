"""Intervals of gains: the published formula, the level they state, clusters, and the subsets of pairs."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from rmfast.debias.gain import gains, interval, over_random
from rmfast.debias.measure import Attributes


def changes(won: int, lost: int, n: int) -> np.ndarray:
    return np.repeat([1.0, -1.0, 0.0], [won, lost, n - won - lost])


@pytest.mark.parametrize(("won", "lost", "n"), [(5, 2, 40), (0, 0, 10), (30, 11, 100)])
def test_the_interval_is_agresti_and_mins(won, lost, n):
    value, low, high = interval(changes(won, lost, n), np.arange(n), 0.95)
    b, c, m = won + 1, lost + 1, n + 2
    centre = (b - c) / m
    error = np.sqrt((b + c - (b - c) ** 2 / m) / m**2 * m / (m - 1))  # their m, or m − 1 as here
    z = NormalDist().inv_cdf(0.975)
    assert value == (won - lost) / n
    assert (low, high) == pytest.approx((centre - z * error, centre + z * error))


@pytest.mark.parametrize(("won", "above"), [(4, False), (5, False), (6, True)])
def test_few_pairs_exclude_zero_where_a_sign_test_does(won, above):
    assert (interval(changes(won, 0, 500), np.arange(500), 0.95)[1] > 0) == above
    assert (0.5**won < 0.025) == above


@pytest.mark.parametrize("changed", [0.02, 0.1, 0.5])
def test_no_gain_is_taken_for_one_at_the_stated_rate(changed):
    rng = np.random.default_rng(0)
    drawn = rng.choice([-1.0, 0.0, 1.0], (4000, 150), p=[changed / 2, 1 - changed, changed / 2])
    above = np.mean([interval(each, np.arange(150), 0.95)[1] > 0 for each in drawn])
    assert 0.01 * (changed > 0.05) < above < 0.025 + 3 * np.sqrt(0.025 * 0.975 / 4000)


def test_pairs_of_one_prompt_count_once():
    alone = interval(changes(12, 4, 40), np.arange(40), 0.95, unit=0.0)
    threefold = interval(np.repeat(changes(12, 4, 40), 3), np.repeat(np.arange(40), 3), 0.95, unit=0.0)
    assert threefold == pytest.approx(alone)


def test_each_subset_has_its_pairs():
    before = np.array([[0.0, 1], [0, 1], [1, 0], [1, 0], [1, 0], [0, 1]])
    after = np.array([[2.0, 1], [0, 1], [0, 1], [1, 0], [3, 0], [0, 0]])
    length = np.array([[9.0, 1], [9, 1], [1, 9], [5, 5], [5, 5], [5, 5]])
    attributes = Attributes(("length",), length.reshape(-1, 1))
    found = {(row.attribute, row.measure): row for row in gains(before, after, attributes, np.arange(6), 0.95)}
    assert found["", "gain"].value == pytest.approx((1 - 1 + 0.5) / 6)
    wanted = {"gain_more": (0.5, 2), "gain_less": (-1, 1), "gain_same": (0.5 / 3, 3)}
    for measure, (value, n) in wanted.items():
        assert (found["length", measure].value, found["length", measure].n) == (pytest.approx(value), n)
    assert found["length", "shift_same"].value == pytest.approx((0 + 1 - 0.5) / 3 / before.std())
    assert found["length", "moved_same"].value == pytest.approx((0 + 2 + 1) / 3 / np.diff(before).std())
    empty = gains(before, after, Attributes(("length",), np.arange(12.0)[:, None]), np.arange(6), 0.95)
    assert np.isnan([row[2:5] for row in empty if row.measure == "gain_more"]).all()


def test_draws_of_random_neurons_widen_the_interval():
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(80, 2)), rng.normal(size=(80, 2))
    one, other = rng.normal(size=(80, 2)), before.copy()
    same = over_random(before, after, [one, one, one], np.arange(80), 0.95)
    differ = over_random(before, after, [one, other, one], np.arange(80), 0.95)
    assert [row.measure for row in same] == ["gain_random", "gain_over_random"]
    gain = (np.diff(after) < 0).mean() - (np.diff(before) < 0).mean()
    assert same[0].value + same[1].value == pytest.approx(gain)
    assert differ[0].high - differ[0].low > 0
    assert over_random(before, after, [], np.arange(80), 0.95) == []
