"""What scores alone tell, against the formulas written out plainly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from audits import scored

from rmfast.audit import measures


def rewards(n: int = 100, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal([0.5, 0], 1.5, (n, 2))


def test_calibration_is_that_of_the_formula():
    given = rewards()
    found = measures.calibration(scored(given))
    margins = (given[:, 0] - given[:, 1]).tolist()
    order = sorted(margins, key=abs)
    error = 0.0
    assert len(found["bins"]) == 10
    for i, each in enumerate(found["bins"]):
        some = order[10 * i : 10 * i + 10]
        predicted = sum(1 / (1 + math.exp(-abs(m))) for m in some) / 10
        accuracy = sum(m > 0 for m in some) / 10
        assert each["n"] == 10
        assert each["value"] == pytest.approx(accuracy) and each["predicted"] == pytest.approx(predicted)
        assert (each["start"], each["end"]) == (pytest.approx(abs(some[0])), pytest.approx(abs(some[-1])))
        assert each["margin"] == pytest.approx(sum(map(abs, some)) / 10)
        assert each["low"] <= each["value"] <= each["high"]
        error += abs(accuracy - predicted) / 10
    assert found["error"] == pytest.approx(error)


def test_every_pair_is_in_one_range_and_one_bar_and_right_ones_are_on_the_right():
    given = rewards(57)
    found = measures.calibration(scored(given))
    assert sum(each["n"] for each in found["bins"]) == 57
    assert sum(bar["n"] for bar in found["bars"]) == 57
    right = sum(bar["n"] for bar in found["bars"] if bar["start"] >= 0)
    assert right == (given[:, 0] > given[:, 1]).sum()


@pytest.mark.parametrize("n", [1, 2, 15])
def test_ties_count_a_half_and_are_one_range(n):
    found = measures.calibration(scored(np.ones((n, 2))))
    (only,) = found["bins"]
    assert (only["value"], only["predicted"], only["n"], found["error"]) == (0.5, 0.5, n, 0.0)
    assert sum(bar["n"] for bar in found["bars"]) == n


def test_intervals_draw_prompts_together():
    """All pairs of one prompt: there is one thing to draw, of which little is known."""
    given = rewards(40)
    for each in measures.calibration(scored(given, prompts=[0] * 40))["bins"]:
        assert each["low"] < 0.5 < each["high"] and each["high"] - each["low"] > 0.8
    assert any(each["low"] < each["high"] for each in measures.calibration(scored(given))["bins"])


def test_the_mean_reward_by_length_is_that_of_the_formula():
    given = rewards()
    characters = np.random.default_rng(1).permutation(200).reshape(100, 2)
    found = measures.lengths(scored(given), characters, seed=0)
    pairs = sorted(zip(characters.ravel().tolist(), given.ravel().tolist()))
    assert found["texts"] == 200 and len(found["dots"]) == 200
    for i, each in enumerate(found["trend"]):
        some = pairs[20 * i : 20 * i + 20]
        assert each["n"] == 20
        assert each["value"] == pytest.approx(sum(reward for _, reward in some) / 20)
        assert each["characters"] == pytest.approx(sum(length for length, _ in some) / 20)
        assert each["low"] <= each["value"] <= each["high"]
    for dot in found["dots"]:
        i, side = np.argwhere(characters == dot["characters"])[0]
        assert dot["side"] == ["chosen", "rejected"][side] and dot["reward"] == pytest.approx(given[i, side], rel=1e-6)


def test_many_texts_are_thinned_and_counted():
    found = measures.lengths(scored(rewards(1500)), np.ones((1500, 2), int), seed=0)
    assert (len(found["dots"]), found["texts"]) == (2000, 3000)
