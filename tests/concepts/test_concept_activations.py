"""Activations at named sites against hooks on unmodified models in fp64."""

from __future__ import annotations

import models as M
import oracle as O
import pytest
import torch

import rmfast
from rmfast import concepts

TEXTS = M.token_ids([9, 17, 4, 23], seed=3)
TEXTS[1] = TEXTS[0][:6] + TEXTS[1][6:]  # a shared prompt
LAYER_SITES = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]


def near(got, want):
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * float(want.norm(dim=-1).max()))


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gpt2"])
def test_every_site_against_hooks(family):
    model = M.decoder(family, num_hidden_layers=3)
    rm = rmfast.RewardModel(model)
    got = {
        (site, layer): concepts.activations(rm, TEXTS, site=site, layer=layer)
        for site in LAYER_SITES
        for layer in (0, 2)
    }
    final, normed = (concepts.activations(rm, TEXTS, site=site) for site in ("final", "normed"))
    assert torch.equal(final, concepts.activations(rm, TEXTS, site="resid_post", layer=-1))
    assert final.dtype == torch.float32 and not final.is_inference()
    norm = getattr(model.base_model, "norm", None) or model.base_model.ln_f
    with O.everything_in_fp64(), torch.no_grad():
        model.double()
        for (site, layer), x in got.items():
            near(x, torch.stack([O.activation(model, ids, site, layer)[-1, 0] for ids in TEXTS]))
        stream = torch.stack([O.activation(model, ids, "resid_post", 2)[-1, 0] for ids in TEXTS])
        near(final, stream)
        near(normed, norm(stream[None])[0])


def test_one_pass_of_the_body():
    rm = rmfast.RewardModel(M.decoder())
    concepts.activations(rm, TEXTS)  # whose first use tries the engine
    calls = []
    rm.model.model.embed_tokens.register_forward_hook(lambda m, args, out: calls.append(args[0].numel()))
    concepts.activations(rm, TEXTS)
    assert len(calls) == 1


def test_an_encoder_that_reads_a_token_has_sites():
    model = M.encoder("Bert", task="TokenClassification")
    rm = rmfast.RewardModel(model)
    got = concepts.activations(rm, TEXTS, site="resid_mid", layer=1)
    read = rm.positions(rm.encode(TEXTS))
    with O.everything_in_fp64():
        model.double()
        near(got, torch.stack([O.activation(model, ids, "resid_mid", 1)[at, 0] for ids, at in zip(TEXTS, read)]))


def test_a_final_norm_with_a_hook_is_not_left_out():
    rm = rmfast.RewardModel(M.decoder())
    rm.model.model.norm.register_forward_hook(lambda m, args, out: 2 * out)
    with pytest.raises(ValueError, match='Expected site="normed"'):
        concepts.activations(rm, TEXTS)
    assert concepts.activations(rm, TEXTS, site="normed").shape == (4, 48)


@pytest.mark.parametrize(
    "given, match",
    [
        ({"site": "head_out", "layer": 0}, "site to be one of final, normed, resid_pre"),
        ({"site": "resid_pre"}, "a layer for site 'resid_pre'"),
        ({"layer": 0}, "no layer for site 'final'"),
        ({"site": "mlp_out", "layer": 2}, r"layer to be in \[0, 2\)"),
    ],
)
def test_refusals(given, match):
    with pytest.raises(ValueError, match=match):
        concepts.activations(rmfast.RewardModel(M.decoder()), TEXTS, **given)


def test_models_and_options_that_do_not_fit():
    with pytest.raises(ValueError, match="pools by itself"):
        concepts.activations(rmfast.RewardModel(M.encoder()), TEXTS)
    rm = rmfast.RewardModel(M.decoder())
    with pytest.raises(TypeError, match="unexpected keyword argument 'batch_token'"):
        concepts.activations(rm, TEXTS, batch_token=4)
    under = rm.with_interventions(rmfast.DirectionRemoval(torch.eye(48)[:1]))
    with pytest.raises(ValueError, match="no interventions but clamps"):
        concepts.activations(under, TEXTS)
