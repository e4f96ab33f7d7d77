"""`rmfast evaluate`: what is printed and written, resumed runs, bad rows, another model beside the first."""

from __future__ import annotations

import csv
import json

import models
import pytest
import written
from shell import read, run, saved, write

import rmfast
from rmfast import evaluation
from rmfast.texts import output as outputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"))


def evaluate(folder, tmp_path, rows, *more, name="data.jsonl"):
    (tmp_path / "in").mkdir(exist_ok=True)
    write(tmp_path / "in" / name, rows)
    given = ["--data", tmp_path / "in" / name, "--output", tmp_path / "out"]
    return run("evaluate", "--model", folder, *given, *more)


@pytest.mark.parametrize("make", [written.pairs, written.rewardbench, written.rewardbench2, written.rm_bench])
def test_what_is_written_is_what_the_function_finds(folder, tmp_path, make):
    pytest.importorskip("matplotlib")
    rows = make()
    done = evaluate(folder, tmp_path, rows, "--resamples", 50, "--seed", 3)
    assert done.exit_code == 0, done.output
    expected = evaluation.evaluate(rmfast.load(folder), rows, resamples=50, seed=3)
    assert str(expected) in done.stdout
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "results.json", "scores.json", "table.csv", "table.png", "rows.jsonl", "rows.jsonl.run.jsonl"
    }  # fmt: skip
    with (out / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["value"]) for row in table] == pytest.approx([row.value for row in expected.rows])
    assert json.loads((out / "results.json").read_text()) == pytest.approx(expected.leaderboard(str(folder)))
    scores = json.loads((out / "scores.json").read_text())
    assert scores.keys() == expected.leaderboard_scores("").keys()
    assert [row["scores"] for row in read(out / "rows.jsonl")] == [
        pytest.approx(each.tolist(), abs=1e-5) for each in expected.scores
    ]


@pytest.mark.parametrize("name", ["data.json", "data.csv", "data.parquet", "data.jsonl.gz"])
def test_every_kind_of_file_gives_the_same_table(folder, tmp_path, name):
    rows = written.pairs(12)
    first = evaluate(folder, tmp_path, rows)
    if name == "data.json":
        (tmp_path / name).write_text(json.dumps(rows))
    else:
        write(tmp_path / name, rows)
    done = run("evaluate", "--model", folder, "--data", tmp_path / name, "--output", tmp_path / "other")
    assert done.exit_code == 0, done.output
    assert done.stdout == first.stdout


def test_lists_in_csv_are_json(folder, tmp_path):
    rows = written.rewardbench2(6, 2)
    first = evaluate(folder, tmp_path, rows)
    cells = [{key: json.dumps(cell) if isinstance(cell, list) else cell for key, cell in row.items()} for row in rows]
    write(tmp_path / "data.csv", cells)
    done = run("evaluate", "--model", folder, "--data", tmp_path / "data.csv", "--output", tmp_path / "other")
    assert done.exit_code == 0, done.output
    assert done.stdout == first.stdout


def test_a_killed_run_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    rows, append = written.rewardbench2(), outputs.Output.append
    calls = []

    def killed(self, lines, skipped):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(lines))
        append(self, lines, skipped)

    monkeypatch.setattr(outputs.Output, "append", killed)
    stopped = evaluate(folder, tmp_path, rows, "--window", 5)
    assert stopped.exit_code == 130
    assert calls == [5, 5] and not (tmp_path / "out" / "table.csv").exists()
    monkeypatch.setattr(outputs.Output, "append", append)
    done = evaluate(folder, tmp_path, rows, "--window", 5)
    assert done.exit_code == 0, done.output
    assert "rmfast: 12 rows, " in done.stderr  # of 22
    whole = tmp_path / "whole"
    whole.mkdir()
    uninterrupted = evaluate(folder, whole, rows, "--window", 5)
    assert uninterrupted.stdout == done.stdout
    assert (whole / "out" / "rows.jsonl").read_bytes() == (tmp_path / "out" / "rows.jsonl").read_bytes()


def test_a_complete_run_prints_its_table_again_without_a_model(folder, tmp_path, monkeypatch):
    first = evaluate(folder, tmp_path, written.pairs())
    monkeypatch.setattr(rmfast, "load", None)
    again = evaluate(folder, tmp_path, written.pairs())
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout and "is complete" in again.stderr


def test_another_file_layout_or_model_is_no_resumed_run(folder, tmp_path):
    rows = written.rewardbench()
    assert evaluate(folder, tmp_path, rows).exit_code == 0
    assert "was begun with layout_name" in evaluate(folder, tmp_path, rows, "--layout", "pairs").stderr
    assert "was begun with input_sha256" in evaluate(folder, tmp_path, rows[:-1]).stderr
    done = evaluate(folder, tmp_path, rows, "--layout", "pairs", "--overwrite")
    assert done.exit_code == 0, done.output
    assert "mean of subsets" in done.stdout


