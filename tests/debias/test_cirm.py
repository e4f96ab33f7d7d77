"""Finding the neurons that carry a planted bias, and choosing what to clamp."""

from __future__ import annotations

import json
import warnings
from typing import Any

import models
import numpy as np
import pytest
import scipy.stats
import torch
from planted import biased, pairs

import rmfast
from rmfast import debias
from rmfast.interventions import NeuronClamp

LENGTH_NEURON = "model.layers.0.self_attn.o_proj", 0


@pytest.fixture(scope="module")
def rm() -> rmfast.RewardModel:
    return biased()


def where(clamp: NeuronClamp) -> list[tuple[str, int]]:
    return [(name, int(i)) for name, (indices, _) in clamp.neurons.items() for i in indices]


@pytest.mark.parametrize("positions", ["last", "all"])
def test_the_planted_neuron_is_found_and_clamped(rm, positions):
    given, other = pairs(40), pairs(40, seed=1)
    clamp = debias.fit(rm, given, attributes=["length"], k=1, positions=positions)
    assert clamp.positions == positions
    assert LENGTH_NEURON in where(clamp)
    assert clamp.metadata["accuracy_before"] < 0.7
    assert clamp.metadata["accuracy_after"] == 1
    before, after = (debias.report(m, other, attributes=["length"]) for m in (rm, rm.with_interventions(clamp)))
    assert before["length", "spearman"].value > 0.9
    assert abs(after["length", "spearman"].value) < 0.3
    assert (before["accuracy"].value < 0.7, after["accuracy"].value) == (True, 1)


def test_correlations_and_medians_are_those_of_the_activations(rm):
    given = pairs(12)
    neurons = debias.localise(rm, given, attributes=["length", "exclamation"])
    texts = [(p, text) for p, *both in given for text in both]
    found: dict[str, list[torch.Tensor]] = {}
    hooks = [
        rm.model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: found.setdefault(name, []).append(out[0, -1].detach())
        )
        for name in neurons.sizes
    ]
    for item in rm.encode(texts):
        models.alone(rm.model, item.ids.tolist())
    for hook in hooks:
        hook.remove()
    outputs = torch.cat([torch.stack(found[name]) for name in neurons.sizes], 1).numpy()
    assert outputs.shape == (24, len(neurons))
    np.testing.assert_allclose(neurons.median, np.median(outputs, axis=0), atol=1e-5)
    values = debias.attributes(*zip(*texts))
    module, neuron, rho, _ = neurons.top("length", 1)[0]
    assert rho == pytest.approx(-1, abs=1e-6)
    names = [(name, i) for name, size in neurons.sizes.items() for i in range(size)]
    at = names.index((module, neuron))
    assert scipy.stats.spearmanr(outputs[:, at], values["length"]).statistic == pytest.approx(rho, abs=1e-6)


def test_both_ends_of_each_ranking_are_taken_over_all_layers(rm):
    neurons = debias.localise(rm, pairs(12), attributes=["length", "exclamation"])
    clamp = neurons.clamp({"length": 3, "exclamation": 0})
    column = np.sort(neurons.spearman[:, 0])
    names = [(name, i) for name, size in neurons.sizes.items() for i in range(size)]
    assert len(clamp) == 6
    assert sorted(neurons.spearman[names.index(pair), 0] for pair in where(clamp)) == [*column[:3], *column[-3:]]
    for name, (indices, values) in clamp.neurons.items():
        assert values.tolist() == [neurons.median[names.index((name, int(i)))] for i in indices]


def searched(rm: rmfast.RewardModel, **kw: Any) -> NeuronClamp:
    return debias.fit(rm, pairs(20), attributes=["length", "exclamation"], **{"trials": 12, "choices": (1, 2, 4), **kw})


def test_the_search_gives_the_same_clamp_for_the_same_seed(rm):
    pytest.importorskip("optuna")
    first, second = searched(rm), searched(rm)
    assert where(first) == where(second)
    assert first.metadata["accuracy_after"] == 1
    assert LENGTH_NEURON in where(first)
    assert {k: v for k, v in first.metadata.items() if k != "seconds"} == {
        k: v for k, v in second.metadata.items() if k != "seconds"
    }


def test_a_setting_is_run_once(rm, monkeypatch):
    pytest.importorskip("optuna")
    from rmfast.last_token import LastTokenRuns

    calls, run = [], LastTokenRuns.rewards

    def counted(self: Any, clamp: Any = None) -> torch.Tensor:
        calls.append(clamp)
        return run(self, clamp)

    monkeypatch.setattr(LastTokenRuns, "rewards", counted)
    clamp = searched(rm, trials=8)
    settings = clamp.metadata["search"]["settings"]
    assert settings <= 8  # of the 9 of 2 attributes and 3 choices
    assert len(calls) == settings + 1  # and the model as it is


