"""`--on-error`: which rows are bad, how they are reported, and what becomes of them."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
from shell import files, read, run, saved


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with one label and a chat template."""
    return saved(tmp_path_factory.mktemp("model"))


ROWS = [
    {"text": "fine"},
    {"text": ""},
    {"text": 7},
    {"other": "x"},
    "{not json",
    '"a string"',
    {"text": "y" * 200},
    '{"text": "\\ud800"}',
    "",
    {"text": "fine too"},
]
REASONS = {2: "is empty", 3: "int", 4: "missing", 5: "not JSON", 6: "not a JSON object", 7: "201 tokens", 8: "Unicode"}


def test_skip_leaves_bad_rows_out_and_reports_their_lines(folder, tmp_path):
    done = run("score", *files(folder, tmp_path, ROWS), "--on-error", "skip")
    assert done.exit_code == 0, done.output
    assert [row["text"] for row in read(tmp_path / "out.jsonl")] == ["fine", "fine too"]
    reported = [line for line in done.stderr.splitlines() if line.startswith("in.jsonl, line ")]
    assert len(reported) == len(REASONS)
    for text, (line, reason) in zip(reported, REASONS.items(), strict=True):
        assert text.startswith(f"in.jsonl, line {line}: ")
        assert reason in text
    assert "7 bad rows" in done.stderr


def test_null_writes_bad_rows_with_the_reason(folder, tmp_path):
    done = run("score", *files(folder, tmp_path, ROWS), "--on-error", "null", "--stats")
    assert done.exit_code == 0, done.output
    rows = read(tmp_path / "out.jsonl")
    assert len(rows) == 9
    assert [row["reward"] is None for row in rows] == [False] + [True] * 7 + [False]
    for row, reason in zip(rows[1:-1], REASONS.values(), strict=True):
        assert reason in row["error"]
    assert rows[2]["text"] == 7
    assert "rows without a reward 7" in done.stdout


def test_stop_keeps_what_came_before_and_can_go_on(folder, tmp_path):
    args = files(folder, tmp_path, ROWS)
    done = run("score", *args)
    assert done.exit_code == 1
    assert "line 2: column 'text' is empty" in done.stderr
    assert [row["text"] for row in read(tmp_path / "out.jsonl")] == ["fine"]
    assert run("score", *args, "--on-error", "skip").exit_code == 0
    assert [row["text"] for row in read(tmp_path / "out.jsonl")] == ["fine", "fine too"]


def test_a_text_without_the_pooling_token_is_a_bad_row(folder, tmp_path):
    args = files(folder, tmp_path, [{"text": "abc"}, {"text": "xyz"}, {"text": "b"}])
    token = models.tokenizer().convert_tokens_to_ids("b")
    assert run("score", *args, "--pooling", token, "--on-error", "skip").exit_code == 0
    assert [row["text"] for row in read(tmp_path / "out.jsonl")] == ["abc", "b"]


def test_a_reward_that_is_not_finite_is_a_bad_row(tmp_path):
    model, tokenizer = models.decoder(), models.tokenizer()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("Z")] = torch.nan
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    args = files(tmp_path / "model", tmp_path, [{"text": "abc"}, {"text": "Z"}, {"text": "abd"}])
    done = run("score", *args, "--on-error", "null")
    assert [row["reward"] is None for row in read(tmp_path / "out.jsonl")] == [False, True, False]
    assert "line 2: its reward is not finite" in done.stderr


def test_csv_rows_are_reported_by_their_first_line(folder, tmp_path):
    (tmp_path / "in.csv").write_bytes(b'text,id\n"two\nlines",1\nonly one field\n,2\n\xff\xfe,3\nfine,4\n')
    args = ["--model", folder, "--input", tmp_path / "in.csv", "--output", tmp_path / "out.jsonl"]
    done = run("score", *args, "--on-error", "skip")
    assert done.exit_code == 0, done.output
    lines = [line.split(":")[0] for line in done.stderr.splitlines() if line.startswith("in.csv")]
    assert lines == [f"in.csv, line {n}" for n in (4, 5, 6)]
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == ["1", "4"]


def test_a_later_row_with_the_new_column_is_a_bad_row(folder, tmp_path):
    args = files(folder, tmp_path, [{"text": "a"}, {"text": "b", "reward": 1}])
    done = run("score", *args)
    assert done.exit_code == 1
    assert "line 2: has a column 'reward' of its own" in done.stderr
    assert [row["text"] for row in read(tmp_path / "out.jsonl")] == ["a"]
