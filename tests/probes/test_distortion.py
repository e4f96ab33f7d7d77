"""The distortion index: its formula written out, planted tastes, no taste, and two models on one scale."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from rmfast import probes
from rmfast.probes.result import probed
from rmfast.probes.statistics import spread_within
from rmfast.resampling import clusters

SUITE = [("a", "one"), ("b", "one"), ("c", "two"), ("placebo", "placebo"), ("typos", "typos")]


def found(seed, tastes=(0, 0, 0, 0, 0), prompts=40, scale=1.0, resamples=400, noise=1.0):
    """A suite's result by formula: `tastes` in spreads, differences of which a half of the variance is a prompt's."""
    rng = np.random.default_rng(seed)
    names = tuple(f"p{i // 2}" for i in range(2 * prompts))
    rewards = np.repeat(rng.normal(0, 3, prompts), 2) + rng.normal(0, 1, 2 * prompts)
    differences, of = {}, {}
    for (name, _), taste in zip(SUITE, tastes):
        some = np.sort(rng.choice(2 * prompts, 3 * prompts // 2, replace=False))
        own = noise * (rng.normal(size=prompts)[some // 2] + rng.normal(size=len(some)))
        differences[name], of[name] = scale * (taste + own), tuple(some.tolist())
    rewards = scale * rewards
    return probed(
        [(name, axis, float("nan")) for name, axis in SUITE], differences, of, names,
        spread_within(rewards, clusters(names)), 1.0, 0.05, 0.95, resamples, seed, {}, 0, rewards,
    )  # fmt: skip


def by_hand(f, drawn):
    """D of each axis, with a prompt for each of `drawn`, twice the sampling variance off where it is a resample."""
    times = 1 if drawn == sorted(set(drawn)) and len(set(drawn)) == 40 else 2
    within = sum(((f.rewards[2 * p : 2 * p + 2] - f.rewards[2 * p : 2 * p + 2].mean()) ** 2).sum() for p in drawn)
    squares = {}
    for name, axis in SUITE:
        at = np.array(f.of[name]) // 2
        means = np.array([f.differences[name][at == p].mean() for p in drawn if (at == p).any()])
        square = means.mean() ** 2 - times * means.var() / (len(means) - 1)
        squares.setdefault(axis, []).append(square / (within / len(drawn)))
    axes = {axis: np.mean(some) for axis, some in squares.items()}
    return {axis: max(x, 0) ** 0.5 for axis, x in {**axes, "all": (axes["one"] + axes["two"]) / 2}.items()}


def test_the_formula():
    f = found(0, (1.0, -0.5, 0.2, 0, 0))
    d = probes.distortion(f)
    want = by_hand(f, list(range(40)))
    assert [row.axis for row in d.rows] == ["all", "one", "two"] and [row.probes for row in d.rows] == [3, 2, 1]
    for row in d.rows:
        assert row.value == pytest.approx(want[row.axis]), row


def test_a_resample_draws_prompts_with_all_their_edits():
    f = found(1, (1.0, -0.5, 0.2, 0, 0), resamples=5)
    d = probes.distortion(f)
    times = np.random.default_rng(1).multinomial(40, np.full(40, 1 / 40), size=5)
    for i, counts in enumerate(times):
        want = by_hand(f, np.repeat(np.arange(40), counts).tolist())
        assert {name: float(d.draws[name][i]) for name in d.draws} == pytest.approx(
            {name: want[name] for name in ("all", "one", "two")}
        )


def test_a_reward_without_taste_has_an_index_of_about_0_whatever_the_noise():
    """0 is outside of the interval in no more than one of twenty; of a plain root mean square it always would be."""
    outside = [probes.distortion(found(seed, prompts=25))["all"].low > 0 for seed in range(80)]
    assert sum(outside) <= 7
    plain = [np.sqrt(np.mean([(e.mean / 1.0) ** 2 for e in found(seed).effects])) for seed in range(5)]
    assert min(plain) > 0.05


def test_the_interval_holds_the_true_index_as_often_as_it_says():
    tastes = (0.8, -0.6, 0.4, 0, 0)
    true = np.sqrt(((0.8**2 + 0.6**2) / 2 + 0.4**2) / 2)
    inside = 0
    for seed in range(80):
        _, _, _, low, high = probes.distortion(found(seed, tastes))["all"]
        inside += low <= true <= high
    assert inside / 80 >= 0.88  # 95% less two standard errors and a half


def test_the_scale_of_the_reward_is_no_part_of_it():
    one, other = (probes.distortion(found(0, (1, 0, 1, 0, 0), scale=scale)) for scale in (1.0, 50.0))
    assert [row[2:] for row in one.rows] == [pytest.approx(row[2:]) for row in other.rows]


def test_two_models_are_compared_on_the_same_draws():
    strong, weak = (probes.distortion(found(3, tastes)) for tastes in ((1.5, 1.5, 1.5, 0, 0), (0.2, 0, 0, 0, 0)))
    apart = strong.minus(weak)
    assert apart["all"].value == pytest.approx(strong["all"].value - weak["all"].value) and apart["all"].low > 0
    np.testing.assert_array_equal(apart.draws["two"], strong.draws["two"] - weak.draws["two"])
    assert strong.minus(strong)["all"][2:] == (0, 0, 0)
    with pytest.raises(ValueError, match="two models on the same pairs"):
        strong.minus(probes.distortion(found(4)))
    with pytest.raises(ValueError, match="two models on the same pairs"):
        strong.minus(probes.distortion(found(3), axes=["one"]))
    with pytest.raises(ValueError, match="two models on the same pairs"):
        apart.minus(apart)


def test_what_it_writes(tmp_path):
    d = probes.distortion(found(0, (1, 1, 1, 0, 0)))
    d.save(tmp_path / "distortion.json")
    kept = json.loads((tmp_path / "distortion.json").read_text())
    assert kept["prompts"] == 40 and kept["rows"][0]["value"] == d["all"].value
    dataclasses.replace(d, rows=[d.rows[0]._replace(low=float("nan"))]).save(tmp_path / "distortion.json")
    assert json.loads((tmp_path / "distortion.json").read_text())["rows"][0]["low"] is None
    assert "Distortion index, in spreads; 40 prompts" in repr(d) and "<table>" in d._repr_html_()
    assert list(d.to_dataframe()["axis"]) == ["all", "one", "two"]
    pytest.importorskip("matplotlib")
    assert len(d.plot().get_yticklabels()) == 3


def test_refusals():
    f = found(0)
    with pytest.raises(ValueError, match="axes to be of one, two, placebo, typos"):
        probes.distortion(f, axes=["three"])
    with pytest.raises(ValueError, match="got a difference of two"):
        probes.distortion(f.minus(f))
    with pytest.raises(TypeError, match="found to be a Probed"):
        probes.distortion([1])
    assert probes.distortion(f, axes=["placebo"])["placebo"].probes == 1
    with pytest.raises(ValueError, match="axis"):
        probes.distortion(f)["three"]
