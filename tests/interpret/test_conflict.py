"""Conflict of a head's terms: autograd's gradients on unmodified models in fp64, a gate frozen, planted heads."""

from __future__ import annotations

import json

import models as M
import numpy as np
import oracle as O
import pytest
import torch
from scipy import stats

import rmfast
from rmfast.heads.gated import Gated
from rmfast.heads.linear import Layers
from rmfast.interpret.conflict import figures_of, term_conflict

PAIRS = [(f"ask {i}", f"yes {i * i}", f"no, not {i}") for i in range(20)]
QUICK = {"resamples": 20, "permutations": 20}


def final_norm(model):
    return getattr(model.base_model, "norm", None) or model.base_model.ln_f


def streams(model, rm):
    """(40, d) before the final norm of the unmodified model, fp64."""
    seen = []
    with torch.no_grad(), final_norm(model).register_forward_hook(lambda m, args, out: seen.append(args[0][0, -1])):
        for prompt, *both in PAIRS:
            for side in both:
                model(input_ids=torch.from_numpy(rm.encode([(prompt, side)])[0].ids)[None])
    return torch.stack(seen)


def gradients(model, weight, x):
    """(n, A, d) of w_a·norm(h) by autograd."""
    return torch.stack(
        [torch.func.jacrev(lambda h: weight @ final_norm(model)(h[None, None])[0, 0])(row) for row in x]
    ).detach()


def cosines(g):
    unit = g / g.norm(dim=-1, keepdim=True)
    return (unit @ unit.mT).mean(0).numpy()


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gpt2"])
def test_angles_are_those_of_gradients_through_the_norm(family):
    model = M.decoder(family, labels=3)
    rm = rmfast.RewardModel(model, M.tokenizer(chat=True))
    found = term_conflict(rm, PAIRS, names=["a", "b", "c"], **QUICK)
    with O.everything_in_fp64():
        model.double()
        x = streams(model, rm)
        g = gradients(model, model.score.weight, x)
        with torch.no_grad():
            values = (final_norm(model)(x[None])[0] @ model.score.weight.T).numpy()
    np.testing.assert_allclose(found.matrix(), cosines(g), atol=1e-5)
    rows = model.score.weight.detach()
    assert np.abs(found.matrix() - cosines(rows[None])).max() > 0.02  # the rows' own angles are others
    np.testing.assert_allclose(found.contributions, values, atol=1e-5 * M.reward_scale(model))
    apart = values[::2] - values[1::2]
    want = apart.T @ apart / np.sqrt(np.outer((apart**2).sum(0), (apart**2).sum(0)))
    np.testing.assert_allclose(found.matrix("correlation")[0, 1], want[0, 1], atol=1e-4)
    assert found["a", "c"].opposed == np.mean(apart[:, 0] * apart[:, 2] < 0)


def armorm(model, attributes=4, signs=None):
    draw = torch.Generator().manual_seed(1)
    d = model.config.hidden_size
    transform = torch.eye(attributes) - 0.2 * torch.rand(attributes, attributes, generator=draw)
    return Gated(
        weight=torch.randn(attributes, d, generator=draw) / d**0.5,
        transform=transform,
        gate=Layers(weights=[torch.randn(attributes, d, generator=draw) / d**0.5], biases=[None]),
        temperature=0.5,
        names=tuple("wxyz"),
    )


