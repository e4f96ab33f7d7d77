"""LEACE: its closed form in full matrices, its two promises, concept-erasure's own where it is installed."""

from __future__ import annotations

import models as M
import numpy as np
import planted
import pytest
import torch

import rmfast
from rmfast import concepts

RNG = np.random.default_rng(0)


def labelled(n=60, d=8, k=1):
    z = RNG.integers(0, 2, (n, k)).astype(float)
    return z @ RNG.normal(size=(k, d)) + RNG.normal(size=(n, d)) @ RNG.normal(size=(d, d)), z


def root(a, power):
    values, vectors = np.linalg.eigh(a)
    kept = values > 1e-10 * values.max()
    return vectors[:, kept] * values[kept] ** power @ vectors[:, kept].T


def published(x, z, shrinkage=0.0):
    """I − W⁺ P W of the paper."""
    centred, labels = x - x.mean(0), z - z.mean(0)
    sigma = centred.T @ centred / len(x)
    sigma = (1 - shrinkage) * sigma + shrinkage * np.trace(sigma) / len(sigma) * np.eye(len(sigma))
    w, back = root(sigma, -0.5), root(sigma, 0.5)
    columns = w @ centred.T @ labels / len(x)
    u, s, _ = np.linalg.svd(columns, full_matrices=False)
    u = u[:, s > 1e-9]
    return np.eye(len(sigma)) - back @ u @ u.T @ w


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n, d, k", [(60, 8, 1), (60, 8, 3), (12, 30, 1)])
def test_the_closed_form(n, d, k, shrinkage):
    x, z = labelled(n, d, k)
    erasure = concepts.leace(x, z, shrinkage=shrinkage)
    got = erasure(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got, (x - x.mean(0)) @ published(x, z, shrinkage).T + x.mean(0), atol=1e-8)
    covariance = (got - got.mean(0)).T @ (z - z.mean(0)) / n
    np.testing.assert_allclose(covariance, 0, atol=1e-9)
    np.testing.assert_allclose((erasure.right @ erasure.left).numpy(), np.eye(erasure.rank), atol=1e-9)


def test_no_other_map_that_erases_moves_less():
    x, z = labelled()
    x = x - x.mean(0)
    least = ((concepts.leace(x, z, shrinkage=0)(torch.from_numpy(x)).numpy() - x) ** 2).sum()
    delta = x.T @ (z - z.mean())
    for _ in range(20):
        other = RNG.normal(size=(1, x.shape[1]))  # any oblique projection along the same difference erases as well
        erased = x - x @ other.T @ delta.T / (other @ delta)
        np.testing.assert_allclose(erased.T @ (z - z.mean()), 0, atol=1e-8)
        assert ((erased - x) ** 2).sum() >= least


def test_two_classes_go_along_the_difference_of_their_means():
    x, z = labelled()
    erasure = concepts.leace(x, z[:, 0], shrinkage=0)
    delta = x[z[:, 0] == 1].mean(0) - x[z[:, 0] == 0].mean(0)
    left = erasure.left[:, 0].numpy()
    assert abs(left @ delta) == pytest.approx(np.linalg.norm(left) * np.linalg.norm(delta))
    beta = np.linalg.solve(np.cov(x.T, bias=True), delta)
    right = erasure.right[0].numpy()
    assert abs(right @ beta) == pytest.approx(np.linalg.norm(right) * np.linalg.norm(beta))


@pytest.mark.parametrize("n, d, k", [(60, 8, 1), (80, 8, 3)])
def test_concept_erasure_s_own(n, d, k):
    library = pytest.importorskip("concept_erasure")
    x, z = labelled(n, d, k)
    fitter = library.LeaceFitter(d, k, constrain_cov_trace=False, shrinkage=False, dtype=torch.float64, svd_tol=1e-6)
    theirs = fitter.update(torch.from_numpy(x), torch.from_numpy(z)).eraser(torch.from_numpy(x))
    ours = concepts.leace(x, z, shrinkage=0)(torch.from_numpy(x))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale, offset", [(1e-12, 0), (1, 1e10)])
def test_labels_of_any_scale_are_erased_alike(scale, offset):
    x, z = labelled()
    want, got = concepts.leace(x, z, shrinkage=0), concepts.leace(x, offset + scale * z, shrinkage=0)
    torch.testing.assert_close(got.left @ got.right, want.left @ want.right)


def test_ledoit_and_wolf_s_shrinkage():
    pytest.importorskip("sklearn")
    from sklearn.covariance import LedoitWolf

    x, z = labelled(30, 20)
    assert concepts.leace(x, z).shrinkage == pytest.approx(LedoitWolf().fit(x).shrinkage_)


def likes_plus_alone():
    """A planted model without its taste for short texts, which would drown the other one."""
    rm = planted.biased()
    with torch.no_grad():
        rm.model.score.weight[0, 0] = 0
    return rm


def pairs(n, seed):
    return [(f"say {i}:", a, b) for i, (_, a, b) in enumerate(planted.pairs(n, seed))]


def test_a_planted_concept_is_erased_from_new_texts_and_from_the_reward(tmp_path):
    pytest.importorskip("sklearn")
    rm = likes_plus_alone()
    found = concepts.erase(rm, pairs(40, 0), name="plus", resamples=100)
    assert found.before.value > 0.95 and found.before.low > 0.9
    assert found.after.low < 0.7
    texts = [(p, side) for p, *both in pairs(40, 1) for side in both]
    plain, erased = rm.score(texts), concepts.erased(rm, found, texts)
    with_, without = plain[::2].mean() - plain[1::2].mean(), erased[::2].mean() - erased[1::2].mean()
    assert abs(float(without)) < 0.25 * float(with_)
    found.save(tmp_path / "erasure")
    kept = concepts.Erasure.load(tmp_path / "erasure")
    assert repr(kept) == repr(found) and "Erasure('plus' at final, 1 of 16 dimensions" in repr(found)
    assert torch.equal(concepts.erased(rm, kept, texts), erased)
    with pytest.raises(ValueError, match="orthogonal projection for a DirectionRemoval"):
        found.removal()
    other = rmfast.RewardModel(M.decoder(hidden_size=16, num_attention_heads=2, seed=5), M.tokenizer())
    with pytest.raises(ValueError, match="fitted on this model"):
        concepts.erased(other, found, texts)


@pytest.mark.parametrize(
    "x, z, options, match",
    [
        (np.eye(3), [1, 0], {}, r"z to be of shape \(3,\)"),
        (np.eye(3), [1, 1, 1], {"shrinkage": 0}, "labels that differ"),
        (np.eye(3), [1, 0, float("nan")], {}, "z to be finite"),
        (np.eye(3), [1, 0, 1], {"shrinkage": 2}, "shrinkage"),
        (np.eye(3)[:1], [1], {}, "at least two texts"),
        (np.zeros((3, 2)), [1, 0, 1], {"shrinkage": 0}, "know something of"),
    ],
)
def test_refusals(x, z, options, match):
    with pytest.raises(ValueError, match=match):
        concepts.leace(x, z, **options)
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 8\)"):
        concepts.leace(*labelled(), shrinkage=0)(torch.zeros(3, 7))
