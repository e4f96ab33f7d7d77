"""`rmfast debias`: pairs in, an intervention and reports out; `rmfast score --intervention` takes it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import models
import pytest
from planted import biased, pairs
from shell import run

import rmfast
from rmfast import debias
from rmfast.interventions import NeuronClamp


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with a planted length bias."""
    path, rm = tmp_path_factory.mktemp("model"), biased()
    rm.model.save_pretrained(path)
    rm.tokenizer.save_pretrained(path)
    return path


def write(path: Path, given: list[tuple[str, str, str]]) -> Path:
    rows = (dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in given)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fitted(folder: Path, tmp_path: Path, *args: Any) -> Any:
    given = write(tmp_path / "pairs.jsonl", pairs(30))
    more = ["--controls", 1, "--choices", "1,2"]
    return run("debias", "--model", folder, "--pairs", given, "--output", tmp_path / "out", *more, *args)


def test_intervention_reports_and_plot_are_written(folder, tmp_path):
    pytest.importorskip("matplotlib")
    test = write(tmp_path / "test.jsonl", pairs(30, seed=1))
    done = fitted(folder, tmp_path, "--attributes", "length", "--k", 1, "--test", test)
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "intervention.json", "intervention.safetensors", "report.csv", "report.png"
    }  # fmt: skip
    rm, clamp = rmfast.load(folder), NeuronClamp.load(tmp_path / "out")
    assert clamp.metadata["k"] == {"length": 1}
    found = debias.validate(rm, pairs(30), test=pairs(30, seed=1), attributes=["length"], k=1, controls=1)
    before, after = (
        debias.report(None, pairs(30, seed=1), rewards=rewards, attributes=["length"])
        for rewards in (found.before, found.after)
    )
    assert f"before: {before}\n\nafter: {after}" in done.stdout
    assert done.stdout.startswith(f"{found}\n\nthe clamp of all pairs: 2 neurons, k: length 1\n")
    with (tmp_path / "out" / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    every = [*before.rows, *after.rows, *found.rows]
    assert [float(row["value"] or "nan") for row in rows] == pytest.approx([row.value for row in every], nan_ok=True)
    assert [row["model"] for row in rows] == ["before"] * 4 + ["after"] * 4 + ["gain"] * len(found.rows)


def test_without_a_reliable_gain_no_clamp_is_written_unless_asked(folder, tmp_path):
    """Where the longer text is right, the planted taste is no fault: clamping loses pairs."""
    longer = [("q", "a" * (n + 20), "a" * n) for n in range(10, 40)]
    given = write(tmp_path / "longer.jsonl", longer)
    args = ["debias", "--model", folder, "--pairs", given, "--output", tmp_path / "out", "--attributes", "length"]
    args += ["--k", 1, "--folds", 3]
    done = run(*args)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(("worse: -", "no reliable gain: "))
    assert "no intervention is written (--anyway writes it)" in done.stdout
    files = tmp_path / "out"
    assert (files / "report.csv").exists() and not (files / "intervention.json").exists()
    done = run(*args, "--anyway")
    assert done.exit_code == 0 and "no intervention is written" not in done.stdout
    assert len(NeuronClamp.load(files)) == 2
    assert run(*args, "--overwrite").exit_code == 0  # what an earlier run wrote, this one does not bear out
    assert not (files / "intervention.json").exists() and not (files / "intervention.safetensors").exists()
    empty = run(*args[:-4], "--choices", "1", "--folds", 3, "--anyway")
    assert empty.exit_code == 0, empty.output
    assert "it is empty, give --k for another" in empty.stdout


def test_the_search_runs_from_the_command_line(folder, tmp_path):
    pytest.importorskip("optuna")
    args = ["--attributes", "length,exclamation", "--trials", 2, "--seed", 3, "--rule", "accuracy"]
    done = fitted(folder, tmp_path, *args)
    assert done.exit_code == 0, done.output
    assert "each under a clamp fitted without it (5 folds)" in done.stdout
    search = NeuronClamp.load(tmp_path / "out").metadata["search"]
    assert (search["trials"], search["seed"], search["choices"], search["rule"]) == (2, 3, [1, 2], "accuracy")


def test_columns_of_the_file_are_attributes(folder, tmp_path):
    rows = [
        {"prompt": p, "chosen": a, "rejected": b, "size_chosen": len(a), "size_rejected": len(b)}
        for p, a, b in pairs(30)
    ]
    given = tmp_path / "columns.csv"
    with given.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    args = ["debias", "--model", folder, "--pairs", given, "--output", tmp_path / "out", "--k", "size=0.01"]
    done = run(*args, "--attributes", "size", "--controls", 0)
    assert done.exit_code == 0, done.output
    assert NeuronClamp.load(tmp_path / "out").metadata["k"] == {"size": 1}


def test_score_applies_interventions(folder, tmp_path):
    given = ["--attributes", "length, exclamation", "--k", "length=1, exclamation=0", "--positions", "all"]
    assert fitted(folder, tmp_path, *given).exit_code == 0
    penalty = rmfast.interventions.LengthPenalty(0.5)
    penalty.save(tmp_path / "penalty")
    args = ["score", "--model", folder, "--input", tmp_path / "pairs.jsonl", "--output", tmp_path / "scored.jsonl"]
    done = run(*args, "--intervention", tmp_path / "out", "--intervention", tmp_path / "penalty")
    assert done.exit_code == 0, done.output
    rm = rmfast.load(folder).with_interventions(NeuronClamp.load(tmp_path / "out"), penalty)
    expected = rm.score([(prompt, chosen) for prompt, chosen, _ in pairs(30)])
    rows = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [row["reward_chosen"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-4)
    again = run(*args, "--intervention", tmp_path / "out")
    assert again.exit_code == 1
    assert "was begun with interventions" in again.stderr


def test_a_folder_with_an_intervention_is_replaced_only_when_asked(folder, tmp_path):
    args = ["--attributes", "length", "--k", 1]
    assert fitted(folder, tmp_path, *args).exit_code == 0
    done = fitted(folder, tmp_path, *args)
    assert done.exit_code == 1
    assert "--overwrite" in done.stderr
    assert fitted(folder, tmp_path, *args, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--attributes", "size"], "to be of length, paragraphs"),
        (["--attributes", "length", "--k", "many"], 'Expected --k to be "search", a number, or like length=500'),
        (["--attributes", "length", "--k", "length=1,length=2"], "Expected --k to name each attribute once"),
        (["--attributes", "length,bold", "--k", "1"], "bold is the same in all 60"),
        (["--attributes", "length", "--k", "9999"], "an int from 0 to 192"),
        (["--attributes", "length", "--choices", "1,x"], "Expected --choices to be numbers like 50,0.01, got 'x'"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(folder, tmp_path, args, message):
    done = fitted(folder, tmp_path, *args)
    assert done.exit_code == 1
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_bad_row_is_named(folder, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n{"chosen": "a"}\n')
    done = run("debias", "--model", folder, "--pairs", tmp_path / "bad.jsonl", "--output", tmp_path / "out")
    assert done.exit_code == 1
    assert "bad.jsonl, line 2: column 'rejected' is missing" in done.stderr


def test_an_intervention_of_another_model_is_refused(folder, tmp_path):
    assert fitted(folder, tmp_path, "--attributes", "length", "--k", 1).exit_code == 0
    models.decoder("llama").save_pretrained(tmp_path / "other")
    models.tokenizer().save_pretrained(tmp_path / "other")
    given = ["--input", tmp_path / "pairs.jsonl", "--output", tmp_path / "scored.jsonl"]
    done = run("score", "--model", tmp_path / "other", *given, "--intervention", tmp_path / "out")
    assert done.exit_code == 1
    assert "fingerprint" in done.stderr
