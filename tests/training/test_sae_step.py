"""The sparse step against the dense one in fp64, written by autograd: losses, gradients and Adam's parameters."""

from __future__ import annotations

import re

import pytest
import torch
from dense_sae import DenseTopK

from rmfast.training.sae_step import TopKRecipe, TopKTraining, start_of

D, F, K, B = 16, 64, 4, 200


def rows(n=B, seed=0, d=D):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=draw) * torch.linspace(0.2, 2, d) + 0.5


def pair(recipe: TopKRecipe, dead: int = 0):
    """Ours and the dense one from the same weights, so many latents of which are never among the k largest."""
    ours = TopKTraining(recipe, rows(seed=9))
    ours.W_enc += 0.1 * ours.W_enc.roll(1, 0)  # with tied weights some gradients are 0, and Adam goes by their rounding
    ours.b_enc[:dead] = -9
    tensors = {"W_enc": ours.W_enc.T, "b_enc": ours.b_enc, "W_dec": ours.W_dec, "b_dec": ours.b_dec}
    dense = DenseTopK(
        tensors, recipe.k, unit=recipe.decoder == "unit", lr=recipe.lr, aux=recipe.aux, dead_after=recipe.dead_after,
        clip=recipe.clip, apply_b_dec=recipe.apply_b_dec_to_input, normalize=recipe.normalize,
    )  # fmt: skip
    return ours, dense


def assert_same(ours, dense):
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        want = getattr(dense, name).detach()
        got = getattr(ours, name).T if name == "W_enc" else getattr(ours, name)
        torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=2e-5 * float(want.abs().max()))


