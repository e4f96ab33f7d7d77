"""Measuring biases on pairs, finding the neurons that carry them, and choosing what to clamp."""

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
from rmfast.pairs import read_pairs

LENGTH_NEURON = "model.layers.0.self_attn.o_proj", 0


@pytest.fixture(scope="module")
def rm() -> rmfast.RewardModel:
    return biased()


# Pairs ----------------------------------------------------------------------------------------------------------------


def test_pairs_are_triples_mappings_and_messages():
    user, good, bad = ({"role": role, "content": text} for role, text in
                       [("user", "Hi"), ("assistant", "Hello!"), ("assistant", "No.")])  # fmt: skip
    expected = ("Hi", "Hello!", "No.")
    for item in [
        ("Hi", "Hello!", "No."),
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."},
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"chosen": [user, good], "rejected": [user, bad]},
        {"prompt": "Hi", "chosen": [good], "rejected": [bad]},
        {"prompt": [user], "chosen": "Hello!", "rejected": "No."},
    ]:
        (pair,) = read_pairs([item])
        assert (pair.prompt, pair.chosen, pair.rejected) == expected, item
    assert read_pairs([{"prompt": [user], "chosen": [good], "rejected": [bad]}])[0].inputs == (
        [user, good],
        [user, bad],
    )


def test_whole_texts_part_at_the_first_word_that_differs():
    (pair,) = read_pairs([{"chosen": "Q: why? A: Yes it is", "rejected": "Q: why? A: Yesterday"}])
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Q: why? A: ", "Yes it is", "Yesterday")
    assert pair.inputs == ("Q: why? A: Yes it is", "Q: why? A: Yesterday")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"prompt": "q", "chosen": "a"}, "pair 1 has no rejected"),
        (("q", " ", "b"), "pair 1 has no chosen"),
        (("q", "a", 3), "pair 1 has no rejected: got int"),
        (("a", "b"), "pair 1: expected .* got 2 entries"),
        (("q", "a", [{"role": "assistant", "content": "b"}]), "pair 1: expected chosen and rejected both"),
        ((3, "a", "b"), "pair 1: expected prompt as text or messages"),
    ],
)
def test_a_bad_pair_is_named(item, message):
    with pytest.raises(ValueError, match=message):
        read_pairs([("q", "a", "b"), item])


@pytest.mark.parametrize("one", [("q", "a", "b"), {"prompt": "q", "chosen": "a", "rejected": "b"}, "text", 3])
def test_one_pair_is_no_sequence_of_pairs(one):
    with pytest.raises(TypeError, match="Expected pairs to be a sequence"):
        read_pairs(one)


# Attributes -----------------------------------------------------------------------------------------------------------


def test_attributes_are_counted_as_by_hand():
    prompts = ["Name a red Fruit", "x", ""]
    responses = ["An apple!\n\nA **red** one!", "", "no words here"]
    found = debias.attributes(prompts, responses)
    assert found.names == ("length", "paragraphs", "overlap", "exclamation", "bold")
    # distinct words an, apple, a, red, one: two of five are in the prompt
    assert found.values.tolist() == [[25, 1, 2 / 5, 2, 2], [0, 0, 0, 0, 0], [13, 0, 0, 0, 0]]
    assert found["overlap"].tolist() == [2 / 5, 0, 0]


def test_attributes_take_messages_and_functions():
    prompt, response = [{"role": "user", "content": "Why?"}], [{"role": "assistant", "content": "Why not? Because."}]
    found = debias.attributes([prompt], [response], functions={"questions": lambda p, r: r.count("?") / p.count("?")})
    assert found.names[-1] == "questions"
    assert found.values[0].tolist() == [17, 0, 1 / 3, 0, 0, 1]


