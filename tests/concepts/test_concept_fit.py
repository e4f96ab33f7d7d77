"""Concepts: a planted one is found, of nothing no more than is said; directions by hand; as a DirectionRemoval."""

from __future__ import annotations

import models as M
import numpy as np
import planted
import pytest
import torch
from scipy import stats

import rmfast
from rmfast import concepts
from rmfast.concepts.concept import _gap
from rmfast.concepts.labels import MeanDifference, held_out, shuffled_labels, told_right

QUICK = {"shuffles": 40, "resamples": 200}
PAIRS = [(f"ask {i}", f"yes {i * i}", f"no, not {i}") for i in range(24)]


def plus(n=30, seed=0):
    """Pairs that differ in + and −, each of a prompt of its own."""
    return [(f"say {i}:", a, b) for i, (_, a, b) in enumerate(planted.pairs(n, seed))]


@pytest.fixture(scope="module")
def likes_plus():
    return planted.biased()


def test_a_planted_concept_is_found(likes_plus):
    """Channel 1 of the stream is the mean of + and −."""
    found = concepts.fit(likes_plus, plus(), name="plus", **QUICK)
    assert found.direction[1] > 0.99 and found.direction.norm() == pytest.approx(1)
    assert found.accuracy.value == 1 and found.p == pytest.approx(1 / 41) and 0.3 < found.chance < 0.7
    assert found.selectivity == pytest.approx(1 - found.chance) and found.gap.low > 1
    assert found.shuffled.shape == (40, 16)


def test_the_logistic_probe_finds_it_too(likes_plus):
    pytest.importorskip("sklearn")
    found = concepts.fit(likes_plus, plus(), method="logistic", folds=2, shuffles=19, resamples=20)
    assert found.accuracy.value > 0.95 and found.p == 0.05 and found.direction[1] > 0
    texts = [(p, side) for p, *both in plus() for side in both]
    weights = found.direction * concepts.activations(likes_plus, texts).std(
        0
    )  # as they are of standardised activations
    assert weights.abs().argmax() == 1


@pytest.mark.parametrize("site, layer", [("final", None), ("normed", None), ("mlp_out", 0)])
def test_the_mean_difference_by_hand(site, layer):
    rm = rmfast.RewardModel(M.decoder(), M.tokenizer(chat=True))
    found = concepts.fit(rm, PAIRS, site=site, layer=layer, **QUICK)
    with_, without = (
        concepts.activations(rm, [(p, sides[i]) for p, *sides in PAIRS], site=site, layer=layer).double()
        for i in (0, 1)
    )
    want = (with_ - without).mean(0)
    torch.testing.assert_close(found.direction.double(), want / want.norm(), rtol=1e-5, atol=1e-6)
    projected = [x @ (want / want.norm()) for x in (with_, without)]
    spread = np.sqrt(np.mean([float(x.var(correction=0)) for x in projected]))
    assert found.spread == pytest.approx(spread) and found.mean == pytest.approx(float(torch.cat(projected).mean()))
    part, out = np.random.default_rng(0).permutation(24) % 5, torch.empty(2, 24, dtype=torch.float64)
    for i in range(5):  # the gap is along directions of the other prompts' pairs
        own, held = torch.from_numpy(part != i), torch.from_numpy(part == i)
        u = (with_ - without)[own].mean(0)
        centre = torch.cat([with_[own], without[own]]).mean(0)
        out[:, held] = torch.stack([(x[held] - centre) @ (u / u.norm()) for x in (with_, without)])
    spread = float(out.var(1, correction=0).mean().sqrt())
    assert found.gap.value == pytest.approx(float(out[0].mean() - out[1].mean()) / spread)


def test_logistic_weights_are_those_of_scikit_learn_in_all_dimensions():
    linear = pytest.importorskip("sklearn.linear_model")
    from rmfast.concepts.labels import Logistic

    rng = np.random.default_rng(0)
    for d in (6, 90):  # fewer and more than the 40 rows
        with_, without = rng.normal(0.5, 1, (20, d)), rng.normal(0, 2, (20, d))
        x = np.concatenate([with_, without])
        scaled = (x - x.mean(0)) / x.std(0)
        model = linear.LogisticRegression(C=0.1, max_iter=5000, tol=1e-8).fit(scaled, np.repeat([1, 0], 20))
        got = Logistic(with_, without, 0.1).directions(np.ones((1, 20)), np.arange(20))[0]
        np.testing.assert_allclose(got, model.coef_[0] / x.std(0), rtol=1e-2, atol=1e-3)


