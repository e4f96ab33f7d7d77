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
    given = write(tmp_path / "pairs.jsonl", pairs(20))
    return run("debias", "--model", folder, "--pairs", given, "--output", tmp_path / "out", *args)


def test_intervention_reports_and_plot_are_written(folder, tmp_path):
    pytest.importorskip("matplotlib")
    test = write(tmp_path / "test.jsonl", pairs(20, seed=1))
    done = fitted(folder, tmp_path, "--attributes", "length", "--k", 1, "--test", test)
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "intervention.json", "intervention.safetensors", "report.csv", "report.png"
    }  # fmt: skip
    rm, clamp = rmfast.load(folder), NeuronClamp.load(tmp_path / "out")
    assert clamp.metadata["k"] == {"length": 1}
    before, after = (
        debias.report(m, pairs(20, seed=1), attributes=["length"]) for m in (rm, rm.with_interventions(clamp))
    )
    assert f"before: {before}\n\nafter: {after}" in done.stdout
    assert done.stdout.startswith("2 neurons clamped, k: length 1\nreports on test.jsonl\n")
    with (tmp_path / "out" / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value"]) for row in rows] == [row.value for row in (*before.rows, *after.rows)]
    assert [row["model"] for row in rows] == ["before"] * 4 + ["after"] * 4


def test_the_search_runs_from_the_command_line(folder, tmp_path):
    pytest.importorskip("optuna")
    done = fitted(folder, tmp_path, "--attributes", "length,exclamation", "--trials", 2, "--seed", 3)
    assert done.exit_code == 0, done.output
    assert "which flatter it" in done.stdout
    search = NeuronClamp.load(tmp_path / "out").metadata["search"]
    assert (search["trials"], search["seed"]) == (2, 3)


def test_score_applies_interventions(folder, tmp_path):
    given = ["--attributes", "length, exclamation", "--k", "length=1, exclamation=0", "--positions", "all"]
    assert fitted(folder, tmp_path, *given).exit_code == 0
    penalty = rmfast.interventions.LengthPenalty(0.5)
    penalty.save(tmp_path / "penalty")
    args = ["score", "--model", folder, "--input", tmp_path / "pairs.jsonl", "--output", tmp_path / "scored.jsonl"]
    done = run(*args, "--intervention", tmp_path / "out", "--intervention", tmp_path / "penalty")
    assert done.exit_code == 0, done.output
    rm = rmfast.load(folder).with_interventions(NeuronClamp.load(tmp_path / "out"), penalty)
    expected = rm.score([(prompt, chosen) for prompt, chosen, _ in pairs(20)])
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
        (["--attributes", "length,bold", "--k", "1"], "bold is the same in all 40"),
        (["--attributes", "length", "--k", "9999"], "an int from 0 to 192"),
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
