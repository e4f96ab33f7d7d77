"""Refits of a head: against the plain solution of each problem, read where the model is."""

from __future__ import annotations

import headed as C
import models as M
import numpy as np
import pytest
import torch

import rmfast
from rmfast.heads import fit, rows

TEXTS = ["".join(chr(97 + (i * j + j) % 26) for j in range(3 + i % 7)) for i in range(120)]


@pytest.fixture(scope="module")
def rm():
    return rmfast.RewardModel(M.decoder(), M.tokenizer())


def test_rows_are_what_the_head_is_given(rm):
    got = rows(rm, TEXTS[:9])
    want = [x[-1] for x in C.states(rm.model.model, rm.encode(TEXTS[:9]))]
    C.assert_near(got, torch.stack(want))
    head = rm.model.score.weight.detach()
    torch.testing.assert_close(got @ head[0], rm.score(TEXTS[:9]))


@pytest.mark.parametrize("outputs", [1, 3])
def test_ridge_is_the_least_of_its_objective_and_scores_so(rm, outputs):
    x = rows(rm, TEXTS).double().numpy()
    y = np.random.default_rng(0).normal(size=(len(TEXTS), outputs)) + 2.0
    head = fit(rm, TEXTS, y[:, 0] if outputs == 1 else y, l2=0.3)
    w, b = head.weight.double().numpy(), head.bias.double().numpy()

    def objective(w, b):
        return (((x @ w.T + b - y) ** 2).mean(0) + 0.3 * ((x.std(0) * w) ** 2).sum(1)).sum()

    least = objective(w, b)
    rng = np.random.default_rng(1)
    for size in (1e-2, 1e-3):
        for _ in range(10):
            assert objective(w + size * rng.normal(size=w.shape), b + size * rng.normal(size=b.shape)) > least
    refitted = rmfast.RewardModel(rm.model, rm.tokenizer, head=head)
    got = refitted.score(TEXTS).double().numpy().reshape(len(TEXTS), outputs)
    np.testing.assert_allclose(got, x @ w.T + b, atol=1e-4)


def test_pairs_are_bradley_terrys(rm):
    x = rows(rm, TEXTS).double()
    better = x @ torch.randn(48, generator=torch.Generator().manual_seed(3)).double()
    pairs = [(i, j) if better[i] > better[j] else (j, i) for i, j in zip(range(0, 119, 2), range(1, 120, 2))]
    head = fit(rm, rows(rm, TEXTS), pairs=pairs, l2=0.01)
    assert head.bias is None
    w = head.weight[0].double().requires_grad_()
    difference = torch.stack([x[i] - x[j] for i, j in pairs])
    spread = x.std(0, correction=0)
    loss = torch.nn.functional.softplus(-difference @ w).mean() + 0.005 * (spread * w).square().sum()
    (gradient,) = torch.autograd.grad(loss, w)
    assert float((gradient / spread).abs().max()) < 1e-3
    scores = rmfast.RewardModel(rm.model, rm.tokenizer, head=head).score(TEXTS)
    assert np.mean([float(scores[i]) > float(scores[j]) for i, j in pairs]) > 0.95


def test_logistic_of_labels(rm):
    x = rows(rm, TEXTS).double()
    labels = (x[:, 0] > x[:, 0].median()).long()
    head = fit(rm, TEXTS, labels, loss="logistic", l2=0.05)
    w, b = head.weight[0].double().requires_grad_(), head.bias.double().requires_grad_()
    spread = x.std(0, correction=0)
    logits = x @ w + b
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.double())
    gradient = torch.autograd.grad(loss + 0.025 * (spread * w).square().sum(), (w, b))
    assert all(float(g.abs().max()) < 1e-3 for g in gradient)


def test_a_head_is_read_where_the_model_is(rm):
    other = rmfast.RewardModel(M.decoder(), M.tokenizer(), pooling=M.BOS)
    head = fit(other, TEXTS[:20], np.arange(20.0))
    assert head.reading == M.BOS
    assert rmfast.RewardModel(other.model, other.tokenizer, head=head).pooling == M.BOS
    assert fit(rm, TEXTS[:20], np.arange(20.0)).reading == rm.binding.reading


@pytest.mark.parametrize(
    "targets, more, word",
    [
        (None, {}, "targets or pairs, got neither"),
        ([1.0], {}, "targets"),
        ([0.5] * 5, {"loss": "logistic"}, "0 or 1"),
        ([float("nan")] * 5, {}, "targets"),
        (None, {"pairs": [(0, 9)]}, "pairs"),
        (None, {"pairs": [(0, 1)], "loss": "ridge"}, "logistic"),
        ([1.0] * 5, {"l2": 0}, "l2"),
        ([1.0] * 5, {"loss": "hinge"}, "loss"),
        ([1.0] * 5, {"pairs": [(0, 1)]}, "both"),
    ],
)
def test_what_is_wrong_is_refused_by_name(rm, targets, more, word):
    with pytest.raises(ValueError, match=word):
        fit(rm, TEXTS[:5], targets, **more)


def test_models_that_pool_by_themselves_are_refused():
    with pytest.raises(ValueError, match="pools the whole text"):
        fit(rmfast.RewardModel(M.encoder(), M.tokenizer("encoder")), TEXTS, [1.0] * len(TEXTS))
