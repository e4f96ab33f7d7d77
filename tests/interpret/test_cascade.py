"""Misalignment cascade: correlations over the same items, by hand; no cascade, planted ones, one control for all."""

from __future__ import annotations

import json

import models as M
import numpy as np
import pytest
import torch
from scipy import stats

import rmfast
from rmfast.interpret.cascade import cascade, misalignment_cascade

KINDS = ["sabotage", "deceit", "flattery"]


def planted(seed, r=0.0, n=40, kinds=3):
    rng = np.random.default_rng(seed)
    common = rng.normal(size=n)
    return {k: np.sqrt(r) * common + np.sqrt(1 - r) * rng.normal(size=n) for k in [*KINDS, "more"][:kinds]}


def test_correlations_are_those_of_the_matched_items():
    given = planted(0, 0.5)
    found = cascade(given, resamples=50, permutations=50)
    want = np.corrcoef([given[k] for k in KINDS])
    np.testing.assert_allclose(found.matrix(), want)
    assert found["deceit", "sabotage"].value == pytest.approx(want[0, 1])
    assert found.together.value == pytest.approx(want[np.triu_indices(3, 1)].mean())
    assert found.means[1].value == pytest.approx(given["deceit"].mean())
    ranks = cascade(given, method="spearman", resamples=50, permutations=50)
    assert ranks["deceit", "flattery"].value == pytest.approx(
        stats.spearmanr(given["deceit"], given["flattery"]).statistic
    )


def test_items_are_matched_by_what_they_are_not_by_their_order():
    given, rng = planted(1, 0.5, n=60), np.random.default_rng(0)
    items, shuffled = {}, {}
    for k in KINDS:
        some = rng.permutation(60)[:52]
        items[k], shuffled[k] = some.tolist(), given[k][some]
    shared = sorted(set.intersection(*map(set, items.values())))
    found = cascade(shuffled, items=items, resamples=50, permutations=50)
    assert found.prompts == len(shared)
    np.testing.assert_allclose(found.matrix(), np.corrcoef([given[k][shared] for k in KINDS]))


def test_a_prompt_counts_once():
    given = planted(2, 0.5, n=60)
    prompts = [f"p{i // 2 if i < 40 else i}" for i in range(60)]
    means = {k: np.concatenate([x[:40].reshape(20, 2).mean(1), x[40:]]) for k, x in given.items()}
    found = cascade(given, prompts=prompts, resamples=50, permutations=50)
    assert found.prompts == 40
    np.testing.assert_allclose(found.matrix(), np.corrcoef([means[k] for k in KINDS]))


def test_what_is_held_fixed():
    given, hold = planted(3, 0.3), np.random.default_rng(5).normal(size=40)
    given = {k: x + hold for k, x in given.items()}
    found = cascade(given, hold=hold, resamples=50, permutations=50)
    design = np.column_stack([np.ones(40), hold])
    left = [x - design @ np.linalg.lstsq(design, x, rcond=None)[0] for x in given.values()]
    np.testing.assert_allclose(found.matrix(), np.corrcoef(left))


def found_of_nothing(make, count=200, n=30, **options):
    """How often any pair, and all together, are found correlated at a level of 5%."""
    pair = together = 0
    for seed in range(count):
        given, hold = make(np.random.default_rng(seed), n)
        found = cascade(given, hold=hold, resamples=1, permutations=99, seed=seed, **options)
        pair += min(row.p_all for row in found.rows) <= 0.05
        together += found.together.p <= 0.05
    return pair, together


def independent(rng, n):
    return {k: rng.normal(size=n) for k in "abcd"}, None


def of_what_is_held(rng, n):
    hold = rng.normal(size=n)
    return {k: hold + rng.normal(size=n) for k in "abcd"}, hold


def of_one_scale(rng, n):
    """Uncorrelated, yet not independent: rewards of some prompts are all further apart than those of others."""
    scale = np.exp(rng.normal(size=n))
    return {k: scale * rng.normal(size=n) for k in "abcd"}, None


@pytest.mark.parametrize("make", [independent, of_what_is_held, of_one_scale])
def test_without_a_cascade_one_in_twenty_is_found(make):
    for count in found_of_nothing(make):
        assert count <= stats.binom.ppf(0.999, 200, 0.05)


def test_kinds_that_never_differ_on_the_same_prompts_have_no_correlation_that_is_found():
    some, other = np.zeros(20), np.zeros(20)
    some[:2], other[2:4] = (1, -1), (1, -1)
    found = cascade({"a": some, "b": other}, resamples=5, permutations=50)
    assert found.rows[0].value == 0 and found.rows[0].p == 1


def test_intervals_hold_the_true_correlation_as_often_as_they_say():
    inside = 0
    for seed in range(150):
        row = cascade(planted(seed, 0.6, n=60), resamples=400, permutations=1, seed=seed)["sabotage", "deceit"]
        inside += row.low <= 0.6 <= row.high
    assert inside / 150 >= 0.87


def test_numbers_as_large_as_there_are_have_the_correlation_of_small_ones():
    given = planted(0, 0.5)
    found, want = (cascade({**given, "deceit": s * given["deceit"]}, resamples=50, permutations=50) for s in (1e300, 1))
    np.testing.assert_allclose(found.matrix("low"), want.matrix("low"))
    np.testing.assert_allclose(found.matrix("p"), want.matrix("p"))


def test_a_planted_cascade_is_found():
    found = cascade(planted(0, 0.7), resamples=200, permutations=499)
    assert all(row.p_all <= 0.05 and row.low > 0 for row in found.rows) and found.together.p <= 0.01


class Formula(rmfast.RewardModel):
    """Rewards by text: numbers that are given."""

    def score(self, inputs, **options):
        return torch.tensor([float(text.rsplit(" ", 1)[1]) for _, text in inputs])


