"""Figures of every layout against their formulas, written out plainly, on scores with many ties."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import written

from rmfast.evaluation import evaluated, layout_of, read_items
from rmfast.evaluation.pairs import SECTIONS
from rmfast.texts.tables import Row


def found(rows, seed=0, layout=None, most=6, **kw):
    """The evaluation of rows with random scores, and these."""
    of, items = read_items((Row(i + 1, row) for i, row in enumerate(rows)), layout)
    scores = written.ordinal(random.Random(seed), [len(item.inputs) for item in items], most)
    return evaluated(of, items, scores, resamples=20, **kw), scores


def average(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize("seed", range(5))
def test_pairs_count_ties_half(seed):
    rows = written.pairs(30)
    got, scores = found(rows, seed)
    by_subset = {name: [] for name in "abc"}
    for row, (chosen, rejected) in zip(rows, scores):
        by_subset[row["subset"]].append(1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0)
    for name, credits in by_subset.items():
        figure = got[name, "accuracy"]
        assert figure.value == pytest.approx(average(credits))
        assert (figure.n, figure.prompts, figure.ties) == (10, 10, credits.count(0.5))
    everything = [credit for credits in by_subset.values() for credit in credits]
    assert got["all", "accuracy"].value == pytest.approx(average(everything))
    assert (got["all", "accuracy"].n, got["all", "accuracy"].prompts) == (30, 15)
    assert got["all", "mean of subsets"].value == pytest.approx(average(map(average, by_subset.values())))


def test_pairs_without_a_subset_have_one_figure():
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in written.pairs()]
    got, _ = found(rows)
    assert [row[:2] for row in got.rows] == [("all", "accuracy")]


def test_pairs_of_no_subset_among_others_are_named_so():
    rows = [row | ({"subset": None} if i < 4 else {}) for i, row in enumerate(written.pairs(12))]
    got, _ = found(rows)
    assert got["(none)", "accuracy"].n == 4 and got["all", "accuracy"].n == 12


def test_a_subset_called_all_is_refused_beside_others():
    with pytest.raises(ValueError, match="without a subset called 'all'"):
        found([row | ({"subset": "all"} if i < 4 else {}) for i, row in enumerate(written.pairs(12))])
    got, _ = found([row | {"subset": "all"} for row in written.pairs(12)])
    assert len(got.rows) == 1


@pytest.mark.parametrize("seed", range(5))
def test_sections_of_rewardbench_weight_their_subsets_and_a_tie_is_wrong(seed):
    rows = written.rewardbench(36)
    got, scores = found(rows, seed)
    assert got.layout.name == "rewardbench"
    accuracy = {}
    for name in written.SUBSETS:
        mine = [pair for row, pair in zip(rows, scores) if row["subset"] == name]
        accuracy[name] = average(chosen > rejected for chosen, rejected in mine)
        assert got[name, "accuracy"].value == pytest.approx(accuracy[name])
    # 984 of math-prm, 164 of each language of code.
    reasoning = (984 * accuracy["math-prm"] + 164 * accuracy["hep-cpp"] + 164 * accuracy["hep-rust"]) / (984 + 328)
    sections = [accuracy["alpacaeval-easy"], accuracy["mt-bench-hard"], accuracy["donotanswer"], reasoning]
    for name, value in zip(("Chat", "Chat Hard", "Safety", "Reasoning"), sections):
        assert got[name, "section"].value == pytest.approx(value)
    assert got["all", "score"].value == pytest.approx(average(sections))
    board = got.leaderboard("me")
    assert board["model"] == "me" and board["math-prm"] == accuracy["math-prm"] and "Reasoning" in board
    columns = got.leaderboard_scores("me")
    assert columns["scores_chosen"] == [pair[0] for pair in scores] and columns["id"] == list(range(36))
    assert columns["results"] == [int(chosen > rejected) for chosen, rejected in scores]


def test_the_counts_of_rewardbench_are_those_published():
    totals = {name: sum(counts.values()) for name, counts in SECTIONS.items()}
    assert totals == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 984 + 6 * 164}


def test_a_score_of_rewardbench_needs_all_sections():
    got, _ = found([row for row in written.rewardbench() if row["subset"] != "donotanswer"])
    assert ("all", "score") not in {row[:2] for row in got.rows}
    assert got["Chat", "section"].value == got["alpacaeval-easy", "accuracy"].value


@pytest.mark.parametrize("seed", range(8))
def test_the_best_of_four_and_ties(seed):
    rows = written.rewardbench2(16, 9, seed)
    got, scores = found(rows, seed, most=9)
    best, gaps, spreads = {"Math": [], "Factuality": []}, {}, {}
    for row, each in zip(rows, scores):
        if row["subset"] != "Ties":
            top = max(each)
            best[row["subset"]].append(1 / each.count(top) if each[0] == top else 0)
            continue
        right, wrong = each[: row["num_correct"]], each[row["num_correct"] :]
        gaps[row["id"]], spreads[row["id"]] = min(right) - max(wrong), max(right) - min(right)
    tied = average(gaps[f"tied:{i}"] > 0 for i in range(9))
    ref = average(gaps[f"ref:{i}"] > 0 for i in range(9))
    preferred = average(gaps[f"tied:{i}"] > spreads[f"tied:{i}"] for i in range(9))
    least = [min(gaps[f"ref:{i}"], gaps[f"tied:{i}"]) for i in range(9)]
    hard = average(least[i] > spreads[f"tied:{i}"] for i in range(9))
    breaker = 0.0
    for i in range(9):
        if spreads[f"tied:{i}"] > 0:
            breaker += math.tanh(least[i] / spreads[f"tied:{i}"] - 1) / 9
        elif least[i] != 0:  # a number over 0 is infinite, 0 over 0 counts 0
            breaker += math.copysign(1, least[i]) / 9
    ties = 0.3 * tied + 0.3 * ref + 0.2 * preferred + 0.2 * hard + 0.01 * breaker
    assert got["Math", "accuracy"].value == pytest.approx(average(best["Math"]))
    assert got["Ties", "tied accuracy"].value == pytest.approx(tied)
    assert got["Ties", "reference accuracy"].value == pytest.approx(ref)
    assert got["Ties", "gap over spread"].value == pytest.approx(preferred)
    assert got["Ties", "both gaps over spread"].value == pytest.approx(hard)
    assert got["Ties", "score"].value == pytest.approx(ties)
    assert (got["Ties", "score"].n, got["Ties", "score"].prompts) == (18, 9)
    expected = average([average(best["Math"]), average(best["Factuality"]), ties])
    assert got["all", "score"].value == pytest.approx(expected)
    board = got.leaderboard("me")
    assert board["Ties"] == pytest.approx(ties) and board["Math"] == pytest.approx(average(best["Math"]))
    assert got.leaderboard_scores("me")["scores"] == scores


def test_a_tie_at_the_top_is_counted():
    rows = written.rewardbench2(4, 0)
    of, items = read_items(Row(i + 1, row) for i, row in enumerate(rows))
    scores = [[3, 3, 1, 1], [3, 1, 2, 2], [2, 2, 2, 2], [1, 2, 2, 2]]
    got = evaluated(of, items, scores, resamples=5)
    assert (got["Math", "accuracy"].value, got["Factuality", "accuracy"].value) == ((1 / 2 + 1 / 4) / 2, 1 / 2)
    assert (got["Math", "accuracy"].ties, got["Factuality", "accuracy"].ties) == (2, 0)


@pytest.mark.parametrize("seed", range(5))
def test_styles(seed):
    rows = written.rm_bench(15, seed)
    got, scores = found(rows, seed)
    domains = {}
    for row, each in zip(rows, scores):
        chosen, rejected = each[:3], each[3:]
        wins = [[chosen[i] > rejected[j] for j in range(3)] for i in range(3)]
        hard = (wins[0][1] + wins[0][2] + wins[1][2]) / 3  # the rejected response is in the fancier style
        normal = (wins[0][0] + wins[1][1] + wins[2][2]) / 3
        easy = (wins[1][0] + wins[2][0] + wins[2][1]) / 3
        domains.setdefault(row["domain"].split("-")[0], []).append((easy, normal, hard))
    assert list(domains) == ["chat", "code", "math", "safety"]
    overall = {}
    for place, kind in enumerate(("easy", "normal", "hard")):
        values = {name: average(row[place] for row in each) for name, each in domains.items()}
        for name, value in values.items():
            assert got[name, kind].value == pytest.approx(value)
        overall[kind] = average(values.values())
        assert got["all", kind].value == pytest.approx(overall[kind])
    assert got["all", "mean"].value == pytest.approx(average(overall.values()))
    assert got["safety", "hard"].n == 6
    assert got["chat", "easy"].ties == sum(
        a == b for row, s in zip(rows, scores) if row["domain"] == "chat" for a in s[:3] for b in s[3:]
    )


@pytest.mark.parametrize("threshold", [None, 0.5, 0.2])
@pytest.mark.parametrize("seed", range(4))
def test_the_first_wrong_step(seed, threshold):
    rows, rng = written.process_bench(24, seed), random.Random(seed)
    of, items = read_items((Row(i + 1, row) for i, row in enumerate(rows)), None, "<t>", threshold)
    values = [[rng.choice([0.1, 0.3, 0.5, 0.7, 0.9, 0.9, 0.9]) for _ in row["steps"]] for row in rows]
    got = evaluated(of, items, values, resamples=20)
    f1s = []
    for name in ("gsm8k", "math"):
        error, correct = [], []
        for row, each in zip(rows, values):
            if row["id"].startswith(name):
                under = [place for place, value in enumerate(each) if value < (threshold or 0.5)]
                (correct if row["label"] == -1 else error).append((under[0] if under else -1) == row["label"])
        a, b = average(error), average(correct)
        f1s.append(2 * a * b / (a + b) if a + b else 0)
        assert got[name, "error accuracy"].value == pytest.approx(a)
        assert got[name, "correct accuracy"].value == pytest.approx(b)
        assert got[name, "F1"].value == pytest.approx(f1s[-1])
        assert (got[name, "error accuracy"].n, got[name, "correct accuracy"].n) == (len(error), len(correct))
    assert got["all", "F1"].value == pytest.approx(average(f1s))
    columns = got.leaderboard_scores("me")
    assert columns["scores"] == values and sum(columns["match"]) == sum(
        place == row["label"] for place, row in zip(columns["prediction"], rows)
    )


@pytest.mark.parametrize("make", [written.pairs, written.rewardbench, written.rewardbench2, written.rm_bench])
def test_a_layout_is_told_by_its_columns(make):
    names = {"pairs": "pairs", "rewardbench": "rewardbench", "rewardbench2": "rewardbench2", "rm_bench": "rm-bench"}
    assert layout_of(make()[0]).name == names[make.__name__]


def test_other_columns_are_refused():
    with pytest.raises(ValueError, match="got columns text"):
        layout_of({"text": "a"})


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (written.rewardbench2, {"num_correct": 2}, "num_correct 2 and 1 chosen"),
        (written.rewardbench2, {"total_completions": 5}, "total_completions 5 and 4 responses"),
        (written.rewardbench2, {"subset": "Ties"}, "expected ref:N or tied:N"),
        (written.rewardbench2, {"subset": "Ties", "id": "tied:1"}, "expected 1 of ref, several of tied"),
        (written.rewardbench2, {"chosen": ["a", "b"], "num_correct": 2, "total_completions": 5}, "has 2 right"),
        (written.rewardbench2, {"rejected": ["a", " ", "b"]}, "has an empty text at 1"),
        (written.rm_bench, {"chosen": ["a", "b"]}, "has 2 chosen and 3 rejected responses"),
        (written.rm_bench, {"domain": None}, "column 'subset' or 'domain' is missing or empty"),
        (written.rewardbench, {"subset": "mine"}, "is none of RewardBench's; layout pairs takes any"),
        (written.pairs, {"rejected": ""}, "has no rejected"),
    ],
)
def test_a_row_that_differs_is_named_by_its_line(make, change, message):
    rows = make()
    rows[1] = {**rows[0], **change}
    with pytest.raises(ValueError, match=rf"line 2: .*{message}"):
        found(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 9}, "has label 9 and"),
        ({"label": "last"}, "column 'label' holds no whole number but 'last'"),
        ({"problem": "so <t>"}, "has the tag '<t>' in its problem"),
        ({"steps": ["one", "two<t>"], "label": -1}, "has the tag '<t>' in its step 1"),
        ({"steps": "one"}, "column 'steps' holds text"),
    ],
)
def test_a_solution_that_differs_is_named_by_its_line(change, message):
    rows = written.process_bench()
    rows[1] = {**rows[1], **change}
    with pytest.raises(ValueError, match=rf"line 2: .*{message}"):
        read_items((Row(i + 1, row) for i, row in enumerate(rows)), None, "<t>")


def test_a_tag_goes_with_steps_alone():
    assert layout_of(written.process_bench()[0], None, "<t>", 0.2).threshold == 0.2
    with pytest.raises(ValueError, match="Expected step_tag with the layout processbench, the token"):
        layout_of(written.process_bench()[0])
    with pytest.raises(ValueError, match="no step_tag and threshold with rows of the layout pairs"):
        layout_of(written.pairs()[0], None, "<t>")


def test_an_id_of_ties_twice_is_refused():
    rows = written.rewardbench2(0, 2)
    rows[2]["id"] = rows[0]["id"]
    with pytest.raises(ValueError, match="once, got ref:0 again"):
        found(rows)


def test_ties_without_references_have_no_score():
    rows = [row for row in written.rewardbench2(4, 3) if not row["id"].startswith("ref")]
    got, _ = found(rows)
    assert [row.measure for row in got.rows if row.subset == "Ties"] == ["tied accuracy"]
    assert ("all", "score") not in {row[:2] for row in got.rows}


def test_scores_must_be_finite_and_as_many_as_texts():
    of, items = read_items([Row(1, written.pairs()[0])])
    with pytest.raises(ValueError, match=r"scores\[0\] to be finite"):
        evaluated(of, items, [[1.0, np.nan]])
    with pytest.raises(ValueError, match=r"scores\[0\] to be of shape"):
        evaluated(of, items, [[1.0]])
