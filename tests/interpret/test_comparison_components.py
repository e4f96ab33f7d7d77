"""Overlap of two models' sites: by hand, under shuffles, and of models that share a part."""

from __future__ import annotations

import copy
import re

import models as M
import numpy as np
import pytest
import torch

import rmfast
from rmfast.interpret.comparison_components import compare_components, rbo_weights

CLEAN, CORRUPTED = M.token_ids([7] * 12, seed=1), M.token_ids([7] * 12, seed=2)


def by_hand(a, b, k, p):
    """Jaccard's index and extrapolated RBO of two lists of sizes, by their definitions."""
    first, second = (np.argsort(-abs(np.asarray(x)), kind="stable").tolist() for x in (a, b))
    x = [len(set(first[:d]) & set(second[:d])) for d in range(1, len(first) + 1)]
    jaccard = len(set(first[:k]) & set(second[:k])) / len(set(first[:k]) | set(second[:k]))
    rbo = x[-1] / len(x) * p ** len(x) + (1 - p) / p * sum(p**d * n / d for d, n in enumerate(x, 1))
    return jaccard, rbo


def normal(pairs=15, sites=20, seed=0):
    return np.random.default_rng(seed).normal(size=(pairs, sites))


def test_overlaps_are_those_of_their_definitions():
    a, b = normal(), normal(seed=1) + normal()
    found = compare_components(a, torch.from_numpy(b), top=6, persistence=0.8)
    want = np.array([by_hand(x, y, 6, 0.8) for x, y in zip(a, b)])
    np.testing.assert_allclose(np.stack([found.each_jaccard, found.each_rbo], 1), want)
    assert found.jaccard.value == pytest.approx(want[:, 0].mean()) and found.jaccard.n == 15
    assert found.rbo.low < found.rbo.value < found.rbo.high
    pooled = by_hand(abs(a).mean(0), abs(b).mean(0), 6, 0.8)
    assert (found.pooled_jaccard, found.pooled_rbo) == pytest.approx(pooled)
    ranked = [set(np.argsort(-abs(x).mean(0))[:6]) for x in (a, b)]
    assert {layer for _, layer, _ in found.shared} == ranked[0] & ranked[1]


def test_the_same_ranks_overlap_wholly():
    found = compare_components(normal(), 3 * normal(), top=5)
    assert found.rbo == (pytest.approx(1), pytest.approx(1), pytest.approx(1), 15) and found.jaccard.value == 1
    assert found.p_rbo == found.p_jaccard == 0.001
    assert rbo_weights(20, 0.9).sum() == pytest.approx(1)


def test_a_vanishing_persistence_asks_for_the_first_site_alone():
    np.testing.assert_allclose(rbo_weights(4, 1e-320), [1, 0, 0, 0], atol=1e-300)


def test_shuffled_ranks_overlap_as_random_ones_do():
    k, p, sites = 5, 0.9, 20
    found = compare_components(normal(), normal(seed=1), top=k, persistence=p, shuffles=4000)
    depth = np.arange(1, sites + 1)
    assert found.random_rbo == pytest.approx(p**sites + (1 - p) / p * (p**depth * depth / sites).sum(), abs=0.01)
    from scipy.stats import hypergeom

    x = np.arange(k + 1)
    want = (hypergeom.pmf(x, sites, k, k) * x / (2 * k - x)).sum()
    assert found.random_jaccard == pytest.approx(want, abs=0.01)


def test_p_values_of_models_that_have_nothing_in_common_are_uniform():
    found = [
        compare_components(normal(10, 12, seed), normal(10, 12, seed + 500), top=4, shuffles=99, seed=seed)
        for seed in range(60)
    ]
    for p in ([each.p_rbo for each in found], [each.p_jaccard for each in found]):
        assert np.mean(np.array(p) <= 0.2) <= 0.2 + 3 * (0.2 * 0.8 / 60) ** 0.5
    assert np.mean([each.p_rbo <= 0.2 for each in found]) >= 0.2 - 3 * (0.2 * 0.8 / 60) ** 0.5


def test_what_all_models_share_may_be_kept_in_the_shuffles():
    rm = rmfast.RewardModel(M.decoder("llama"))
    sweeps = rm.patch_sweep(CLEAN, CORRUPTED, sites="head_out", positions="joint", layers=[0, 1])
    for i, sweep in enumerate(sweeps):  # one layer's heads are larger than another's, in no order among themselves
        size = 1 + torch.rand(2, 1, 4, generator=torch.Generator().manual_seed(i))
        sweep.rewards = sweep.base_reward + size * torch.tensor([1.0, 10.0])[:, None, None]
    other = copy.deepcopy(sweeps)
    for i, sweep in enumerate(other):
        at = torch.randperm(4, generator=torch.Generator().manual_seed(50 + i))
        sweep.rewards = sweep.rewards[..., at]
    free, within = (compare_components(sweeps, other, top=4, shuffle=shuffle) for shuffle in ("all", "layer"))
    assert free.jaccard.value == 1 and free.p_jaccard < 0.05
    assert within.p_jaccard == 1 and within.random_jaccard == 1


def test_ties_agree_no_more_than_chance():
    zeros = np.zeros((200, 10))
    found = compare_components(zeros, zeros, top=3)
    assert found.rbo.low < found.random_rbo + 0.03 and found.rbo.value < found.random_rbo + 0.05


