"""Training of SAEs: a planted dictionary is found, runs repeat and resume bit for bit, folders are SAELens'."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

import rmfast
from rmfast.patching.activations import Activations
from rmfast.training.sae import TopKRecipe, train_sae

D, FEATURES, ACTIVE = 32, 48, 3


def dictionary():
    draw = torch.randn(FEATURES, D, generator=torch.Generator().manual_seed(7))
    return draw / draw.norm(dim=1, keepdim=True)


def planted(n: int, seed: int = 0, dtype=torch.float32):
    """Rows that are sums of three of a dictionary's directions, times 1 to 2, about a centre."""
    draw = torch.Generator().manual_seed(seed)
    which = torch.rand(n, FEATURES, generator=draw).topk(ACTIVE).indices
    values = torch.zeros(n, FEATURES).scatter(1, which, 1 + torch.rand(n, ACTIVE, generator=draw))
    return (values @ dictionary() + 3 * torch.ones(D)).to(dtype)


RECIPE = TopKRecipe(features=2 * FEATURES, k=ACTIVE, steps=400, batch=256, lr=3e-3, dead_after=20, decay=200)


def small(**changes):
    return TopKRecipe(**{"features": 20, "k": 2, "steps": 12, "batch": 64, "dead_after": 2, **changes})


