"""Attributes of texts, and how far rewards follow them on pairs: the figures of scipy and of counting."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from planted import biased, pairs

import rmfast
from rmfast import debias


@pytest.fixture(scope="module")
def rm() -> rmfast.RewardModel:
    return biased()


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


def test_report_as_a_dataframe(rm):
    pytest.importorskip("pandas")
    frame = debias.report(rm, pairs(10), attributes=["length"]).to_dataframe()
    assert list(frame.columns) == ["attribute", "measure", "value", "low", "high", "n"]
    assert list(frame.measure) == ["accuracy", "spearman", "accuracy_more", "accuracy_less"]


@pytest.mark.parametrize(
    ("given", "kw", "message"),
    [
        (pairs(1), {}, "at least 2 pairs, got 1"),
        (pairs(3), {"attributes": ["size"]}, r"attributes, .* to be of length, .* got \['size'\]"),
        (pairs(3), {"attributes": []}, "attributes, .* to be of length"),
        (pairs(3), {"rewards": np.zeros((2, 2))}, r"rewards to be of shape \(3, 2\), got \(2, 2\)"),
        (pairs(3), {"rewards": np.zeros((2, 3))}, r"rewards to be of shape \(3, 2\), got \(2, 3\)"),
        (pairs(3), {"resamples": 0}, "resamples to be a positive int, got 0"),
    ],
)
def test_report_refuses(rm, given, kw, message):
    with pytest.raises(ValueError, match=message):
        debias.report(rm, given, **kw)


def test_columns_of_the_pairs_are_attributes_too():
    given, rewards = toy()
    lengths = [[len(text) for text in pair[1:]] for pair in given]
    rows = [
        {"prompt": p, "chosen": a, "rejected": b, "size_chosen": str(x), "size_rejected": y}  # CSV has texts alone
        for (p, a, b), (x, y) in zip(given, lengths)
    ]
    kw = {"rewards": rewards, "resamples": 10}
    want = debias.report(None, given, attributes=["length"], **kw)
    found = debias.report(None, rows, attributes=["size"], **kw)
    assert [row[1:] for row in found.rows] == [row[1:] for row in want.rows]
    both = debias.report(None, rows, attributes={"mine": "size", "n": lambda prompt, text: len(text)}, **kw)
    assert both.attributes == ["mine", "n"]
    assert both["mine", "spearman"][2:] == both["n", "spearman"][2:] == want["length", "spearman"][2:]
    with pytest.raises(ValueError, match="columns toxicity_chosen and toxicity_rejected"):
        debias.report(None, rows, attributes={"mine": "toxicity"}, **kw)
    with pytest.raises(ValueError, match="to be of length, paragraphs, overlap, exclamation, bold, size, got"):
        debias.report(None, rows, attributes=["toxicity"], **kw)
    rows[3]["size_rejected"] = "many"
    with pytest.raises(ValueError, match="'size' of text 7 is no number"):
        debias.report(None, rows, attributes=["size"], **kw)
