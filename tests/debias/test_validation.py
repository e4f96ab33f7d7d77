"""Nested cross-validation of a clamp: nothing of a fold reaches its clamp, planted biases are found, others are not."""

from __future__ import annotations

import json
from typing import Any

import models
import numpy as np
import pytest
import torch
from planted import biased, pairs

import rmfast
from rmfast import debias, heads
from rmfast.debias.measure import attributes_of_pairs, right
from rmfast.debias.neurons import LEAST_PAIRS
from rmfast.debias.search import Tried, choose
from rmfast.debias.study import NONE, Study
from rmfast.texts.pairs import read_pairs

LENGTH_NEURON = "model.layers.0.self_attn.o_proj", 0
QUICK: dict[str, Any] = {"attributes": ["length"], "choices": (1, 2, 4), "folds": 3, "controls": 2}


@pytest.fixture(scope="module")
def rm() -> rmfast.RewardModel:
    return biased()


def studied(rm: rmfast.RewardModel, given: list[Any], folds: int = 3) -> Study:
    read = read_pairs(given)
    found = attributes_of_pairs(read, ["length"])
    return Study(rm, read, found, folds, "last", 0, {}, {"batch_tokens": None, "progress": False}, 2)


def where(clamp: rmfast.NeuronClamp) -> list[tuple[str, int]]:
    return [(name, int(i)) for name, (indices, _) in clamp.neurons.items() for i in indices]


def test_a_planted_bias_is_found_and_beats_random_neurons(rm):
    found = debias.validate(rm, pairs(45), **QUICK)
    assert found.reliable
    assert found["gain"].value > 0.3
    assert found["gain_over_random"].low > 0
    assert LENGTH_NEURON in where(found.clamp)
    assert found["length", "gain_less"].value > 0.6 > abs(found["length", "gain_more"].value)
    assert [len(each) for each in found.chosen.values()] == [4, 4]
    assert str(found).startswith(f"held-out gain: {found['gain'].value:+.3f} [")
    assert found.clamp.metadata["held_out"]["gain"][0] == found["gain"].value


def test_the_held_out_gain_is_that_on_other_pairs(rm):
    nested, fresh = (debias.validate(rm, pairs(45), test=test, **QUICK) for test in (None, pairs(200, seed=1)))
    assert where(nested.clamp) == where(fresh.clamp)
    assert nested["gain"].low < fresh["gain"].value < nested["gain"].high
    rewards = [m.score([(p, t) for p, *both in pairs(200, seed=1) for t in both]).reshape(-1, 2).double()
               for m in (rm, rm.with_interventions(fresh.clamp))]  # fmt: skip
    np.testing.assert_allclose(fresh.before, rewards[0], atol=1e-3)
    np.testing.assert_allclose(fresh.after, rewards[1], atol=1e-3)
    assert (fresh.folds, nested.folds) == (0, 3)


def test_nothing_of_a_fold_reaches_its_clamp(rm):
    """Other texts in a fold change its own rewards alone."""
    given = pairs(30)
    study = studied(rm, given)
    part = study.parts[1]
    changed = [("say:", chosen + "abc" * 9, rejected) if i in part else pair
               for i, pair in enumerate(given) for _, chosen, rejected in [pair]]  # fmt: skip
    other = studied(rm, changed)
    for each in (study, other):
        each.rank([NONE, frozenset({1}), frozenset({0, 1})])
    for without, same in ((frozenset({1}), True), (frozenset({0, 1}), True), (NONE, False)):
        one, two = study.neurons(without), other.neurons(without)
        assert np.array_equal(one.median, two.median) == same
        assert np.array_equal(one.spearman, two.spearman) == same


