"""Dose response against edits by hooks on unmodified models in fp64; selectivity; refusals."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import models as M
import numpy as np
import oracle as O
import planted
import pytest
import torch

import rmfast
from rmfast import concepts
from rmfast.heads.gated import Gated
from rmfast.heads.gaussian import Gaussian
from rmfast.heads.linear import Layers

PAIRS = [(f"ask {i}", f"yes {i * i}", f"no, not {i}") for i in range(20)]
TEXTS = [(f"tell {i}", f"well {i + 3}") for i in range(20)]
DOSES = [-2.0, 0.0, 0.5, 3.0]
QUICK = {"shuffles": 20, "resamples": 50}


def edited(model, rm, edit):
    """(20,) rewards of the unmodified model whose last token's stream before the final norm is edited."""
    norm = getattr(model.base_model, "norm", None) or model.base_model.ln_f

    def before(module, args):
        x = args[0].clone()
        x[0, -1] = edit(x[0, -1])
        return (x, *args[1:])

    with torch.no_grad(), norm.register_forward_pre_hook(before) as _:
        ids = [torch.from_numpy(item.ids)[None] for item in rm.encode(TEXTS)]
        return torch.stack([model(input_ids=each).logits[0, 0] for each in ids]).numpy()


@pytest.mark.parametrize("way", ["add", "set"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gpt2"])
def test_every_dose_is_the_edit_by_a_hook(family, way):
    model = M.decoder(family)
    rm = rmfast.RewardModel(model, M.tokenizer(chat=True))
    concept = concepts.fit(rm, PAIRS, **QUICK)
    found = concepts.dose_response(rm, concept, TEXTS, doses=DOSES, way=way, random=3, resamples=50)
    scale = M.reward_scale(model)
    p, plain = concept.direction.double(), rm.score(TEXTS).double().numpy()
    np.testing.assert_allclose(found.plain, plain, atol=1e-5 * scale)
    with O.everything_in_fp64():
        model.double()
        for i, dose in enumerate(DOSES):
            by = dose * concept.spread
            to = concept.mean + by
            edit = (lambda h, by=by: h + by * p) if way == "add" else (lambda h, to=to: h + (to - h @ p) * p)
            want = edited(model, rm, edit)
            np.testing.assert_allclose(found.rewards[:, i], want, rtol=1e-5, atol=1e-5 * scale)
            assert found.doses[i].change == pytest.approx((want - plain).mean(), abs=1e-4 * scale)
    slope = np.polyfit(DOSES, found.rewards.mean(0), 1)[0]
    assert found.slope.value == pytest.approx(slope) and found.slope.low <= slope <= found.slope.high
    assert found.slopes.shape == (1 + 3 + 20, 20)


def test_a_model_in_fp64_has_doses_to_its_own_precision():
    model = M.decoder().double()
    rm = rmfast.RewardModel(model, M.tokenizer(chat=True))
    concept = concepts.fit(rm, PAIRS, **QUICK)
    found = concepts.dose_response(rm, concept, TEXTS, doses=DOSES, random=1, resamples=1)
    p = concept.direction.double()
    for i, dose in enumerate(DOSES):
        want = edited(model, rm, lambda h, by=dose * concept.spread: h + by * p)
        np.testing.assert_allclose(found.rewards[:, i], want, rtol=0, atol=1e-6)  # its norms are in fp32


def test_other_directions_are_those_of_runs_of_their_own():
    rm = rmfast.RewardModel(M.decoder(), M.tokenizer(chat=True))
    concept = concepts.fit(rm, PAIRS, **QUICK)
    found = concepts.dose_response(rm, concept, TEXTS, random=2, resamples=1)
    for i in (0, 7, 19):
        alone = replace(concept, direction=concept.shuffled[i])
        again = concepts.dose_response(rm, alone, TEXTS, random=1, resamples=1)
        np.testing.assert_allclose(found.slopes[3 + i], again.slopes[0], rtol=1e-3, atol=1e-5)
    for each, some in zip(found.selectivity, (slice(1, 3), slice(3, None))):
        slopes = found.slopes[some].mean(1)
        assert each.ratio == pytest.approx(abs(found.slope.value) / np.sqrt((slopes**2).mean()))
        assert each.p == pytest.approx((1 + (np.abs(slopes) >= abs(found.slope.value)).sum()) / (1 + len(slopes)))


def likes_plus_alone():
    """A planted model without its taste for short texts, which would drown the other one."""
    rm = planted.biased()
    with torch.no_grad():
        rm.model.score.weight[0, 0] = 0
    return rm


def test_a_planted_concept_moves_the_reward_as_no_random_direction_does():
    rm = likes_plus_alone()
    pairs = [(f"say {i}:", a, b) for i, (_, a, b) in enumerate(planted.pairs(30))]
    concept = concepts.fit(rm, pairs, name="plus", shuffles=99)
    texts = [(p, side) for p, *both in pairs for side in both]
    found = concepts.dose_response(rm, concept, texts, prompts=[p for p, _ in texts], random=99, resamples=100)
    assert found.prompts == 30 and found.slope.low > 0
    assert [d.change > 0 for d in found.doses if d.dose] == [False, False, True, True]
    random, shuffled = found.selectivity
    assert random.p == 0.01 and random.low > 1
    assert shuffled.p > 0.05  # in a model of two channels these go along the concept's, whatever the labels


def test_a_gated_head_has_its_gate_where_the_prompt_ends():
    model, draw = M.decoder(), torch.Generator().manual_seed(1)
    program = Gated(
        weight=torch.randn(3, 48, generator=draw) / 7,
        transform=torch.eye(3),
        gate=Layers(weights=[torch.randn(3, 48, generator=draw) / 7], biases=[None]),
        temperature=0.5,
    )
    rm = rmfast.RewardModel(model, M.tokenizer(chat=True), head=program)
    concept = concepts.fit(rm, PAIRS, **QUICK)
    found = concepts.dose_response(rm, concept, TEXTS, doses=DOSES, random=2, resamples=10)
    np.testing.assert_allclose(found.plain, rm.score(TEXTS).double(), atol=1e-5)
    np.testing.assert_allclose(found.rewards[:, 1], found.plain, atol=1e-5)  # dose 0
    parts = rm.score(TEXTS, output="all")
    x = concepts.activations(rm, TEXTS).double()
    for i, dose in enumerate(DOSES):
        h = x + dose * concept.spread * concept.direction.double()
        with torch.no_grad():
            normed = copied(model.model.norm, h)
        want = (parts["gates"].double() * (normed @ program.weight.double().T)).sum(1)
        np.testing.assert_allclose(found.rewards[:, i], want.numpy(), atol=2e-5)


def copied(norm, h):
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight.double()


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gpt2"])
def test_rewards_of_erased_streams_are_those_of_hooks(family):
    model = M.decoder(family)
    rm = rmfast.RewardModel(model, M.tokenizer(chat=True))
    x = concepts.activations(rm, [(p, side) for p, *both in PAIRS for side in both])
    about = {"site": "final", "fingerprint": rm.fingerprint}
    erasure = replace(concepts.leace(x, [1, 0] * 20, shrinkage=0.2), **about)
    got, scale = concepts.erased(rm, erasure, TEXTS).double().numpy(), M.reward_scale(model)
    with O.everything_in_fp64():
        model.double()
        np.testing.assert_allclose(got, edited(model, rm, erasure), rtol=1e-5, atol=1e-5 * scale)


def test_a_head_of_layers_has_no_doses_but_erased_rewards():
    rm = rmfast.RewardModel(M.mlp_head(M.decoder()), M.tokenizer(chat=True))
    concept = concepts.fit(rm, PAIRS, **QUICK)
    with pytest.raises(ValueError, match=r"a head that is linear in one token's stream.*got Sequential"):
        concepts.dose_response(rm, concept, TEXTS)
    x = concepts.activations(rm, TEXTS)
    about = {"site": "final", "fingerprint": rm.fingerprint}
    nothing = concepts.leace(torch.cat([x, x + 1e-3 * torch.eye(20, 48)]), [1, 0] * 20, shrinkage=0.5)
    assert concepts.erased(rm, replace(nothing, **about), TEXTS).shape == (20,)


def test_a_gate_at_the_token_that_is_edited_is_refused():
    draw = torch.Generator().manual_seed(0)
    gate = Layers(weights=[torch.randn(2, 48, generator=draw)], biases=[None])
    rm = rmfast.RewardModel(
        M.decoder(), M.tokenizer(chat=True), head=Gaussian(weight=torch.randn(4, 48, generator=draw), gate=gate)
    )
    with pytest.raises(ValueError, match=r"a gate at another token, .*got Gaussian"):
        concepts.dose_response(rm, concepts.fit(rm, PAIRS, **QUICK), TEXTS)


def test_what_it_writes(tmp_path):
    rm = rmfast.RewardModel(M.decoder(), M.tokenizer(chat=True))
    found = concepts.dose_response(rm, concepts.fit(rm, PAIRS, **QUICK), TEXTS, random=5, resamples=50)
    found.save(tmp_path / "dose.json")
    kept = json.loads((tmp_path / "dose.json").read_text())
    assert len(kept["doses"]) == 5 and kept["slope"]["value"] == found.slope.value
    assert kept["selectivity"][1]["against"] == "shuffled labels"
    dataclasses.replace(found, slope=found.slope._replace(low=float("nan"))).save(tmp_path / "dose.json")
    assert json.loads((tmp_path / "dose.json").read_text())["slope"]["low"] is None
    assert "Dose response of 'concept' (add), 20 texts of 20 prompts" in repr(found)
    assert len(found.to_dataframe()) == 5
    pytest.importorskip("matplotlib")
    assert len(found.plot().get_legend().texts) == 3


def test_refusals():
    rm = rmfast.RewardModel(M.decoder(), M.tokenizer(chat=True))
    concept = concepts.fit(rm, PAIRS, **QUICK)
    for given, match in [
        ({"doses": [1.0]}, "two different ones"),
        ({"doses": [1.0, 1.0]}, "two different ones"),
        ({"way": "clamp"}, "way"),
        ({"inputs": TEXTS[:19]}, "at least 20 prompts, got 19"),
        ({"prompts": ["one"] * 20}, "at least 20 prompts, got 1"),
        ({"concept": replace(concept, spread=0.0)}, "of some spread"),
        ({"concept": replace(concept, fingerprint="x")}, "fitted on this model"),
        ({"concept": concepts.fit(rm, PAIRS, site="normed", **QUICK)}, 'site "final".*got normed'),
        ({"concept": concepts.fit(rm, PAIRS, site="attn_out", layer=1, **QUICK)}, "got attn_out of layer 1"),
    ]:
        with pytest.raises(ValueError, match=match):
            concepts.dose_response(rm, **{"concept": concept, "inputs": TEXTS, **given})
    several = rmfast.RewardModel(M.decoder(labels=2), M.tokenizer(chat=True))
    with pytest.raises(ValueError, match="one reward, got one of 2"):
        concepts.dose_response(several, concepts.fit(several, PAIRS, **QUICK), TEXTS)