def test_sites_that_are_nan_anywhere_are_left_out():
    a, b = normal(), normal(seed=1)
    a[3, 2] = b[0, 5] = np.nan
    found = compare_components(a, b, top=5)
    assert found.left_out == 2 and len(found.sites) == 18 and found.sizes.shape == (2, 15, 18)


# Models


def models(depths):
    return [rmfast.RewardModel(M.decoder("llama", num_hidden_layers=depth, seed=i)) for i, depth in enumerate(depths)]


def test_attributions_and_sweeps_of_one_depth_are_compared_site_by_site():
    a, b = models([3, 3])
    left, right = (rm.attribute(CLEAN, components=["attn_out", "mlp_out"]) for rm in (a, b))
    found = compare_components(left, right, top=3)
    assert found.sites == [(kind, layer, 0) for kind in ("attn_out", "mlp_out") for layer in range(3)]
    want = [torch.cat([each.contributions[kind] for kind in ("attn_out", "mlp_out")]).abs() for each in right]
    np.testing.assert_allclose(found.sizes[1], torch.stack(want))
    left, right = (rm.patch_sweep(CLEAN, CORRUPTED, sites="head_out", layers=[0, 2]) for rm in (a, b))
    found = compare_components(left, right, top=3)
    assert found.sites[:5] == [*(("head_out", 0, i) for i in range(4)), ("head_out", 2, 0)]
    want = [sweep.effect.abs().amax(1).flatten() for sweep in left]  # the strongest of all positions
    np.testing.assert_allclose(found.sizes[0], torch.stack(want))


def test_a_deeper_model_s_layers_fall_together_by_relative_depth():
    a, b = models([2, 5])
    left, right = (rm.attribute(CLEAN, components=["attn_out", "mlp_out"]) for rm in (a, b))
    found = compare_components(left, right, top=2)
    assert found.sites == [(kind, layer, 0) for kind in ("attn_out", "mlp_out") for layer in range(2)]
    mlp = right[4].contributions["mlp_out"]
    assert found.sizes[1, 4, 2:] == pytest.approx([float(mlp[:3].sum().abs()), float(mlp[3:].sum().abs())])
    options = {"sites": ["attn_out", "mlp_out"], "positions": "joint"}
    left, right = (rm.patch_sweep(CLEAN, CORRUPTED, **options) for rm in (a, b))
    found = compare_components(left, right, top=2)
    effect = right[4].effect[1, :, 0].abs()
    assert found.sizes[1, 4, 2:] == pytest.approx([float(effect[:3].max()), float(effect[3:].max())])


def test_a_model_agrees_with_its_own_finetune():
    a, other = models([4, 4])
    near = copy.deepcopy(a.model)
    with torch.no_grad():
        for p in near.parameters():
            p.mul_(1 + 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    attributions = [rm.attribute(CLEAN, components="head_out") for rm in (a, rmfast.RewardModel(near), other)]
    close, far = (compare_components(attributions[0], each, top=4) for each in attributions[1:])
    assert close.rbo.low > far.rbo.high and close.p_rbo < 0.01
    assert "16 sites" in repr(close)


def test_a_result_draws_and_lists_itself():
    pytest.importorskip("pandas")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = compare_components(normal(), normal() + 0.1 * normal(seed=1), top=4)
    table = found.to_dataframe()
    assert list(table) == ["site", "layer", "unit", "size_a", "rank_a", "size_b", "rank_b"] and len(table) == 20
    assert sorted(table["rank_a"]) == list(range(1, 21)) and table["size_a"].idxmax() == table["rank_a"].idxmin()
    axis = found.plot()
    assert len(axis.collections[0].get_offsets()) == 20 and len(axis.texts) == len(found.shared)
    pyplot.close("all")


@pytest.mark.parametrize(
    "use, message",
    [
        (lambda: compare_components(normal(9), normal(9)), "a and b of at least 10 texts or pairs, got 9"),
        (lambda: compare_components(normal(), normal(14)), "for the same texts, got 15 and 14"),
        (lambda: compare_components(normal(), normal(), top=20), "top to be fewer than the 20 sites, got 20"),
        (lambda: compare_components(normal(), normal(sites=19)), "of whole components|whole components of models"),
        (lambda: compare_components(normal(), normal(), persistence=1), "persistence to be a finite number in (0, 1)"),
        (lambda: compare_components(normal(sites=3), normal(sites=3), top=1), "at least 4 sites to rank, got 3"),
    ],
)
def test_what_cannot_be_compared_is_named(use, message):
    with pytest.raises(ValueError, match="|".join(map(re.escape, message.split("|")))):
        use()


def test_models_whose_sites_do_not_correspond_are_refused():
    a, b = models([2, 3])
    heads = [rm.attribute(CLEAN, components="head_out") for rm in (a, b)]
    with pytest.raises(ValueError, match="whole components of models of different depths, got head_out"):
        compare_components(*heads, top=2)
    with pytest.raises(ValueError, match="of the same kinds of sites"):
        compare_components(heads[0], a.attribute(CLEAN), top=2)
    some = [rm.patch_sweep(CLEAN, CORRUPTED, sites="mlp_out", layers=[1]) for rm in (a, b)]
    other = [rm.patch_sweep(CLEAN, CORRUPTED, sites="mlp_out", layers=[0]) for rm in (a, b)]
    with pytest.raises(ValueError, match="of the same layers and units"):
        compare_components(some[0], other[0], top=2)
    with pytest.raises(ValueError, match="at the read token"):
        compare_components(a.attribute(CLEAN, positions="all"), heads[0])