def test_terms_of_a_gated_head_are_taken_with_their_weights_the_gate_frozen():
    model = M.decoder()
    program = armorm(model)
    rm = rmfast.RewardModel(model, M.tokenizer(chat=True), head=program)
    found = term_conflict(rm, PAIRS, **QUICK)
    texts = [(p, side) for p, *both in PAIRS for side in both]
    scores = rm.score(texts).double().numpy()
    np.testing.assert_allclose(found.contributions.sum(1), scores, atol=1e-5)
    gates = rm.score(texts, output="all")["gates"].double()
    mixed = gates @ program.transform.double().T  # (n, A)
    assert bool((mixed < 0).any())  # a sign that the rows' angles know nothing of
    with O.everything_in_fp64():
        model.double()
        g = gradients(model, program.weight.double(), streams(model, rm)) * mixed[..., None]
    assert found.names == list("wxyz")
    np.testing.assert_allclose(found.matrix(), cosines(g), atol=1e-5)
    assert found.weights == pytest.approx(dict(zip("wxyz", mixed.mean(0).tolist())), abs=1e-5)


def planted(rows):
    model = M.decoder(labels=len(rows))
    with torch.no_grad():
        model.score.weight.copy_(torch.stack(rows))
    return rmfast.RewardModel(model, M.tokenizer(chat=True))


def test_a_planted_conflict_is_found():
    w, v = torch.randn(2, 48, generator=torch.Generator().manual_seed(0)) / 7
    found = term_conflict(planted([w, -w, v]), PAIRS, names=["w", "minus w", "v"], resamples=200, permutations=499)
    row = found["w", "minus w"]
    assert row.cosine == pytest.approx(-1) and row.correlation == pytest.approx(-1) and row.opposed == 1
    assert row.p_all <= 0.01 and row.cosine_high < 0
    assert found.chance == pytest.approx(np.sqrt(stats.beta.ppf(0.95, 0.5, 47 / 2)))
    # A weight of another sign makes peace.
    peace = term_conflict(planted([w, -w, v]), PAIRS, weights=[1, -1, 1], **QUICK)["0", "1"]
    assert peace.cosine == pytest.approx(1) and peace.opposed == 0


def test_unrelated_terms_are_told_apart_from_chance_at_the_stated_rate():
    first, second = np.triu_indices(3, 1)
    wrong = 0
    for seed in range(200):
        apart = np.random.default_rng(seed).normal(size=(25, 3))
        products = apart[:, :, None] * apart[:, None, :]
        figures = figures_of(np.zeros((25, 3)), products, first, second, 0.95, 1, 199, seed)
        wrong += figures["p_all"].min() <= 0.05
    assert stats.binom.ppf(0.001, 200, 0.05) <= wrong <= stats.binom.ppf(0.999, 200, 0.05)


def test_what_it_writes(tmp_path):
    found = term_conflict(rmfast.RewardModel(M.decoder(labels=2), M.tokenizer(chat=True)), PAIRS, **QUICK)
    found.save(tmp_path / "conflict.json")
    kept = json.loads((tmp_path / "conflict.json").read_text())
    assert kept["rows"][0]["cosine"] == found.rows[0].cosine and kept["weights"] == {"0": 1.0, "1": 1.0}
    assert "2 terms over 20 prompts" in repr(found)
    assert len(found.to_dataframe()) == 1
    pytest.importorskip("matplotlib")
    assert len(found.plot("correlation").images) == 1


def refused(model, match, pairs=PAIRS, head=None, **options):
    rm = rmfast.RewardModel(model, M.tokenizer(chat=True), head=head)
    with pytest.raises(ValueError, match=match):
        term_conflict(rm, pairs, **options)


def test_what_has_no_terms_is_refused_by_name():
    refused(M.decoder(), "several attributes, got one")
    refused(M.mlp_head(M.decoder(labels=2), labels=2), "single nn.Linear")
    refused(M.decoder(labels=2), "at least 20 prompts, got 19", PAIRS[:19])
    refused(M.decoder(labels=2), "names of terms to be different", names=["a", "a"])
    refused(M.decoder(labels=2), "'b' without", names=["a", "b"], weights=[1, 0])
    refused(M.decoder(labels=2), "'0' tells apart", [(p, "same", "same") for p, *_ in PAIRS])
    model = M.decoder()
    refused(model, "Expected no weights: Gated", head=armorm(model), weights=[1, 1, 1, 1])