def test_the_search_prints_nothing_and_leaves_optunas_logging_as_it_was(rm, capfd):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.INFO)
    searched(rm, trials=2)
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
    assert capfd.readouterr().err == ""


def test_choices_and_seed_of_numpy_are_saved(rm, tmp_path):
    pytest.importorskip("optuna")
    clamp = searched(rm, trials=2, choices=np.array([1, 2, 5000]), seed=np.int64(3))
    clamp.save(tmp_path)
    found = NeuronClamp.load(tmp_path).metadata["search"]
    assert (found["choices"], found["seed"]) == ([1, 2], 3)


@pytest.mark.parametrize("positions", ["last", "all"])
def test_texts_longer_than_the_models_own_limit_take_a_max_length(rm, positions, monkeypatch):
    monkeypatch.setattr(type(rm), "max_length", 20)
    kw = {"attributes": ["length"], "max_length": 100}
    assert len(debias.fit(rm, pairs(10), k=1, positions=positions, **kw)) > 0
    assert len(debias.localise(rm, pairs(10), **kw)) == 192


@pytest.mark.parametrize("kw", [{"k": 10_000}, {"k": {"size": 1}}, {"choices": (5000,)}])
def test_what_is_wrong_with_k_is_said_before_the_model_runs(rm, kw, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr("rmfast.debias.study.LastTokenRuns", None)
    with pytest.raises(ValueError, match=r"Expected (k|choices)"):
        debias.fit(rm, pairs(8), attributes=["length"], **kw)


def test_where_every_clamp_harms_the_model_is_left_as_it_is(rm):
    pytest.importorskip("optuna")
    longer = [("q", "a" * (n + 8), "a" * n) for n in range(10, 30)]
    with pytest.warns(UserWarning, match="the clamp is empty"):
        clamp = debias.fit(rm, longer, attributes=["length"], trials=3, choices=(1, 2))
    assert len(clamp) == 0
    assert clamp.metadata["accuracy_after"] == clamp.metadata["accuracy_before"] == 1


def test_what_was_found_is_saved_with_the_clamp(rm, tmp_path):
    clamp = debias.fit(rm, pairs(10), attributes=["length"], k=2)
    clamp.save(tmp_path)
    loaded = NeuronClamp.load(tmp_path)
    assert loaded.metadata == json.loads(json.dumps(clamp.metadata))
    assert loaded.metadata["k"] == {"length": 2}
    assert loaded.metadata["neurons"] == len(clamp) == 4
    assert set(loaded.metadata["seconds"]) >= {"prefixes", "localisation"}
    other = rmfast.RewardModel(models.decoder("llama"), models.tokenizer())
    with pytest.raises(ValueError, match="fingerprint"):
        other.with_interventions(loaded)


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"pairs": pairs(7)}, "at least 8 pairs, got 7"),
        ({"pairs": [*pairs(8), ("q", "a", "")]}, "pair 8 has no rejected"),
        ({"attributes": ["length", "bold"]}, r"bold is the same in all 16: .* attributes=\['length'\]"),
        ({"k": 10_000}, "k of length, neurons of the model's 192, to be an int from 0 to 192, got 10000"),
        ({"k": -1}, "k of length, .* got -1"),
        ({"k": {"overlap": 3}}, r"k of each attribute \(length"),
        ({"k": "all"}, 'k to be "search"'),
        ({"trials": 0}, "trials to be a positive int, got 0"),
        ({"choices": (5000,)}, "choices at most the model's 192 neurons"),
        ({"choices": (1.5, 1)}, r"choices, where it is a share .* in \(0, 1\), got 1.5"),
        ({"k": 2.0}, r"k of length, where it is a share .* in \(0, 1\), got 2.0"),
        ({"choices": 50}, "choices to be a sequence of ints, .*, got 50"),
        ({"rule": "best"}, 'rule to be "accuracy" or "one_se"'),
        ({"folds": 0}, "folds to be a positive int, got 0"),
        ({"folds": 9}, "pairs of at least 9 prompts|least that rank neurons"),
        ({"positions": "first"}, 'positions to be "last" or "all"'),
    ],
)
def test_fit_refuses(rm, kw, message):
    given = {"pairs": pairs(8), "attributes": ["length"], **kw}
    with pytest.raises((ValueError, TypeError), match=message):
        debias.fit(rm, given.pop("pairs"), **given)


def test_a_model_of_several_rewards_is_refused():
    rm = rmfast.RewardModel(models.decoder("llama", labels=2), models.tokenizer())
    with pytest.raises(ValueError, match="a model of one reward, got one of 2"):
        debias.fit(rm, pairs(8), attributes=["length"], k=1)


def test_without_optuna_the_search_says_what_to_install(rm, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ImportError, match=r"rmfast\[debias\]"):
        searched(rm, trials=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(searched(rm, k=1)) > 0
