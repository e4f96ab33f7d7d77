"""Counts of patches that diverge and have an effect, from sweeps written by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import rmfast
from rmfast.interpret.pernicious import pernicious


def sweep(effect, divergence, gap=2.0, level=0.9, **more):
    """Layers by positions of a noising sweep of base reward 1."""
    effect, divergence = (torch.tensor(x, dtype=torch.float64) for x in (effect, divergence))
    layers, positions = effect.shape
    made = {
        "rewards": 1 + effect, "axes": ("layer", "position"), "divergence": divergence,
        "coords": {"layer": list(range(layers)), "position": [[t] for t in range(positions)]},
        "clean_reward": torch.tensor(1.0), "corrupted_reward": torch.tensor(1.0 + gap), "base": "clean",
        "mode": "noising", "tokens": ["a"] * positions, "token_ids": [0] * positions, "engine": "suffix",
        "reference": {"level": level, "texts": 80, "held_out": 40},
    }  # fmt: skip
    return rmfast.PatchSweep(**{**made, **more})


NAN = float("nan")
ONE = sweep([[0.5, 0.1, -0.9], [0.3, NAN, 0.0]], [[2.0, 3.0, 0.5], [-1.5, NAN, NAN]])


def test_strong_and_divergent_sites_are_counted():
    found = pernicious(ONE)  # strong: above 0.2
    assert (found.judged, found.divergent, found.strong, found.pernicious) == (4, 3, 3, 2)
    assert found.expected == pytest.approx(0.4) and found.each.tolist() == [pytest.approx(2 / 3)]
    assert found.of_strong is None  # of one pair there is no interval
    assert str(found) == "2 of 3 strong sites are divergent; of all 4 judged 3 (by chance 0.4)"


def test_the_gap_s_share_and_a_gap_of_one_s_own():
    assert pernicious(ONE, share=0.2).strong == 2
    assert pernicious(ONE, gap=-6.0).strong == 1
    alone = sweep([[0.5]], [[2.0]], mode="zero", corrupted_reward=None)
    assert pernicious(alone, gap=1).pernicious == 1
    with pytest.raises(ValueError, match="Expected gap, a number, for mode 'zero'"):
        pernicious(alone)


def test_over_pairs_the_share_has_an_interval_by_pairs():
    rng = np.random.default_rng(0)
    many = [sweep(rng.normal(size=(3, 4)), rng.normal(size=(3, 4))) for _ in range(20)]
    found = pernicious(many)
    each = [float((s.divergent & (s.effect.abs() > 0.2)).sum() / (s.effect.abs() > 0.2).sum()) for s in many]
    np.testing.assert_allclose(found.each, each)
    assert found.of_strong.n == 20 and found.of_strong.value == pytest.approx(np.mean(each))
    assert found.of_strong.low < found.of_strong.value < found.of_strong.high
    none = sweep([[0.0]], [[0.0]])  # without a strong site a pair has no share
    assert np.isnan(pernicious([*many, none]).each[-1]) and pernicious([*many, none]).of_strong.n == 20


@pytest.mark.parametrize(
    "sweeps, more, message",
    [
        ([], {}, "sweeps to hold at least one"),
        ([ONE, sweep([[0.1]], [[0.1]], level=0.8)], {}, "references of one level"),
        ([sweep([[0.1]], [[0.1]], reference=None)], {}, "references of one level"),
        ([ONE], {"gap": [1, 2]}, "gap to be a number, or one for each of 1 sweeps, got 2"),
        ([ONE], {"share": -1}, "share to be a finite number of at least 0"),
    ],
)
def test_wrong_arguments_are_named(sweeps, more, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pernicious(sweeps, **more)
