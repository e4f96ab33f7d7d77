"""Rank correlations over pairs: by hand, and attribution beside patching in one call."""

from __future__ import annotations

import re

import models as M
import numpy as np
import pytest
import torch
from scipy import stats

import rmfast
from rmfast.interpret.comparison import mean_of_pairs

RNG = np.random.default_rng(0)
CLEAN, CORRUPTED = M.token_ids([9] * 10, seed=1), M.token_ids([9] * 10, seed=2)


def noisy(pairs=20, sites=12, noise=1.0):
    x = RNG.normal(size=(pairs, sites))
    return x, x + noise * RNG.normal(size=(pairs, sites))


@pytest.fixture(scope="module")
def rm():
    return rmfast.RewardModel(M.decoder("llama", num_hidden_layers=3))


def test_correlations_are_means_over_the_pairs():
    x, y = noisy()
    found = rmfast.compare(x, torch.from_numpy(y))
    spearman = [stats.spearmanr(a, b).statistic for a, b in zip(x, y)]
    kendall = [stats.kendalltau(a, b).statistic for a, b in zip(x, y)]
    np.testing.assert_allclose(found.each_spearman, spearman)
    np.testing.assert_allclose(found.each_kendall, kendall)
    assert found.spearman.value == pytest.approx(np.mean(spearman)) and found.spearman.n == 20
    assert found.kendall.value == pytest.approx(np.mean(kendall)) and found.kendall.n == 20
    assert found.spearman.low < found.spearman.value < found.spearman.high


def test_intervals_hold_the_true_mean_as_often_as_they_say():
    inside = 0
    for seed in range(60):
        values = np.random.default_rng(seed).normal(0.3, 1, size=40)
        low, high = mean_of_pairs(values, confidence=0.8, seed=seed)[1:3]
        inside += low <= 0.3 <= high
    assert 0.68 <= inside / 60 <= 0.92  # 80% and two standard errors of 5%


def test_one_seed_gives_one_interval():
    x, y = noisy()
    assert rmfast.compare(x, y, seed=3).spearman == rmfast.compare(x, y, seed=3).spearman
    assert rmfast.compare(x, y, seed=3).spearman != rmfast.compare(x, y, seed=4).spearman


def test_an_interval_does_not_depend_on_how_many_resamples_are_held_at_once(monkeypatch):
    values = np.random.default_rng(0).normal(size=40)
    whole = mean_of_pairs(values)
    monkeypatch.setattr("rmfast.interpret.comparison._AT_ONCE", 40 * 7)
    assert mean_of_pairs(values) == whole


def test_an_attribution_of_one_text_is_no_pair_s_effect(rm):
    found = [rm.attribute(CLEAN[0])] * 10
    with pytest.raises(TypeError, match=re.escape("after.like(sweep) - before.like(sweep)")):
        rmfast.compare(found, found)


def test_sites_that_are_nan_are_left_out():
    x, y = noisy()
    x[3, 2], y[3, 5] = np.nan, np.nan
    kept = [i for i in range(12) if i not in (2, 5)]
    found = rmfast.compare(x, y)
    assert found.each_spearman[3] == pytest.approx(stats.spearmanr(x[3, kept], y[3, kept]).statistic)
    assert "10 to 12 sites of each pair" in repr(found)


def test_pairs_without_an_order_are_left_out_and_counted():
    x, y = noisy()
    x[4] = 0
    found = rmfast.compare(x, y)
    assert found.spearman.n == 19 and np.isnan(found.each_spearman[4]) and "1 pairs left out" in repr(found)


def test_equal_values_have_an_interval_of_no_width():
    x, _ = noisy()
    assert rmfast.compare(x, x).spearman == (pytest.approx(1), pytest.approx(1), pytest.approx(1), 20)


def test_a_result_shows_and_draws_itself():
    pytest.importorskip("pandas")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    x, y = noisy(pairs=10, sites=5)
    found = rmfast.compare(x, y)
    assert re.fullmatch(
        r"Comparison\(Spearman \S+ \[\S+, \S+\] \(n 10\), Kendall \S+ \[\S+, \S+\] \(n 10\), 5 sites of each pair\)",
        repr(found),
    )
    table = found.to_dataframe()
    assert list(table) == ["pair", "site", "predicted", "measured"] and len(table) == 50
    assert len(found.plot().collections[0].get_offsets()) == 50