def items(seed, n=40):
    """A model that errs independently in each text, controls included."""
    rng = np.random.default_rng(seed)
    return [(f"prompt {i}", {k: (f"is {rng.normal()}", f"not {rng.normal()}") for k in KINDS}) for i in range(n)]


@pytest.fixture(scope="module")
def rm():
    return Formula(M.decoder(), M.tokenizer())


def test_texts_of_items_are_scored_in_one_run_and_matched(rm):
    some = items(0)
    found = misalignment_cascade(rm, some, resamples=50, permutations=50)
    number = {k: [[float(x.rsplit(" ", 1)[1]) for x in kinds[k]] for _, kinds in some] for k in KINDS}
    apart = [np.diff(number[k], axis=1)[:, 0] for k in KINDS]
    np.testing.assert_allclose(found.matrix(), np.corrcoef(apart), atol=1e-6)


@pytest.mark.parametrize("a, b", [(("c", "x"), ("c", "y")), (("c", "x"), ("d", "x")), (("c", "x"), ("x", "y"))])
def test_one_response_for_two_kinds_of_a_prompt_is_refused(rm, a, b):
    for some in ([("p", {"a": a, "b": b})], [("p", {"a": a, "b": ("1", "2")}), ("p", {"a": ("3", "4"), "b": b})]):
        with pytest.raises(ValueError, match=r"responses of its own.*for 'a' and 'b' in item"):
            misalignment_cascade(rm, some)


def test_the_reward_of_one_control_does_not_make_up_for_it_where_prompts_differ():
    """Why there is no such option: the control's reward is the prompt's, too, which the differences are without."""

    def make(rng, n):
        prompt = rng.normal(size=n)
        control = prompt + rng.normal(size=n)
        return {k: prompt + rng.normal(size=n) - control for k in "abcd"}, control

    assert found_of_nothing(make, 20)[1] > 15


def test_real_rewards_of_a_model():
    rm = rmfast.RewardModel(M.decoder(max_position_embeddings=256), M.tokenizer(chat=True))
    some = [(f"ask {i}", {k: (f"{k} fine {i}", f"{k} bad {i * i}") for k in KINDS}) for i in range(20)]
    found = misalignment_cascade(rm, some, resamples=20, permutations=20)
    failing, control = (rm.score([(p, kinds[k][side]) for k in KINDS for p, kinds in some]) for side in (1, 0))
    want = (failing - control).reshape(3, 20).numpy()
    np.testing.assert_allclose(found.matrix(), np.corrcoef(want), atol=1e-5)


def test_what_it_writes(tmp_path):
    found = cascade(planted(0, 0.5), resamples=50, permutations=50)
    found.save(tmp_path / "cascade.json")
    kept = json.loads((tmp_path / "cascade.json").read_text())
    assert kept["names"] == KINDS and len(kept["rows"]) == 3 and kept["together"]["value"] == found.together.value
    assert "pearson correlations over 40 prompts" in repr(found) and "sabotage" in found._repr_html_()
    assert len(found.to_dataframe()) == 3
    assert np.isnan(found.matrix("p")[0, 0]) and found.matrix("p")[0, 1] == found.rows[0].p
    pytest.importorskip("matplotlib")
    assert len(found.plot().images) == 1


@pytest.mark.parametrize(
    "given, options, match",
    [
        ({"a": [1.0] * 20}, {}, "at least two kinds"),
        ({"a": range(19), "b": range(19)}, {}, "at least 20 prompts, got 19"),
        ({"a": range(20), "b": [1.0] * 20}, {}, "differences of 'b' that differ between prompts"),
        ({"a": range(20), "b": range(21)}, {}, "Expected items"),
        ({"a": range(20), "b": [*range(19), float("nan")]}, {}, "differences of 'b' to be finite"),
        ({"a": range(20), "b": range(20)}, {"items": {"a": range(20)}}, "items of 'b'"),
        ({"a": range(20), "b": range(20)}, {"items": {"a": range(20), "b": [1] * 20}}, "got one twice"),
        ({"a": range(20), "b": range(20)}, {"hold": range(19)}, "hold to be one for each item, got 19"),
        ({"a": range(20), "b": range(20)}, {"prompts": range(21)}, "prompts to be one for each item, got 21"),
        (
            {"a": range(20), "b": range(20)},
            {"items": {k: range(-1, 19) for k in "ab"}, "hold": range(20)},
            "hold of every item, by item, got none of -1",
        ),
        ({"a": range(20), "b": range(0, 40, 2)}, {"hold": range(20)}, "no linear function of what is held fixed"),
        ({"a": range(20), "b": range(20)}, {"method": "kendall"}, "method"),
        ({"a": range(20), "b": range(20)}, {"confidence": 1}, "confidence"),
    ],
)
def test_what_has_no_correlation_is_refused_by_name(given, options, match):
    with pytest.raises(ValueError, match=match):
        cascade(given, **options)


@pytest.mark.parametrize(
    "some, match",
    [
        ([("p", "text")], r"item 0 to be \(prompt"),
        ([("p", {"a": "text"})], r"\(control, failing\) of 'a' in item 0"),
        ([("p", {"a": ("x", "")})], r"\(control, failing\) of 'a' in item 0"),
    ],
)
def test_items_of_another_form_are_refused(rm, some, match):
    with pytest.raises(ValueError, match=match):
        misalignment_cascade(rm, some)


def test_several_rewards_are_refused():
    with pytest.raises(ValueError, match="one reward, got one of 2"):
        misalignment_cascade(rmfast.RewardModel(M.decoder(labels=2), M.tokenizer()), items(0, False))