@pytest.mark.parametrize("changes", [
    {}, {"apply_b_dec_to_input": False}, {"clip": 0.1}, {"normalize": "layer_norm"}, {"b_dec": "zero"},
    {"normalize": "constant_norm_rescale", "b_dec": "mean"}, {"dead_after": 2}, {"dead_after": 2, "aux": 1.0},
    {"dead_after": 2, "normalize": "layer_norm"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("decoder", ["unit", "free"])
def test_steps_are_those_of_the_dense_step(decoder, changes):
    recipe = TopKRecipe(features=F, k=K, steps=8, batch=B, lr=1e-3, decoder=decoder, **changes)
    ours, dense = pair(recipe, dead=5)
    for i in range(8):
        x = rows(seed=i)
        got, want = ours.step(x), dense.step(x)
        torch.testing.assert_close(torch.tensor(got[:2]), torch.tensor(want), rtol=1e-4, atol=1e-5)
        assert torch.equal(ours.idle, dense.idle)
    assert_same(ours, dense)
    assert (got.dead > 0) == ("dead_after" in changes), "the auxiliary loss has not been tried"


def test_more_dead_latents_than_the_auxiliary_loss_takes(monkeypatch):
    monkeypatch.setattr("rmfast.training.sae_step._ELEMENTS", 1000)  # some rows at a time
    recipe = TopKRecipe(features=200, k=2, steps=6, batch=B, dead_after=1, lr=1e-3)
    ours, dense = pair(recipe, dead=3 * D)
    for i in range(6):
        got, _ = ours.step(rows(seed=i)), dense.step(rows(seed=i))
    assert got.dead > D
    assert_same(ours, dense)


@pytest.mark.parametrize("aux", [0.0, 1 / 32])
def test_the_auxiliary_loss_wakes_dead_latents(aux):
    ours = TopKTraining(TopKRecipe(features=F, k=K, steps=150, dead_after=5, aux=aux, lr=3e-3), rows())
    ours.b_enc[::2] = -5  # below all others at the start
    dead = [ours.step(rows(seed=i)).dead for i in range(150)]
    assert dead[20] >= F // 2
    assert dead[-1] < F // 4 if aux else dead[-1] == F // 2


def test_a_feature_in_no_row_moves_by_its_momentum():
    ours, dense = pair(TopKRecipe(features=F, k=1, steps=6, lr=1e-2))
    for i in range(6):
        before = ours.W_enc.clone()
        ours.step(rows(8, seed=i)), dense.step(rows(8, seed=i))
    moved, idle = (ours.W_enc != before).any(1), ours.idle > 0
    assert (moved & idle).any()
    assert_same(ours, dense)


def test_what_a_step_tells():
    recipe = TopKRecipe(features=F, k=K, steps=1, b_dec="zero")
    ours = TopKTraining(recipe, rows())
    w = {name: x.double() for name, x in ours.inference().items()}
    x = rows().double()
    best = (x @ w["W_enc"]).topk(K)
    out = torch.zeros(B, F, dtype=x.dtype).scatter(1, best.indices, best.values.relu()) @ w["W_dec"]
    found = ours.step(x.float())
    off, spread = (out - x).square().sum(), (x - x.mean(0)).square().sum()
    assert found.loss == pytest.approx(float(off) / B, rel=1e-5)
    assert found.explained == pytest.approx(float(1 - off / spread), abs=1e-6)
    assert found.l0 == pytest.approx(float((best.values > 0).sum()) / B)
    assert found.dead == 0


@pytest.mark.parametrize("decoder", ["unit", "free"])
def test_what_is_saved_is_a_plain_sae_of_the_rows_as_given(decoder):
    """Norms of "free" and the factor of expected_average_only_in are folded in."""
    recipe = TopKRecipe(features=F, k=K, steps=3, decoder=decoder, normalize="expected_average_only_in", lr=1e-2)
    ours = TopKTraining(recipe, rows())
    assert ours.scale == pytest.approx(D**0.5 / float(rows().norm(dim=1).mean()))
    for i in range(3):
        ours.step(rows(seed=i))
    w, x = ours.inference(), rows(seed=5)
    best = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).topk(K)
    out = torch.zeros(B, F).scatter(1, best.indices, best.values.relu()) @ w["W_dec"] + w["b_dec"]
    loss = (out - x).square().sum(1).mean() * ours.scale**2
    assert ours.step(x).loss == pytest.approx(float(loss), rel=1e-4)
    torch.testing.assert_close(w["W_dec"].norm(dim=1), torch.full((F,), 1 / ours.scale))


def test_the_learning_rate_rises_and_falls():
    recipe = TopKRecipe(features=2, k=1, steps=10, lr=1.0, warmup=4, decay=5)
    assert [recipe.rate(i) for i in range(10)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_a_product_in_bf16_is_near_the_one_in_fp32():
    losses = []
    for product in ("float32", "bfloat16"):
        ours = TopKTraining(TopKRecipe(features=F, k=K, steps=30, product=product, lr=3e-3), rows())
        losses.append([ours.step(rows(seed=i)).loss for i in range(30)])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


def test_the_geometric_median_is_not_moved_by_outliers():
    x = torch.randn(1001, 3, generator=torch.Generator().manual_seed(0))
    x[:100] += 1000
    assert float(start_of(x, "geometric_median").norm()) < 0.5
    assert float(start_of(x, "mean").norm()) > 100
    assert start_of(x, "zero").tolist() == [0, 0, 0]


@pytest.mark.parametrize("changes, message", [
    ({"k": 9}, "k to be an int from 1 to 8, got 9"), ({"decoder": "tied"}, 'decoder to be "unit" or "free"'),
    ({"warmup": 2, "decay": 2}, "warmup and decay within 3 steps, got 2 and 2"), ({"lr": 0.0}, "lr to be a finite"),
    ({"normalize": "unit"}, "normalize to be one of none"), ({"betas": (0.9, 1.0)}, "betas to be a finite number"),
    ({"product": "float16"}, 'product to be "float32" or "bfloat16"'), ({"aux": -1.0}, "aux to be a finite number"),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_what_a_recipe_can_not_hold_is_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TopKRecipe(**{"features": 8, "k": 2, "steps": 3, **changes})
