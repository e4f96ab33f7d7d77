"""How well an SAE does: its reconstruction and figures by the formula, rewards under it by hooks on the model."""

from __future__ import annotations

import re

import models as M
import oracle as O
import pytest
import torch
from test_sae import ARCHITECTURES, D, by_formula, config, folder, weights

import rmfast
from rmfast.interpret.sae_metrics import reward_recovered, sae_metrics
from rmfast.patching.activations import Activations

TEXTS = M.token_ids([12, 5, 20], seed=3)


def rows(n=50, d=D):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(1)) * 3 + 40


def identity(layer=1, site="resid_post", wrong=0.0):
    """Reconstructs its rows: a feature for each axis and its opposite; `wrong` of it left out."""
    eye = torch.eye(D)
    both = torch.cat([eye, -eye])
    return rmfast.SAE(
        architecture="standard", W_enc=both.T, b_enc=torch.zeros(2 * D), W_dec=both * (1 - wrong), b_dec=torch.zeros(D),
        hook_name=f"blocks.{layer}.hook_{site}",
    )  # fmt: skip


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_figures_are_those_of_the_formula(architecture, normalize, tmp_path, monkeypatch):
    monkeypatch.setattr("rmfast.interpret.sae_metrics._ROWS", 16)
    cfg = config(architecture, normalize_activations=normalize)
    w = weights(threshold=architecture == "jumprelu")
    sae, x = rmfast.SAE.load(folder(tmp_path, cfg, w)), rows()
    features, out = by_formula(x, w, cfg)
    got, active = sae.reconstruct(x)
    torch.testing.assert_close(got.double(), out, rtol=1e-4, atol=1e-4 * float(out.abs().max()))
    assert torch.equal(active, (features > 0).sum(0))
    found = sae_metrics(sae, Activations(rows=x))
    x = x.double()
    want = float(1 - (out - x).square().sum() / (x - x.mean(0)).square().sum())
    assert found.explained_variance == pytest.approx(want, rel=1e-4)
    assert found.l0 == pytest.approx(float((features > 0).sum()) / len(x))
    assert found.dead == pytest.approx(float((features <= 0).all(0).double().mean()))
    assert found.rows == 50


def test_a_16_bit_sae_reconstructs_in_fp32(tmp_path):
    sae = rmfast.SAE.load(folder(tmp_path, config("topk"), weights()), dtype="bfloat16")
    assert sae.reconstruct(rows())[0].dtype == torch.float32


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rewards_are_those_that_hooks_give(family, site, positions, tmp_path):
    model, layer = M.decoder(family), 0
    cfg, w = config("topk"), weights()
    sae = rmfast.SAE.load(folder(tmp_path, cfg, w))
    found = reward_recovered(rmfast.RewardModel(model), TEXTS, sae, layer=layer, site=site, positions=positions)
    streams = [O.activation(model, ids, site, layer)[:, 0].detach() for ids in TEXTS]
    at = [range(len(ids)) if positions == "all" else [len(ids) - 1] for ids in TEXTS]
    mean = torch.cat([x[list(rows)] for x, rows in zip(streams, at)]).double().mean(0)
    for i, (ids, x, where) in enumerate(zip(TEXTS, streams, at)):
        out = by_formula(x[list(where)], w, cfg)[1]
        want = [
            O.reward(model, ids, len(ids) - 1),
            *(O.oracle(model, ids, len(ids) - 1, site, layer, where, 0, new) for new in (out, mean.expand_as(out))),
        ]
        got = [found.rewards[i], found.reconstructed[i], found.ablated[i]]
        torch.testing.assert_close(torch.stack(got), torch.stack(want).detach(), rtol=1e-4, atol=1e-4)


def test_what_is_recovered_goes_from_all_to_none():
    rm = rmfast.RewardModel(M.decoder("llama", labels=2))
    exact = reward_recovered(rm, TEXTS, identity())
    assert exact.recovered.tolist() == pytest.approx([1, 1], abs=1e-6)
    assert repr(exact).startswith("RewardRecovery(1.0000, 1.0000 of 3 rewards' change under a mean, resid_post of lay")
    worse = reward_recovered(rm, TEXTS, identity(layer=0, wrong=0.5))
    moved = [(x - worse.rewards).double().square().sum(0) for x in (worse.reconstructed, worse.ablated)]
    assert worse.recovered.tolist() == pytest.approx((1 - moved[0] / moved[1]).tolist())
    assert float(worse.recovered.max()) < 1 - 1e-3


def test_a_16_bit_sae_in_a_model_that_is_computed_in_fp32():
    rm = rmfast.RewardModel(M.decoder("llama").bfloat16(), compute="fp32")
    draw = torch.Generator().manual_seed(0)
    w = {"W_enc": torch.randn(48, 30, generator=draw) / 7, "W_dec": torch.randn(30, 48, generator=draw) / 5}
    w |= {"b_enc": torch.zeros(30), "b_dec": torch.zeros(48)}
    wide, narrow = (
        reward_recovered(rm, TEXTS, rmfast.SAE(architecture="topk", k=3, **{n: x.to(d) for n, x in w.items()}), layer=1)
        for d in (torch.float32, torch.bfloat16)
    )
    torch.testing.assert_close(narrow.reconstructed, wide.reconstructed, rtol=0.05, atol=0.02)
    assert torch.equal(narrow.rewards, wide.rewards)


def test_an_encoder_s_rewards_too():
    rm = rmfast.RewardModel(M.encoder("ModernBert", task="TokenClassification"))
    found = reward_recovered(rm, TEXTS, identity(layer=0, site="mlp_out"))
    assert found.recovered.tolist() == pytest.approx([1], abs=1e-5)


@pytest.mark.parametrize(
    "rows", [torch.ones(3, 8), torch.ones(1, 8), torch.tensor([[float("nan")] * 8, [1.0] * 8]), torch.ones(3, 8).long()]
)
def test_rows_of_which_no_variance_is_explained_are_refused(rows):
    sae = rmfast.SAE(architecture="topk", k=2, W_enc=torch.ones(8, 9), b_enc=torch.zeros(9), W_dec=torch.ones(9, 8),
                     b_dec=torch.zeros(8))  # fmt: skip
    with pytest.raises(ValueError, match="Expected activations to be"):
        sae_metrics(sae, rows)


def test_what_does_not_fit_is_named():
    rm = rmfast.RewardModel(M.decoder("llama"))
    narrow = rmfast.SAE(
        architecture="standard", W_enc=torch.eye(8), b_enc=torch.zeros(8), W_dec=torch.eye(8), b_dec=torch.zeros(8)
    )
    for call, message in (
        (lambda: reward_recovered(rm, TEXTS, narrow), "Expected layer, since the SAE's hook_name, None"),
        (lambda: reward_recovered(rm, TEXTS, narrow, layer=0), "SAE of the site's width, 48, got one of 8 (d_in)"),
        (lambda: reward_recovered(rm, TEXTS[:1], identity()), "at least 2 texts, got 1"),
        (lambda: reward_recovered(rm, TEXTS, identity(layer=5)), "layer to be an int from 0 to 1, got 5"),
        (lambda: sae_metrics(narrow, rows()), "to be rows (N, 8) of floats, got a tensor of shape (50, 48)"),
        (lambda: sae_metrics(narrow, rows()[0]), "to be rows (N, 8) of floats, got a tensor of shape (48,)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
