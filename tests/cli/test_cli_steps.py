"""`rmfast steps`: the rewards of steps in files, resumed, by tag, and what is refused."""

from __future__ import annotations

import json

import models
import pytest
import torch
from shell import files, read, run, saved

import rmfast

ROWS = [
    {"id": 0, "question": "1 + 1?", "steps": ["one", "two"]},
    {"id": 1, "question": "2 + 2?", "steps": [["four"], ["is", "five"]]},
    {"id": 2, "question": "3 + 3?", "steps": [["six"]]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"))


def test_rows_gain_the_scores_of_their_steps(folder, tmp_path):
    assert run("steps", *files(folder, tmp_path, ROWS)).exit_code == 0
    got, rm = read(tmp_path / "out.jsonl"), rmfast.load(folder, device="cpu")
    assert [row["id"] for row in got] == [0, 1, 2]
    for row in got:
        want = rm.step_scores(row["question"], row["steps"])
        several = isinstance(want, list)
        for scores, wanted in zip(row["step_scores"] if several else [row["step_scores"]], want if several else [want]):
            assert scores == pytest.approx(wanted.tolist(), abs=1e-6)
        assert isinstance(row["step_scores"][0], list) == isinstance(row["steps"][0], list)


def test_one_number_for_each_solution_and_a_run_that_goes_on(folder, tmp_path):
    args = [*files(folder, tmp_path, ROWS), "--reduce", "min", "--window", 1]
    assert run("steps", *args).exit_code == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    assert isinstance(read(tmp_path / "out.jsonl")[0]["step_scores"], float)
    (tmp_path / "out.jsonl").write_bytes(whole[:-30])
    log = tmp_path / "out.jsonl.run.jsonl"
    log.write_bytes(b"\n".join(log.read_bytes().split(b"\n")[:-2]) + b"\n")  # it had not finished
    assert run("steps", *args).exit_code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    other = run("steps", *files(folder, tmp_path, ROWS), "--reduce", "prod")
    assert other.exit_code == 1 and "reduce" in other.stderr


def test_csv_holds_steps_as_json(folder, tmp_path):
    from shell import write

    write(tmp_path / "in.csv", [{"question": "1?", "steps": json.dumps(["a", "b"])}])
    args = ["--model", folder, "--input", tmp_path / "in.csv", "--output", tmp_path / "out.jsonl"]
    assert run("steps", *args).exit_code == 0
    assert len(read(tmp_path / "out.jsonl")[0]["step_scores"]) == 2


def test_texts_with_tags_by_tokens_of_a_language_model(tmp_path):
    models.decoder(task="CausalLM").save_pretrained(tmp_path / "model")
    models.tokenizer(chat=True).save_pretrained(tmp_path / "model")
    texts = ["1 + 1 a # b #", "no tag", "c #"]
    args = files(tmp_path / "model", tmp_path, [{"text": text} for text in texts])
    plus, minus, tag = (models.tokenizer()(c, add_special_tokens=False)["input_ids"][0] for c in "+-#")
    tokens = ["--step-tag-id", tag, "--returned-token-ids", f"{plus},{minus}", "--on-error", "null"]
    done = run("steps", *args, *tokens)
    assert done.exit_code == 0, done.output
    got = read(tmp_path / "out.jsonl")
    rm = rmfast.load(tmp_path / "model", device="cpu", head=rmfast.TokenHead("+", "-"))
    for i in (0, 2):
        want = rm.step_scores([texts[i]], step_tag_id=tag)[0]
        torch.testing.assert_close(torch.tensor(got[i]["step_scores"]), want)
    assert got[1]["step_scores"] is None and "ends a step" in got[1]["error"]


@pytest.mark.parametrize(
    "row, more, word",
    [
        ({"question": "a", "steps": []}, [], "holds no steps"),
        ({"question": "a", "steps": ["b", 1]}, [], "expected a list of texts"),
        ({"question": "", "steps": ["b"]}, [], "'question' is empty"),
        ({"a": 1}, [], "question+steps or text"),
        (ROWS[0], ["--truncation", "left"], "truncation"),
        (ROWS[0], ["--returned-token-ids", "a,b"], "RIGHT,WRONG"),
    ],
)
def test_bad_rows_and_options(folder, tmp_path, row, more, word):
    done = run("steps", *files(folder, tmp_path, [row]), *more)
    assert done.exit_code == 1 and word in done.stderr
