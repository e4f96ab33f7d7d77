"""From the cells of a row to the ids that are scored: conversations in CSV, template kwargs and tools, rows cut."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import models
import numpy as np
import pytest
from shell import files, read, run, saved, write

import rmfast

STYLED = "{{ style }}{% for tool in tools or [] %}{{ tool.name }}{% endfor %}" + models.TEMPLATE
PROMPT = [{"role": "user", "content": 'What\'s "up"?'}]
CHOSEN, REJECTED = ([{"role": "assistant", "content": text}] for text in ("so", "it isn't"))
TOOLS = [{"name": "add"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model whose chat template writes a style and the names of tools."""
    made = saved(tmp_path_factory.mktemp("model"))
    tokenizer = models.tokenizer(chat=True)
    tokenizer.chat_template = STYLED
    tokenizer.save_pretrained(made)
    return made


def of_csv(folder, tmp_path, rows):
    write(tmp_path / "in.csv", rows)
    return ["--model", folder, "--input", tmp_path / "in.csv", "--output", tmp_path / "out.jsonl"]


def token_ids(tmp_path):
    return [
        [value for name, value in row.items() if name.startswith("token_ids")] for row in read(tmp_path / "out.jsonl")
    ]


def encoded(folder, inputs, **kw):
    return [item.ids.tolist() for item in rmfast.load(folder).encode(inputs, **kw)]


@pytest.mark.parametrize(
    "form", [json.dumps, repr, lambda turns: json.dumps(turns, indent=1)], ids=["JSON", "repr", "lines"]
)
def test_a_conversation_written_out_in_csv_is_one(folder, tmp_path, form):
    row = {"prompt": form(PROMPT), "chosen": form(CHOSEN), "rejected": form(REJECTED)}
    done = run("values", *of_csv(folder, tmp_path, [row]), "--tokens")
    assert done.exit_code == 0, done.output
    assert token_ids(tmp_path) == [encoded(folder, [PROMPT + CHOSEN, PROMPT + REJECTED])]
    assert read(tmp_path / "out.jsonl")[0]["prompt"] == row["prompt"]


@pytest.mark.parametrize("text", ['[{"name": "add"}]', "[1, 2]", "[{", "[sic] so", '{"role": "user", "content": "a"}'])
def test_other_text_in_csv_stays_text(folder, tmp_path, text):
    done = run("values", *of_csv(folder, tmp_path, [{"prompt": "a", "response": text}]), "--tokens")
    assert done.exit_code == 0, done.output
    assert token_ids(tmp_path) == [encoded(folder, [("a", text)])]


@pytest.mark.parametrize(
    "cell, reason",
    [
        (str(np.array(PROMPT + CHOSEN)), "begins like a list of messages, but neither JSON nor Python reads it"),
        (json.dumps(PROMPT)[:-9], "begins like a list of messages"),
        (
            json.dumps([{"from": "human", "value": "a"}]),
            "its message 0 has no role: expected role and content, got from, value",
        ),
    ],
)
def test_a_conversation_in_csv_that_cannot_be_read_is_a_bad_row(folder, tmp_path, cell, reason):
    done = run("score", *of_csv(folder, tmp_path, [{"chosen": cell, "rejected": "fine"}]), "--on-error", "null")
    assert reason in read(tmp_path / "out.jsonl")[0]["error"], done.output


def test_text_that_is_a_conversation_is_a_bad_row(folder, tmp_path):
    done = run("score", *of_csv(folder, tmp_path, [{"text": json.dumps(PROMPT)}]))
    assert done.exit_code == 1 and "column 'text' holds messages" in done.stderr