def test_a_fold_is_judged_with_neurons_of_the_others(rm):
    given = pairs(30)
    study = studied(rm, given)
    found = debias.validate(rm, given, k=2, **QUICK)
    for part in study.parts:
        others = [given[i] for i in range(30) if i not in part]
        clamp = debias.fit(rm, others, attributes=["length"], k=2)
        texts = [(p, text) for i in part for p, *both in [given[i]] for text in both]
        rewards = rm.with_interventions(clamp).score(texts).double().reshape(-1, 2)
        np.testing.assert_allclose(found.after[part], rewards, atol=1e-3)
    assert not found.rules and found.clamp.metadata["k"] == {"length": 2}


def test_pairs_of_one_prompt_stay_in_one_fold(rm):
    given = [(f"say {i // 4}:", chosen, rejected) for i, (_, chosen, rejected) in enumerate(pairs(40))]
    study = studied(rm, given)
    assert sorted(np.concatenate(study.parts)) == [*range(40)]
    assert all(len(part) in (12, 16) and len(set(part // 4)) == len(part) / 4 for part in study.parts)


def gated(plain: rmfast.RewardModel, weight: torch.Tensor) -> rmfast.RewardModel:
    """ArmoRM's kind: objectives, weighted by a gate that reads the prompt's end, here at its colon."""
    draw, n = torch.Generator().manual_seed(0), len(weight)
    gate = heads.Layers(weights=[torch.randn(n, weight.size(1), generator=draw)], biases=[None])
    colon = (plain.tokenizer.convert_tokens_to_ids(":"),)
    head = heads.Gated(weight=weight, transform=torch.eye(n), gate=gate, pattern=colon)
    return rmfast.RewardModel(plain.model.model, plain.tokenizer, head=head)


@pytest.mark.parametrize(("head", "seeds", "most"), [("linear", 30, 3), ("gated", 4, 1)])
def test_where_labels_are_chance_a_gain_is_claimed_at_the_stated_rate(head, seeds, most):
    """2.5% of the seeds are expected; more than 3 of 30 have a probability of 0.7%, as more than 1 of 4 has 0.4%."""
    rm = rmfast.RewardModel(models.decoder("llama"), models.tokenizer())
    rm = rm if head == "linear" else gated(rm, torch.randn(3, 48, generator=torch.Generator().manual_seed(1)))
    claimed, moved = 0, 0
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        texts = ["".join(rng.choice([*"abcdef "], size=int(rng.integers(5, 20)))) + "." for _ in range(48)]
        given = [(f"q{i % 10}:", *texts[2 * i : 2 * i + 2]) for i in range(24)]
        found = debias.validate(rm, given, attributes=["length"], k=20, folds=2, controls=0, seed=seed)
        claimed += found.reliable
        moved += bool((right(found.after) != right(found.before)).any())
    assert moved > seeds / 2
    assert claimed <= most


def test_a_bias_behind_a_gate_is_found():
    """One of two objectives likes length."""
    plain = biased()
    weight = torch.zeros(2, plain.binding.width)
    weight[0, :2], weight[1, 1] = torch.tensor([-800.0, 1.0]), 1.0
    found = debias.validate(gated(plain, weight), pairs(45), **QUICK)
    assert found.reliable
    assert any(name.endswith("layers.0.self_attn.o_proj") and i == 0 for name, i in where(found.clamp))
    assert found["gain_over_random"].low > 0


def test_clamps_at_all_positions_are_judged_too(rm):
    found = debias.validate(rm, pairs(30), positions="all", k=1, **{**QUICK, "controls": 1})
    assert found.clamp.positions == "all"
    assert found["gain"].value > 0.2
    judged = debias.validate(rm, pairs(30), test=pairs(30, seed=1), positions="all", k=1, **QUICK)
    assert judged.reliable


def test_the_rules_take_the_best_and_the_smallest_near_it():
    def tried(name: int, neurons: int, wrong: int) -> Tried:
        rewards = np.tile([1.0, 0.0], (100, 1))
        rewards[:wrong] = [0.0, 1.0]
        return Tried({"length": name}, neurons, rewards)

    before = tried(0, 0, 40).rewards
    some = [tried(1, 2, 38), tried(2, 4, 24), tried(3, 6, 20), tried(4, 8, 20), tried(5, 10, 22)]
    of = np.arange(100)
    assert choose("accuracy", some, before, of).ks == {"length": 3}
    assert choose("one_se", some, before, of).ks == {"length": 2}  # an error of 4 pairs
    assert choose("one_se", some[:1], tried(0, 0, 39).rewards, of).ks == {"length": 0}
    assert choose("accuracy", some, tried(0, 0, 10).rewards, of).ks == {"length": 0}


def test_a_random_control_has_as_many_neurons_of_each_projection(rm):
    neurons = debias.localise(rm, pairs(12), attributes=["length"])
    like = neurons.clamp(9)
    drawn = [neurons.random(like, seed) for seed in (0, 0, 1)]
    for clamp in drawn:
        assert {name: len(i) for name, (i, _) in clamp.neurons.items()} == {
            name: len(i) for name, (i, _) in like.neurons.items()
        }
    assert where(drawn[0]) == where(drawn[1]) != where(drawn[2])
    starts = dict(zip(neurons.sizes, np.cumsum([0, *neurons.sizes.values()])))
    for name, (indices, values) in drawn[2].neurons.items():
        assert values.tolist() == [neurons.median[starts[name] + int(i)] for i in indices]


def test_what_it_says_draws_and_writes(rm, tmp_path):
    found = debias.validate(rm, pairs(45), **QUICK)
    *folds, whole = (each["length"] for each in found.chosen["one_se"])
    assert f"k of all attributes: {whole} with all pairs, in the folds {' '.join(map(str, folds))}\n" in str(found)
    found.save(tmp_path / "gain.json")
    kept = json.loads((tmp_path / "gain.json").read_text())
    assert kept["rows"][0] == found["gain"]._asdict()
    assert kept["reliable"] is True and kept["verdict"] == found.verdict and kept["chosen"] == found.chosen
    assert len(kept["curve"]) == len(found.curve)
    pytest.importorskip("matplotlib")
    names = [label.get_text() for label in found.plot().get_yticklabels()]
    assert names[0] == "k by accuracy (n 45)" and len(names) == 7
    given = debias.validate(rm, pairs(45), test=pairs(20, seed=1), k=2, **{**QUICK, "controls": 0})
    assert given.plot().get_yticklabels()[0].get_text() == "gain (n 20)"


def test_shares_are_of_all_neurons(rm):
    neurons = debias.localise(rm, pairs(12), attributes=["length"])
    assert len(neurons.clamp(0.25)) == 2 * round(0.25 * 192 / 2)
    assert len(neurons.clamp(1e-6)) == 2
    clamp = debias.fit(rm, pairs(20), attributes=["length"], choices=(0.01, 0.02, 4), rule="one_se", folds=2)
    assert clamp.metadata["search"] | {"seed": 0} == {
        "trials": 100, "settings": 3, "choices": [1, 2, 4], "seed": 0, "rule": "one_se", "folds": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"folds": 2}, "folds to be an int of at least 3, got 2"),
        ({"folds": 2, "k": 1, "pairs": pairs(15)}, f"ranked by at least {LEAST_PAIRS} pairs, .* 1 of .* be 7"),
        ({"pairs": pairs(20)}, "more pairs, or fewer folds than 3: .* 2 of the folds there may be 6"),
        ({"controls": -1}, "controls to be an int from 0 to 1000"),
        ({"confidence": 1.0}, r"confidence to be a finite number in \(0, 1\)"),
        ({"test": pairs(1)}, "at least 2 pairs, got 1"),
        ({"pairs": [(f"{i % 2}", a, b) for i, (_, a, b) in enumerate(pairs(30))]}, "pairs of at least 3 prompts"),
    ],
)
def test_validate_refuses_before_the_model_runs(rm, kw, message, monkeypatch):
    monkeypatch.setattr("rmfast.debias.study.LastTokenRuns", None)
    given = {"pairs": pairs(30), **QUICK, **kw}
    with pytest.raises(ValueError, match=message):
        debias.validate(rm, given.pop("pairs"), **given)