# Attribution beside patching ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["noising", "denoising"])
@pytest.mark.parametrize("sites", [("attn_out", "mlp_out"), "head_out"])
def test_one_call_compares_attribution_with_patching(rm, sites, mode):
    found = rm.compare(CLEAN, CORRUPTED, sites=sites, mode=mode, layers=[0, 2])
    sweeps = rm.patch_sweep(CLEAN, CORRUPTED, sites=sites, mode=mode, positions="joint", layers=[0, 2])
    sign = 1 if mode == "noising" else -1
    for i, sweep in enumerate(sweeps):
        clean, corrupted = (rm.attribute(texts[i], components=sites).like(sweep) for texts in (CLEAN, CORRUPTED))
        np.testing.assert_allclose(found.predicted[i], sign * (corrupted - clean).numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.measured[i], sweep.effect.numpy(), rtol=1e-5, atol=1e-6)
    again = rmfast.compare(found.predicted, sweeps)
    np.testing.assert_allclose(again.each_spearman, found.each_spearman)


def test_texts_of_unequal_length_are_patched_where_they_are_read(rm):
    shorter = [ids[: 5 + i % 3] for i, ids in enumerate(CORRUPTED)]
    found = rm.compare(CLEAN, shorter, confidence=0.9)
    assert found.confidence == 0.9
    assert all(measured[:, -1].all() for measured in found.measured)  # the last layer's attention and MLP


def test_the_raw_form_predicts_other_effects(rm):
    frozen, raw = (rm.compare(CLEAN, CORRUPTED, norm=norm) for norm in ("frozen", "raw"))
    assert not np.allclose(frozen.predicted, raw.predicted) and np.allclose(frozen.measured, raw.measured)


def test_a_label_is_chosen_of_several():
    model = rmfast.RewardModel(M.decoder("llama", num_hidden_layers=2, labels=2))
    found = model.compare(CLEAN, CORRUPTED, label=1)
    sweep = model.patch_sweep(CLEAN[0], CORRUPTED[0], mode="noising", sites=["attn_out", "mlp_out"], positions="joint")
    np.testing.assert_allclose(found.measured[0], sweep.select(label=1).effect.numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="Expected label, the reward to compare of this model's 2, got None"):
        model.compare(CLEAN, CORRUPTED)


@pytest.mark.parametrize(
    "use, message",
    [
        (lambda rm: rmfast.compare(*noisy(9)), "at least 10 pairs for a correlation over pairs, got 9"),
        (lambda rm: rmfast.compare(*noisy(sites=3)), "at least 4 sites of each pair to rank, got 3 in pair 0"),
        (lambda rm: rmfast.compare(noisy()[0], noisy(19)[0]), "for the same pairs, got 20 and 19"),
        (lambda rm: rmfast.compare(noisy()[0], noisy(sites=7)[0]), "pair 0 of one shape, got (12,) and (7,)"),
        (lambda rm: rmfast.compare(*noisy(), confidence=95), "confidence to be a finite number in (0, 1), got 95"),
        (lambda rm: rmfast.compare(np.ones((20, 5)), noisy(20, 5)[0]), "at least 10 pairs for a mean with an interval"),
        (lambda rm: rm.compare(CLEAN[:9], CORRUPTED[:9]), "at least 10 pairs for a correlation over pairs, got 9"),
        (lambda rm: rm.compare([], []), "at least 10 pairs for a correlation over pairs, got 0"),
        (lambda rm: rm.compare(CLEAN, CORRUPTED, label=1), "label to be an int from 0 to 0, got 1"),
        (lambda rm: rm.compare(CLEAN, CORRUPTED, mode="zero"), 'mode to be "noising" or "denoising", got \'zero\''),
        (
            lambda rm: rm.compare(CLEAN, CORRUPTED, sites="resid_post"),
            "Expected sites to be of attn_out, head_out, mlp_out",
        ),
    ],
)
def test_too_little_and_wrong_arguments_are_named(rm, use, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        use(rm)
