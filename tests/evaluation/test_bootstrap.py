"""Intervals: by prompt, of the right width, paired between models."""

from __future__ import annotations

import random

import numpy as np
import pytest
import written

from rmfast.evaluation import evaluated, read_items
from rmfast.resampling import clusters, drawn
from rmfast.texts.tables import Row


def scored(n, each, seed=0, **kw):
    """Pairs that are right in 70%, `each` alike to a prompt."""
    rng = random.Random(seed)
    right = [rng.random() < 0.7 for _ in range(n // each)]
    rows = [{"prompt": f"p{i // each}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(n)]
    of, items = read_items(Row(i + 1, row) for i, row in enumerate(rows))
    return evaluated(of, items, [[1.0, 0.0] if right[i // each] else [0.0, 1.0] for i in range(n)], **kw)


def test_items_of_a_prompt_are_drawn_together():
    of = clusters(["a", "b", "a", "c"])
    assert of.tolist() == [0, 1, 0, 2]
    weights = np.concatenate(list(drawn(of, 50, 3)))
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()
    assert not (weights[0] == weights).all()


def test_an_interval_has_the_width_of_the_standard_error_over_prompts():
    figure = scored(400, 1, resamples=4000)["all", "accuracy"]
    p = figure.value
    assert figure.high - figure.low == pytest.approx(2 * 1.96 * (p * (1 - p) / 400) ** 0.5, rel=0.1)
    figure = scored(400, 4, resamples=4000)["all", "accuracy"]
    p = figure.value
    assert figure.prompts == 100
    assert figure.high - figure.low == pytest.approx(2 * 1.96 * (p * (1 - p) / 100) ** 0.5, rel=0.1)


def test_an_interval_of_another_confidence_and_seed():
    wide, narrow = (scored(100, 1, confidence=c)["all", "accuracy"] for c in (0.99, 0.5))
    assert wide.low < narrow.low < wide.value < narrow.high < wide.high
    assert scored(100, 1, seed=0).rows == scored(100, 1, seed=0).rows


def test_draws_in_pieces_are_those_of_one_go(monkeypatch):
    of = np.arange(10)
    whole = np.concatenate(list(drawn(of, 25, 0)))
    monkeypatch.setattr("rmfast.resampling._AT_ONCE", 30)
    assert (np.concatenate(list(drawn(of, 25, 0))) == whole).all()


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize(("scores", "count", "confidence", "low", "high"), [
    ([1.0, 0.0], 12, 0.95, 0.025 ** (1 / 12), 1.0),
    ([0.0, 1.0], 12, 0.95, 0.0, 1 - 0.025 ** (1 / 12)),
    ([1.0, 0.0], 300, 0.9, 0.05 ** (1 / 300), 1.0),
    ([1.0, 1.0], 20, 0.95, 0.2720, 0.7280),  # 10 of 20
])  # fmt: skip
def test_a_figure_whose_resamples_are_all_equal_is_not_certain(scores, count, confidence, low, high, each):
    rows = [{"prompt": f"p{i}", "chosen": f"a{j}", "rejected": f"b{j}"} for i in range(count) for j in range(each)]
    of, items = read_items(Row(i + 1, row) for i, row in enumerate(rows))
    figure = evaluated(of, items, [scores] * len(items), confidence=confidence)["all", "accuracy"]
    assert figure.prompts == count
    assert (figure.low, figure.high) == pytest.approx((low, high), abs=5e-5)


def test_differences_are_paired():
    rows = written.pairs(60)
    of, items = read_items(Row(i + 1, row) for i, row in enumerate(rows))
    first = written.ordinal(random.Random(0), [2] * 60)
    second = [list(pair) for pair in first]
    second[5] = [0.0, 1.0]
    a, b = (evaluated(of, items, scores) for scores in (first, second))
    same = a.minus(a)
    for row in same.rows:  # that no prompt of n differs bounds the share of those that would
        most = 1 - 0.025 ** (1 / row.prompts)
        assert row[4:7] == (0, pytest.approx(-most), pytest.approx(most))
    change = a.minus(b)["all", "accuracy"]
    assert change.difference == pytest.approx(a["all", "accuracy"].value - b["all", "accuracy"].value)
    assert change.value == a["all", "accuracy"].value and change.other == b["all", "accuracy"].value
    # One pair of 60 differs: the paired interval is far narrower than that of either accuracy.
    assert change.high - change.low < 0.1 < a["all", "accuracy"].high - a["all", "accuracy"].low
    assert "difference" in str(a.minus(b)).splitlines()[0]


def test_models_that_differ_on_every_pair_are_not_certain_to():
    of, items = read_items(Row(i + 1, row) for i, row in enumerate(written.pairs(60)))
    right, wrong = (evaluated(of, items, [scores] * 60) for scores in ([1.0, 0.0], [0.0, 1.0]))
    change = right.minus(wrong)["all", "accuracy"]
    assert change.difference == change.high == 1
    assert change.low == pytest.approx(1 - 2 * (1 - 0.025 ** (1 / change.prompts)))


def test_differences_are_over_the_rows_that_both_have():
    rows = written.pairs(40)
    of, items = read_items(Row(i + 1, row) for i, row in enumerate(rows))
    scores = written.ordinal(random.Random(0), [2] * 40)
    a = evaluated(of, items, scores)
    b = evaluated(of, items[4:], scores[4:], places=range(4, 40), left_out=4)
    change = b.minus(a)["all", "accuracy"]
    assert (change.n, change.difference) == (36, 0)
    assert "4 rows left out" in str(b)


def test_evaluations_of_other_files_are_not_subtracted():
    pair, best = (
        evaluated(*read_items(Row(i + 1, row) for i, row in enumerate(rows)), scores)
        for rows, scores in (
            (written.pairs(4), [[1, 0]] * 4),
            (written.rm_bench(4), [[1, 0, 0, 0, 0, 0]] * 4),
        )
    )
    with pytest.raises(ValueError, match="evaluations of the same file"):
        pair.minus(best)
    with pytest.raises(TypeError, match="Expected other to be a Evaluation"):
        pair.minus(None)


def test_a_small_subset_that_a_resample_misses_has_an_interval():
    rows = [*written.pairs(40), {"prompt": "rare", "chosen": "a", "rejected": "b", "subset": "rare"}]
    of, items = read_items(Row(i + 1, row) for i, row in enumerate(rows))
    got = evaluated(of, items, written.ordinal(random.Random(0), [2] * 41))
    rare = got["rare", "accuracy"]
    one_of_one = (0.025, 1.0) if rare.value else (0.0, 0.975)
    assert (rare.low, rare.high) == pytest.approx(one_of_one, abs=1e-12)
    assert np.isfinite([got["all", "mean of subsets"].low, got["all", "mean of subsets"].high]).all()