def test_held_out_pairs_are_told_by_other_prompts_pairs_alone():
    rng = np.random.default_rng(0)
    with_, without, of = rng.normal(size=(30, 8)), rng.normal(size=(30, 8)), np.arange(30) // 2
    labels = shuffled_labels(of, 3, 0)
    assert (labels[:, ::2] == labels[:, 1::2]).all()  # of a prompt together
    right = told_right(MeanDifference(with_, without), labels, of, 5, 0)
    part = np.random.default_rng(0).permutation(15) % 5
    for row, signs in zip(right, labels):
        for pair in range(30):
            others = part[of] != part[of[pair]]
            direction = (signs[others, None] * (with_ - without)[others]).mean(0)
            assert row[pair] == (signs[pair] * (with_ - without)[pair] @ direction > 0)


def test_of_nothing_there_is_no_gap():
    """Along the direction of the pairs themselves it would be 3 spreads."""
    gaps = []
    for seed in range(30):
        with_, without = np.random.default_rng(seed).normal(size=(2, 40, 200))
        along = held_out(MeanDifference(with_, without), with_, without, np.arange(40), 5, seed)
        gaps.append(_gap(along, np.arange(40), 0.95, 1, 0).value)
    assert abs(np.mean(gaps)) < 0.2


@pytest.mark.parametrize("each", [1, 3])
def test_nothing_is_found_at_the_stated_rate(each):
    """Activations that share a part by prompt, and labels that mean nothing."""
    wrong, of = 0, np.repeat(np.arange(24), each)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        apart = rng.normal(size=(24, 40))[of] + rng.normal(size=(len(of), 40))
        labels = np.concatenate([np.ones((1, len(of))), shuffled_labels(of, 99, seed)])
        right = told_right(MeanDifference(apart, np.zeros_like(apart)), labels, of, 4, seed).mean(1)
        wrong += (1 + (right[1:] >= right[0]).sum()) / 100 <= 0.05
    assert wrong <= stats.binom.ppf(0.999, 200, 0.05)


def test_as_a_direction_that_is_removed(likes_plus):
    found = concepts.fit(likes_plus, plus(), **QUICK)
    texts = [(p, side) for p, *both in plus(20, 1) for side in both]
    removed = likes_plus.with_interventions(rmfast.DirectionRemoval(**found.removal()))
    before, after = (m.score(texts).reshape(-1, 2).diff(dim=1).abs().mean() for m in (likes_plus, removed))
    want = likes_plus.with_interventions(
        rmfast.DirectionRemoval.mean_difference(likes_plus, *([(p, s[i]) for p, *s in plus()] for i in (0, 1)))
    )
    torch.testing.assert_close(removed.score(texts), want.score(texts), rtol=1e-3, atol=1e-3)
    assert float(after) != float(before)
    normed = concepts.fit(likes_plus, plus(), site="normed", **QUICK)
    assert normed.removal(0.5)["norm"] == "after" and normed.removal(0.5)["strength"] == 0.5
    inside = concepts.fit(likes_plus, plus(), site="resid_post", layer=0, **QUICK)
    with pytest.raises(ValueError, match="got resid_post of layer 0"):
        inside.removal()
    other = rmfast.RewardModel(M.decoder(hidden_size=16, num_attention_heads=2, seed=5), M.tokenizer())
    with pytest.raises(ValueError, match="fingerprint"):
        other.with_interventions(rmfast.DirectionRemoval(**found.removal()))


def test_what_it_writes(tmp_path, likes_plus):
    found = concepts.fit(likes_plus, plus(), name="plus", **QUICK)
    found.save(tmp_path / "plus")
    kept = concepts.Concept.load(tmp_path / "plus")
    assert repr(kept) == repr(found) and torch.equal(kept.direction, found.direction)
    assert torch.equal(kept.shuffled, found.shuffled) and kept.gap == found.gap and kept.layer is None
    assert "Concept('plus', mean_difference at final" in repr(found)
    assert found.to_dataframe()["accuracy"][0] == 1
    with pytest.raises(ValueError, match="to hold a concept"):
        concepts.Concept.load(tmp_path)


@pytest.mark.parametrize(
    "pairs, given, match",
    [
        (PAIRS[:19], {}, "at least 20 prompts, got 19"),
        ([(p, a, a) for p, a, _ in PAIRS], {}, "of different activations, got the same"),
        (PAIRS, {"method": "lda"}, "method"),
        (PAIRS, {"folds": 1}, "folds"),
        (PAIRS, {"folds": 25}, "folds to be an int from 2 to 24"),
        (PAIRS, {"penalty": 0}, "penalty"),
        (PAIRS, {"shuffles": 0}, "shuffles"),
    ],
)
def test_refusals(pairs, given, match):
    rm = rmfast.RewardModel(M.decoder(), M.tokenizer(chat=True))
    with pytest.raises(ValueError, match=match):
        concepts.fit(rm, pairs, **given)