def test_another_model_beside_the_first(folder, tmp_path):
    rows = written.rewardbench(30)
    other = saved(tmp_path / "other", seed=5)
    done = evaluate(folder, tmp_path, rows, "--against", other)
    assert done.exit_code == 0, done.output
    first, second = (evaluation.evaluate(rmfast.load(each), rows) for each in (folder, other))
    changes = first.minus(second)
    assert f"{first}\n\nagainst {other}\n{changes}" in done.stdout
    with (tmp_path / "out" / "against.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["difference"]) for row in table] == pytest.approx([row.difference for row in changes.rows])


def test_an_intervention_beside_the_model_without(folder, tmp_path):
    rows = written.pairs(20)
    penalty = rmfast.LengthPenalty(0.5)
    penalty.save(tmp_path / "penalty")
    done = evaluate(folder, tmp_path, rows, "--against", tmp_path / "penalty")
    assert done.exit_code == 0, done.output
    rm = rmfast.load(folder)
    first, second = (evaluation.evaluate(each, rows) for each in (rm, rm.with_interventions(penalty)))
    assert str(first.minus(second)) in done.stdout
    assert first["all", "accuracy"].value != second["all", "accuracy"].value
    (tmp_path / "under").mkdir()
    under = evaluate(folder, tmp_path / "under", rows, "--intervention", tmp_path / "penalty")
    assert str(second) in under.stdout


def test_bad_rows_stop_the_run_or_are_left_out(folder, tmp_path):
    rows = written.rm_bench(10)
    rows[3]["chosen"] = rows[3]["chosen"][:2]
    rows[7]["prompt"] = "x" * 1000
    stopped = evaluate(folder, tmp_path, rows)
    assert stopped.exit_code == 1
    assert "line 4: has 2 chosen and 3 rejected responses" in stopped.stderr
    done = evaluate(folder, tmp_path, rows, "--on-error", "null")
    assert done.exit_code == 0, done.output
    assert "rm-bench: 8 rows, 2 rows left out" in done.stdout
    expected = evaluation.evaluate(rmfast.load(folder), [row for i, row in enumerate(rows) if i not in (3, 7)])
    assert str(expected).splitlines()[1:] == done.stdout.splitlines()[1 : 1 + len(expected.rows) + 1]


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"text": "a"}], [], "got columns text"),
        ([{"chosen": "a", "rejected": "b", "scores": 1}], [], "has a column 'scores' of its own"),
        ([{"chosen": "a", "rejected": "b"}], ["--confidence", "2"], "--confidence to be in (0, 1)"),
        ([], [], "at least one row"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(folder, tmp_path, rows, more, message):
    done = evaluate(folder, tmp_path, rows, *more)
    assert done.exit_code == 1
    assert message in done.stderr.splitlines()[-1]


def test_no_file_that_is_read_is_written(folder, tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / "data.jsonl", written.pairs())
    done = run("evaluate", "--model", folder, "--data", tmp_path / "out" / "data.jsonl", "--output", tmp_path / "out")
    assert done.exit_code == 1
    assert "other files to be read than written" in done.stderr


def test_a_model_of_several_rewards_is_refused(tmp_path):
    models.decoder(labels=3).save_pretrained(tmp_path / "three")
    models.tokenizer(chat=True).save_pretrained(tmp_path / "three")
    done = evaluate(tmp_path / "three", tmp_path, written.pairs())
    assert done.exit_code == 1
    assert "a model of one reward, got one of 3" in done.stderr


def test_parity_of_a_sample_is_printed_and_written(folder, tmp_path):
    done = evaluate(folder, tmp_path, written.rewardbench2(), "--parity", 9)
    assert done.exit_code == 0, done.output
    assert "parity: largest difference " in done.stdout
    with (tmp_path / "out" / "parity.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["n"] for row in table] == ["9"] * 5
    assert max(float(row["largest"]) for row in table) < 2e-5
    everything = evaluate(folder, tmp_path, written.rewardbench2(), "--parity", 10**6)
    assert everything.exit_code == 0, everything.output
    assert " 105\n" in everything.stdout  # all texts that there are


def test_steps_of_solutions(tmp_path):
    rows = written.process_bench()
    models.decoder(max_position_embeddings=512, labels=2, task="TokenClassification").save_pretrained(
        tmp_path / "model"
    )
    written.step_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data.json").write_text(json.dumps(rows))
    given = ["evaluate", "--model", tmp_path / "model", "--data", tmp_path / "data.json", "--output", tmp_path / "out"]
    assert "Expected step_tag" in run(*given).stderr
    assert "Expected no --parity" in run(*given, "--step-tag", "<t>", "--parity", 3).stderr
    done = run(*given, "--step-tag", "<t>")
    assert done.exit_code == 0, done.output
    expected = evaluation.evaluate(rmfast.load(tmp_path / "model"), rows, step_tag="<t>")
    assert str(expected) in done.stdout
    assert "was begun with step_tag" in run(*given, "--step-tag", "+").stderr
    # Another threshold is another table of the same scores.
    lower = run(*given, "--step-tag", "<t>", "--threshold", 0.1)
    again = evaluation.evaluate(rmfast.load(tmp_path / "model"), rows, step_tag="<t>", threshold=0.1)
    assert str(again) in lower.stdout and "is complete" in lower.stderr


def test_another_column_tells_figures_apart(tmp_path):
    models.decoder().save_pretrained(tmp_path / "model")
    models.tokenizer(chat=True).save_pretrained(tmp_path / "model")
    rows = [{**row, "kind": f"kind {i % 2}"} for i, row in enumerate(written.pairs(8))]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["evaluate", "--model", tmp_path / "model", "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out"]
    done = run(*given, "--subset-column", "kind")
    assert done.exit_code == 0, done.output
    rm = rmfast.load(tmp_path / "model")
    assert str(evaluation.evaluate(rm, rows, subset_column="kind")) in done.stdout
    again = run(*given)  # another table of the same scores
    assert str(evaluation.evaluate(rm, rows)) in again.stdout and "is complete" in again.stderr
    missing = run(*given, "--overwrite", "--subset-column", "none")
    assert "column 'none' holds no text or whole number" in missing.stderr and missing.exit_code == 1