@pytest.mark.parametrize(
    ("prompts", "functions", "message"),
    [
        (["a", "b"], None, "as many prompts as responses, got 2 and 1"),
        (["a"], {"bad": lambda p, r: "x"}, "'bad' of text 0 is no number"),
        (["a"], {"bad": lambda p, r: float("nan")}, "'bad' of text 0 is not finite"),
    ],
)
def test_attributes_refuse_what_is_no_number(prompts, functions, message):
    with pytest.raises(ValueError, match=message):
        debias.attributes(prompts, ["r"], functions=functions)


# Report ---------------------------------------------------------------------------------------------------------------


def toy(n: int = 60) -> tuple[list[tuple[str, str, str]], np.ndarray]:
    """Pairs with many ties in their attributes, and rewards with ties."""
    rng = np.random.default_rng(5)
    texts = [["x" * a + "!" * b for a, b in rng.integers(1, 9, (2, 2))] for _ in range(n)]
    rewards = rng.integers(0, 6, (n, 2)) + np.array([[len(text) / 8 for text in pair] for pair in texts])
    return [("q", *pair) for pair in texts], rewards


def test_report_has_the_figures_of_scipy_and_of_counting():
    given, rewards = toy()
    report = debias.report(None, given, rewards=rewards, attributes=["length", "exclamation"])
    lengths = np.array([[len(text) for text in pair[1:]] for pair in given])
    right = np.where(rewards[:, 0] == rewards[:, 1], 0.5, rewards[:, 0] > rewards[:, 1])
    more, less = lengths[:, 0] > lengths[:, 1], lengths[:, 0] < lengths[:, 1]
    assert report["accuracy"].value == right.mean()
    assert report["length", "spearman"].value == pytest.approx(
        scipy.stats.spearmanr(lengths.ravel(), rewards.ravel()).statistic, abs=1e-12
    )
    for name, mask in (("accuracy_more", more), ("accuracy_less", less)):
        assert report["length", name].value == pytest.approx(right[mask].mean())
        assert report["length", name].n == mask.sum()
    assert (report["length", "spearman"].n, report["accuracy"].n) == (120, 60)
    assert report.attributes == ["length", "exclamation"]


def test_intervals_are_those_of_scipys_bootstrap():
    given, rewards = toy()
    report = debias.report(None, given, rewards=rewards, attributes=["length"], resamples=4000)
    lengths = np.array([[len(text) for text in pair[1:]] for pair in given])

    def spearman(index: np.ndarray) -> float:
        return scipy.stats.spearmanr(lengths[index].ravel(), rewards[index].ravel()).statistic

    def accuracy(index: np.ndarray) -> float:
        margin = rewards[index, 0] - rewards[index, 1]
        return np.mean((margin > 0) + 0.5 * (margin == 0))

    for key, statistic in ((("length", "spearman"), spearman), ("accuracy", accuracy)):
        expected = scipy.stats.bootstrap(
            (np.arange(60),), statistic, n_resamples=2000, vectorized=False, method="percentile", rng=1
        ).confidence_interval
        assert (report[key].low, report[key].high) == pytest.approx(expected, abs=0.03)


def test_report_of_a_model_scores_the_pairs(rm):
    given = pairs(20)
    rewards = rm.score([(p, text) for p, *texts in given for text in texts]).reshape(20, 2)
    kw = {"attributes": ["length", "exclamation"]}
    assert debias.report(rm, given, **kw) == debias.report(None, given, rewards=rewards, **kw)


def test_rewards_may_be_tensors_of_any_kind():
    given, rewards = toy()
    tensor = torch.from_numpy(rewards).bfloat16().requires_grad_()
    one, other = (debias.report(None, given, rewards=r, attributes=["length"]) for r in (tensor, tensor.tolist()))
    assert one == other


def test_a_constant_attribute_has_no_figures(rm):
    row = debias.report(rm, pairs(10))["bold", "spearman"]
    assert np.isnan([row.value, row.low, row.high]).all()