@pytest.mark.parametrize("decoder", ["unit", "free"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_planted_dictionary_is_recovered(dtype, decoder, tmp_path):
    data = planted(20_000, dtype=dtype)
    recipe = TopKRecipe(**{**vars(RECIPE), "decoder": decoder})
    found = train_sae(Activations(rows=data, hook_name="blocks.1.hook_resid_post"), recipe, tmp_path)
    sae = rmfast.SAE.load(tmp_path)
    cosines = dictionary() @ (sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)).T
    assert float(cosines.amax(1).min()) > 0.95
    assert float(found.explained_variance[-1]) > 0.95
    assert sae.hook_name == "blocks.1.hook_resid_post"
    assert repr(sae) == "SAE(topk 3, 32 -> 96, float32, hook_name='blocks.1.hook_resid_post')"


def weights(folder):
    sae = rmfast.SAE.load(folder)
    return [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]


def assert_same_bits(one, other):
    assert all(map(torch.equal, weights(one.folder), weights(other.folder)))
    for name in ("loss", "aux", "explained_variance", "l0", "dead", "idle"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
def test_a_training_repeats_and_resumes_bit_for_bit(normalize, tmp_path, monkeypatch):
    data, recipe = planted(500), small(normalize=normalize)
    whole = train_sae(data, recipe, tmp_path / "a")
    assert_same_bits(whole, train_sae(data, recipe, tmp_path / "b"))

    cut = Activations(rows=data)
    batches = cut.batches
    monkeypatch.setattr(cut, "batches", lambda *args, **kw: itertools.islice(batches(*args, **kw), 7))
    with pytest.raises(StopIteration):
        train_sae(cut, recipe, tmp_path / "c", checkpoint_steps=5)
    assert (tmp_path / "c/checkpoint.safetensors").exists()
    assert not (tmp_path / "c/cfg.json").exists()
    for other, message in (
        ((data, small(normalize=normalize, lr=0.1)), "a checkpoint of these recipe"),
        ((planted(500, seed=1), recipe), "a checkpoint of these activations"),
    ):
        with pytest.raises(ValueError, match=message):
            train_sae(*other, tmp_path / "c")
    assert_same_bits(whole, train_sae(data, recipe, tmp_path / "c"))
    assert not (tmp_path / "c/checkpoint.safetensors").exists()
    assert not torch.equal(whole.loss, train_sae(data, small(normalize=normalize, seed=1), tmp_path / "d").loss)


def test_numbers_of_numpy_make_the_same_recipe(tmp_path):
    given = small(steps=np.int64(2), seed=np.int32(1), lr=np.float32(0.5), apply_b_dec_to_input=np.True_)
    assert given == small(steps=2, seed=1, lr=0.5)
    train_sae(planted(600), given, tmp_path, checkpoint_steps=1)  # whose checkpoint holds it as JSON


def test_losses_are_in_units_of_the_rows_given(tmp_path):
    """As explained variances are, which the factor leaves alone: at the first step both are of the same weights."""
    data = 10 * planted(400)
    found = train_sae(data, small(steps=1, batch=400, normalize="expected_average_only_in"), tmp_path)
    spread = (data - data.mean(0)).square().sum() / len(data)
    assert float(found.loss[0] / spread) == pytest.approx(1 - float(found.explained_variance[0]), rel=1e-4)


def test_what_can_not_be_trained_on_is_named(tmp_path):
    data = planted(100)
    with pytest.raises(ValueError, match="at most the 100 rows of activations, got 101"):
        train_sae(data, small(batch=101), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    data[:, 3] = torch.nan
    with pytest.raises(ValueError, match="Expected a finite loss, got nan at step 0"):
        train_sae(data, small(), tmp_path / "a")
    with pytest.raises(TypeError, match="Expected recipe to be a TopKRecipe"):
        train_sae(data, {"features": 3}, tmp_path / "a")


# SAELens itself, where it is installed (pip install sae-lens): it is not among what the project's tests need ----------


def test_saelens_loads_what_was_trained(tmp_path):
    theirs = pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    for normalize in ("none", "layer_norm", "constant_norm_rescale"):
        train_sae(planted(500), small(normalize=normalize), tmp_path / normalize)
        sae, x = theirs.SAE.load_from_disk(tmp_path / normalize), planted(50, seed=3)
        ours, active = rmfast.SAE.load(tmp_path / normalize).reconstruct(x)
        assert sae.cfg.architecture() == "topk"
        torch.testing.assert_close(sae(x).detach(), ours, rtol=1e-4, atol=1e-4)
        assert torch.equal((sae.encode(x) > 0).sum(0), active)


@pytest.mark.parametrize("rescale", [True, False])
def test_saelens_trainer_gives_the_same_losses(rescale, tmp_path):
    """Its own training at its defaults, from the same weights on the same batches, dead latents and all."""
    pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from rmfast.training.sae_step import TopKTraining

    recipe = small(decoder="free", b_dec="zero", aux=1.0, steps=40, lr=3e-3)
    data = Activations(rows=planted(2000))
    ours = TopKTraining(recipe, data.rows)
    config = TopKTrainingSAEConfig(d_in=D, d_sae=recipe.features, k=recipe.k, rescale_acts_by_decoder_norm=rescale)
    sae = TopKTrainingSAE(config)
    if not rescale:  # all norms are 1 at first: for one step the same as choosing by norm
        ours.W_dec /= ours.W_dec.norm(dim=1, keepdim=True)
    with torch.no_grad():
        for name in ("b_enc", "W_dec", "b_dec"):
            getattr(sae, name).copy_(getattr(ours, name))
        sae.W_enc.copy_(ours.W_enc.T)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=recipe.steps * recipe.batch, train_batch_size_samples=recipe.batch, lr=recipe.lr,
            lr_end=recipe.lr, dead_feature_window=recipe.dead_after,
        ),
        sae, data.batches(recipe.batch),
    )  # fmt: skip
    batches = data.batches(recipe.batch)
    for i in range(recipe.steps if rescale else 1):
        dead = int(trainer.dead_neurons.sum())
        out = trainer.step(next(batches))
        trainer.n_training_steps += 1
        got = ours.step(out.sae_in)
        want = [float(out.losses[name]) for name in ("mse_loss", "auxiliary_reconstruction_loss")]
        assert [got.loss, got.aux] == pytest.approx(want, rel=2e-4, abs=1e-5), i
        assert got.dead == dead
    torch.testing.assert_close(ours.W_dec, sae.W_dec.detach(), rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.W_enc.T, sae.W_enc.detach(), rtol=0, atol=1e-4)


def test_the_configuration_is_the_one_that_saelens_writes(tmp_path):
    train_sae(planted(500), small(normalize="layer_norm"), tmp_path)
    told = json.loads((tmp_path / "cfg.json").read_text())
    recipe = told["metadata"].pop("rmfast_recipe")
    assert told == {
        "architecture": "topk", "d_in": D, "d_sae": 20, "k": 2, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "layer_norm", "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False, "metadata": {"hook_name": None},
    }  # fmt: skip
    assert TopKRecipe(**recipe) == small(normalize="layer_norm")
