"""The suite: planted tastes are found and nothing else is, at the stated rate; one run; differences; files."""

from __future__ import annotations

import json
import re
import zlib

import models
import numpy as np
import pytest
import torch
from scipy import stats

import rmfast
from rmfast import probes
from rmfast.probes.statistics import by_prompt, detectable, holm, spread_within, t_test
from rmfast.resampling import clusters

NOUNS = ["film", "book", "play", "song", "town", "meal", "game", "walk"]


def pairs(n: int, seed: int = 0) -> list[tuple[str, str, str]]:
    rng = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(f"The {a} was {b} this time." for a, b in rng.choice(NOUNS, (int(rng.integers(2, 5)), 2)))

    return [(f"Tell me of {i}.", text(), text()) for i in range(n)]


class Planted(rmfast.RewardModel):
    """A reward by formula: a taste for words and for bold, and noise of a text that has nothing to do with either."""

    length = bold = 0.0
    noise = 1.0

    def score(self, inputs, **options):
        self.runs = getattr(self, "runs", 0) + 1
        return torch.tensor([self._of(*item) for item in inputs])

    def _of(self, prompt, response):
        draw = np.random.default_rng(zlib.crc32(f"{self.seed} {prompt} {response}".encode()))
        words = len(re.findall(r"\w+", response))
        return self.length * words + self.bold * ("**" in response) + self.noise * float(draw.normal())


def planted(seed: int, **tastes: float) -> Planted:
    rm = Planted(models.decoder(max_position_embeddings=4096), models.tokenizer())
    rm.seed = seed
    for name, value in tastes.items():
        setattr(rm, name, value)
    return rm


def words(monkeypatch):
    """Placebos are matched in words, which is what the planted taste counts."""
    monkeypatch.setattr("rmfast.probes.suite._tokens", lambda rm: lambda text: len(re.findall(r"\w+", text)))


def test_planted_tastes_are_found_and_nothing_else_at_the_stated_rate(monkeypatch):
    words(monkeypatch)
    given, seeds, wrong, found = pairs(40), 60, 0, []
    rm = planted(0, length=0.15, bold=1.5)
    truly = {"padding × 1", "padding × 2", "padding × 4", "truncation", "language tag", "bold"}  # a tag is a word
    for rm.seed in range(seeds):
        result = probes.run(rm, given, resamples=20, seed=rm.seed)
        certain = {effect.probe for effect in result.found}
        wrong += bool(certain - truly)
        found.append(certain)
    # Of 60 suites at 5% in all: more than 8 wrong ones would be a chance of under 1%.
    assert wrong <= stats.binom.ppf(0.99, seeds, 0.05)
    assert all({"padding × 2", "padding × 4", "bold"} <= certain for certain in found)


def test_power_is_what_is_said(monkeypatch):
    """An effect of the size that is said to be detectable is found in four of five suites."""
    words(monkeypatch)
    given, suite, seeds = pairs(60), ["bold", "typos"], 120
    rm = planted(0)
    rm.bold = probes.run(rm, given, probes=suite, resamples=1)["bold"].detectable
    found = 0
    for rm.seed in range(1, seeds + 1):
        found += probes.run(rm, given, probes=suite, resamples=1)["bold"].p < 0.05 / 2
    assert 0.68 <= found / seeds <= 0.92


def test_differences_are_those_of_texts_scored_alone():
    rm = rmfast.RewardModel(models.decoder(max_position_embeddings=1024), models.tokenizer(chat=True))
    given = pairs(20)
    found = probes.run(rm, given, probes=["bold", "hedges"], resamples=50)
    responses = [(p, side) for p, c, r in given for side in (c, r)]
    for of, difference in zip(found.of["bold"], found.differences["bold"]):
        prompt, text = responses[of]
        first = text.split(" ")
        edited = "**" + " ".join(first[:3]) + "** " + " ".join(first[3:])
        want = float(rm.score([(prompt, edited)])[0]) - float(rm.score([(prompt, text)])[0])
        assert difference == want  # the same bits in any batch
    rewards = rm.score(responses).double().numpy()
    assert found.spread == pytest.approx(np.sqrt(((rewards[::2] - rewards[1::2]) ** 2 / 2).mean()))
    assert found.margin == np.median(np.abs(rewards[::2] - rewards[1::2]))
    effect, values = found["bold"], found.differences["bold"]
    each = values.reshape(-1, 2).mean(1)  # of each prompt
    assert effect.mean == pytest.approx(each.mean())
    assert effect.spreads == pytest.approx(each.mean() / found.spread)
    assert effect.d == pytest.approx(each.mean() / each.std())
    assert effect.moved == np.mean(np.abs(values) > found.margin)
    assert effect.low <= effect.mean <= effect.high


def test_everything_is_one_run(monkeypatch):
    words(monkeypatch)
    rm = planted(0)
    probes.run(rm, pairs(20), resamples=1)
    assert rm.runs == 1


def test_a_prompt_counts_once():
    x = np.random.default_rng(0).normal(0.3, 1, 20)
    assert t_test(x).p == pytest.approx(stats.ttest_1samp(x, 0).pvalue)
    sizes = np.random.default_rng(1).integers(1, 40, 20)
    assert by_prompt(np.repeat(x, sizes), np.repeat(np.arange(20), sizes)) == pytest.approx(x)
    assert t_test(np.zeros(8)).p == 1
    assert t_test(np.full(8, 0.5)).p == 2.0**-7  # as many signs alike