def test_report_prints_and_draws(rm):
    report = debias.report(rm, pairs(20), attributes=["length", "bold"])
    first, head, length, bold = str(report).splitlines()
    assert first.startswith(f"20 pairs, accuracy {report['accuracy'].value:.3f} [")
    assert head.split()[:2] == ["attribute", "Spearman"]
    assert f"{report['length', 'spearman'].value:+.3f}" in length
    assert bold.split() == ["bold", "-", "-", "n", "0", "-", "n", "0"]
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    axes = debias.plot({"before": report, "after": report})
    assert [tick.get_text() for tick in axes[0].get_xticklabels()] == ["length", "bold"]
    assert axes[0].patches[0].get_height() == report["length", "spearman"].value
    assert len(report.plot()) == 2
    pyplot.close("all")


def test_report_as_a_dataframe(rm):
    pytest.importorskip("pandas")
    frame = debias.report(rm, pairs(10), attributes=["length"]).to_dataframe()
    assert list(frame.columns) == ["attribute", "measure", "value", "low", "high", "n"]
    assert list(frame.measure) == ["accuracy", "spearman", "accuracy_more", "accuracy_less"]


@pytest.mark.parametrize(
    ("given", "kw", "message"),
    [
        (pairs(1), {}, "at least 2 pairs, got 1"),
        (pairs(3), {"attributes": ["size"]}, "among length, .* got 'size'"),
        (pairs(3), {"attributes": []}, "at least one attribute"),
        (pairs(3), {"rewards": np.zeros((2, 2))}, r"rewards of shape \(3, 2\), got \(2, 2\)"),
        (pairs(3), {"rewards": np.zeros((2, 3))}, r"rewards of shape \(3, 2\), got \(2, 3\)"),
        (pairs(3), {"resamples": 0}, "resamples >= 1"),
    ],
)
def test_report_refuses(rm, given, kw, message):
    with pytest.raises(ValueError, match=message):
        debias.report(rm, given, **kw)


# Fit ------------------------------------------------------------------------------------------------------------------


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
    clamp = searched(rm, trials=30)
    settings = clamp.metadata["search"]["settings"]
    assert settings <= 9  # of 2 attributes and 3 choices
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
    monkeypatch.setattr(rm, "max_length", 20)
    kw = {"attributes": ["length"], "max_length": 100}
    assert len(debias.fit(rm, pairs(10), k=1, positions=positions, **kw)) > 0
    assert len(debias.localise(rm, pairs(10), **kw)) == 192


@pytest.mark.parametrize("kw", [{"k": 10_000}, {"k": {"size": 1}}, {"choices": (5000,)}])
def test_what_is_wrong_with_k_is_said_before_the_model_runs(rm, kw, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr("rmfast.last_token.LastTokenRuns", None)
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
        ({"k": 10_000}, "k of length to be at least 0 and at most the model's 192 neurons, got 10000"),
        ({"k": -1}, "k of length to be at least 0"),
        ({"k": {"overlap": 3}}, r"k of each attribute \(length"),
        ({"k": "all"}, 'k to be "search"'),
        ({"trials": 0}, "trials to be a whole number of at least 1, got 0"),
        ({"choices": (5000,)}, "choices at most the model's 192 neurons"),
        ({"choices": (0.5, 1)}, r"choices to be whole numbers of at least 0, got \(0.5, 1\)"),
        ({"choices": 50}, "choices to be whole numbers"),
        ({"positions": "first"}, 'positions to be "last" or "all"'),
    ],
)
def test_fit_refuses(rm, kw, message):
    given = {"pairs": pairs(8), "attributes": ["length"], **kw}
    with pytest.raises(ValueError, match=message):
        debias.fit(rm, given.pop("pairs"), **given)


def test_a_model_of_several_rewards_is_refused():
    rm = rmfast.RewardModel(models.decoder("llama", labels=2), models.tokenizer())
    with pytest.raises(ValueError, match="a model of one reward, got one of 2"):
        debias.fit(rm, pairs(8), attributes=["length"], k=1)


def test_without_optuna_the_search_says_what_to_install(rm, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ImportError, match=r"rmfast\[debias\]"):
        searched(rm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(searched(rm, k=1)) > 0