def test_a_json_string_in_jsonl_is_the_text_that_it_says(folder, tmp_path):
    row = {"prompt": "a", "response": json.dumps(CHOSEN)}
    assert run("values", *files(folder, tmp_path, [row]), "--tokens").exit_code == 0
    assert token_ids(tmp_path) == [encoded(folder, [("a", row["response"])])]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_tools_and_template_kwargs_of_a_row_reach_the_template(folder, tmp_path, suffix):
    rows = [
        {
            "messages": json.dumps(PROMPT + CHOSEN),
            "tools": json.dumps(TOOLS),
            "chat_template_kwargs": '{"style": "own"}',
        },
        {"messages": json.dumps(PROMPT + CHOSEN), "tools": None, "chat_template_kwargs": None},
    ]
    write(tmp_path / f"in.{suffix}", rows)
    args = ["--model", folder, "--input", tmp_path / f"in.{suffix}", "--output", tmp_path / "out.jsonl", "--tokens"]
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS * 2) + "\n")
    done = run("values", *args, "--tools", f"@{tmp_path}/tools.json", "--chat-template-kwargs", '{"style": "call"}')
    assert done.exit_code == 0, done.output
    (own,) = encoded(folder, [PROMPT + CHOSEN], tools=TOOLS, chat_template_kwargs={"style": "own"})
    (call,) = encoded(folder, [PROMPT + CHOSEN], tools=TOOLS * 2, chat_template_kwargs={"style": "call"})
    assert token_ids(tmp_path) == [[own], [call]]
    other = run("values", *args, "--tools", f"@{tmp_path}/tools.json", "--chat-template-kwargs", '{"style": "new"}')
    assert other.exit_code == 1 and "was begun with chat_template_kwargs {'style': 'call'}" in other.stderr


@pytest.mark.parametrize("option", ["--tools", "--chat-template-kwargs"])
def test_wrong_json_of_an_option_is_named(folder, tmp_path, option):
    done = run("score", *files(folder, tmp_path, [{"text": "a"}]), option, "7")
    assert done.exit_code == 1 and f"Expected {option[2:].replace('-', '_')} to be" in done.stderr


def test_tools_that_are_none_are_a_bad_row(folder, tmp_path):
    rows = [{"messages": PROMPT, "tools": "a hammer"}, {"messages": PROMPT}]
    done = run("score", *files(folder, tmp_path, rows), "--on-error", "skip")
    assert "line 1: Expected tools to be JSON where it is a string, got 'a hammer'" in done.stderr
    assert len(read(tmp_path / "out.jsonl")) == 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_that_were_cut_are_marked(folder, tmp_path, side):
    rows = [{"prompt": "a", "chosen": "so", "rejected": "x" * 20}, {"prompt": "a", "chosen": "so", "rejected": "so"}]
    done = run("score", *files(folder, tmp_path, rows), "--max-length", 10, "--truncation", side)
    assert done.exit_code == 0 and "1 texts cut" in done.stderr
    out = read(tmp_path / "out.jsonl")
    assert [(row["truncated_chosen"], row["truncated_rejected"]) for row in out] == [(False, True), (False, False)]


def test_without_truncation_there_is_no_mark(folder, tmp_path):
    assert run("score", *files(folder, tmp_path, [{"text": "a"}])).exit_code == 0
    assert list(read(tmp_path / "out.jsonl")[0]) == ["text", "reward"]


def test_a_row_with_a_wrong_field_count_keeps_its_fields(folder, tmp_path):
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text", "note"], [1, "fine", "x"], [2, "short"], [3, "long", "y", "z", "w"]])
    args = ["--model", folder, "--input", tmp_path / "in.csv", "--output", tmp_path / "out.jsonl"]
    assert run("score", *args, "--on-error", "null").exit_code == 0
    rows = read(tmp_path / "out.jsonl")
    assert [[row[name] for name in ("id", "text", "note")] for row in rows] == [
        ["1", "fine", "x"], ["2", "short", None], ["3", "long", "y"],
    ]  # fmt: skip
    assert rows[1]["error"] == "has 2 fields where the header has 3"
    assert rows[2]["error"] == "has 5 fields where the header has 3, beyond it ['z', 'w']"
    assert [row["reward"] is None for row in rows] == [False, True, True]


def test_num_labels_reach_the_loader(tmp_path):
    folder = saved(tmp_path / "model", labels=3)
    args = files(folder, tmp_path, [{"text": "a"}])
    assert run("score", *args, "--num-labels", 3).exit_code == 0
    assert len(read(tmp_path / "out.jsonl")[0]["reward"]) == 3
    assert run("score", *args, "--num-labels", 2, "--overwrite").exit_code == 1


def test_a_sweep_takes_template_kwargs(folder, tmp_path):
    (tmp_path / "kwargs.json").write_text('{"style": "terse"}')
    args = ["--prompt", "a", "--clean", "so", "--corrupted", "no", "--output", tmp_path / "sweep"]
    done = run("sweep", "--model", folder, *args, "--chat-template-kwargs", f"@{tmp_path}/kwargs.json")
    assert done.exit_code == 0, done.output
    swept = rmfast.PatchSweep.load(tmp_path / "sweep")
    assert "".join(swept.tokens).startswith("terse<s>")