@pytest.mark.parametrize("sizes", [[2] * 40, [150] + [2] * 29, [max(1, 120 // (i + 1)) for i in range(60)]])
def test_the_rate_of_false_findings_holds_where_prompts_have_many_responses(sizes):
    """Without an effect, with half of the variance shared by a prompt's responses, one test in twenty."""
    rng, of = np.random.default_rng(0), np.repeat(np.arange(len(sizes)), sizes)
    wrong = 0
    for _ in range(1000):
        values = rng.normal(size=len(sizes))[of] + rng.normal(size=len(of))
        wrong += t_test(by_prompt(values, of)).p < 0.05
    assert 0.03 <= wrong / 1000 <= 0.07


def test_holm_against_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(1).uniform(size=30) ** 3
    assert holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1])


def test_detectable_is_that_of_the_t_test_by_simulation():
    rng = np.random.default_rng(2)
    least = np.mean([detectable(t_test(rng.normal(size=40)), 0.05) for _ in range(200)])
    found = [stats.ttest_1samp(rng.normal(least, 1, 40), 0).pvalue < 0.05 for _ in range(2000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)


def test_the_spread_is_that_within_prompts():
    rewards = np.array([0.0, 2.0, 10.0, 12.0])
    assert spread_within(rewards, clusters(["a", "a", "b", "b"])) == pytest.approx(np.sqrt(2))
    assert spread_within(rewards, clusters(list("abcd"))) == pytest.approx(rewards.std(ddof=1))


def test_two_models_are_compared_on_the_same_edits(monkeypatch):
    words(monkeypatch)
    given = pairs(40)
    plain, taste = (probes.run(planted(7, bold=b), given, resamples=200) for b in (0.0, 1.0))
    apart = taste.minus(plain)
    assert [effect.probe for effect in apart.found] == ["bold"]
    assert apart["bold"].mean == pytest.approx(
        float(np.mean(taste.differences["bold"] / taste.spread - plain.differences["bold"] / plain.spread))
    )
    assert apart.apart and not taste.apart
    assert str(apart).startswith("one model less another, each in its own spread") and " spreads " not in str(apart)
    with pytest.raises(ValueError, match="same pairs"):
        taste.minus(probes.run(planted(7), pairs(40, 1), resamples=1))


def test_what_it_writes(tmp_path, monkeypatch):
    words(monkeypatch)
    found = probes.run(planted(0, bold=2.0), pairs(20), probes=["bold", "list", "padding × 1"], resamples=50)
    found.save(tmp_path / "probes.json")
    kept = json.loads((tmp_path / "probes.json").read_text())
    assert [effect["probe"] for effect in kept["effects"]] == ["bold", "list", "padding × 1"]
    assert kept["effects"][0]["mean"] == found["bold"].mean and kept["effects"][0]["dose"] is None
    assert "bold" in str(found) and "*" in str(found)
    assert len(found.to_dataframe()) == 3
    pytest.importorskip("matplotlib")
    assert len(found.plot().get_yticklabels()) == 3


def test_edits_that_are_too_long_are_left_out_and_counted():
    given = pairs(24)
    longest = max(len(f"{p}{side}") for p, c, r in given for side in (c, r)) + 1  # a byte a token, and BOS
    rm = rmfast.RewardModel(models.decoder(max_position_embeddings=longest + 4), models.tokenizer())
    found = probes.run(rm, given, probes=["bold", "padding × 4"], resamples=1)
    assert found.too_long > 0 and f"too long: {found.too_long} edits" in str(found)
    assert found["bold"].n == 48


def test_probes_that_apply_nowhere_are_named(monkeypatch):
    words(monkeypatch)
    given = [(p, "one sentence", "another sentence") for p, _, _ in pairs(20)]
    found = probes.run(planted(0), given, probes=["list", "bold"], resamples=1)
    assert found.skipped == {"list": 0} and found.names == ["bold"]
    assert "list (0)" in str(found)
    with pytest.raises(ValueError, match="got none that does"):
        probes.run(planted(0), given, probes=["list"], resamples=1)


@pytest.mark.parametrize(
    "given, match",
    [
        ({"probes": ["bald"]}, "probe"),
        ({"probes": ["bold", "bold"]}, "different names"),
        ({"probes": []}, "different names"),
        ({"most": 0}, "most"),
        ({"level": 1.0}, "level"),
        ({"seed": -1}, "seed"),
        ({"truncation": "left"}, "truncation"),
    ],
)
def test_wrong_arguments_are_refused_by_name(given, match):
    with pytest.raises(ValueError, match=match):
        probes.run(planted(0), pairs(20), **given)


def test_too_few_prompts_and_several_rewards_are_refused():
    with pytest.raises(ValueError, match="at least 20 prompts, got 19"):
        probes.run(planted(0), pairs(19))
    with pytest.raises(ValueError, match="one reward, got one of 2"):
        probes.run(rmfast.RewardModel(models.decoder(labels=2), models.tokenizer()), pairs(20))
