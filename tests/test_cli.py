"""The command line: files in, JSONL out, bad rows, resuming, statistics, exit codes."""

from __future__ import annotations

import csv
import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import rmfast
from rmfast.cli import app
from rmfast.tables import Output, dump_line, read_rows

TEXTS = ["short", "a somewhat longer text", "x", "Größe, 大きさ", "the end\nof it"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with one label and a chat template."""
    path = tmp_path_factory.mktemp("model")
    models.decoder().save_pretrained(path)
    models.tokenizer(chat=True).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def rm(folder: Path) -> rmfast.RewardModel:
    return rmfast.load(folder)


def run(*args: Any) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def files(folder: Path, tmp_path: Path, rows: list[Any]) -> list[Any]:
    """The common arguments, for a JSONL input of these rows (a string is a raw line)."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "in.jsonl").write_text("".join(line + "\n" for line in lines))
    return ["--model", folder, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".csv", ".parquet"])
def test_score_adds_a_reward_to_every_row_in_order(folder, rm, tmp_path, suffix):
    source = tmp_path / f"in{suffix}"
    write(source, [{"id": f"n{i}", "text": text} for i, text in enumerate(TEXTS)])
    done = run("score", "--model", folder, "--input", source, "--output", tmp_path / "out.jsonl")
    assert done.exit_code == 0, done.output
    rows = read(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == [f"n{i}" for i in range(len(TEXTS))]
    assert [row["text"] for row in rows] == TEXTS
    assert [row["reward"] for row in rows] == pytest.approx(rm.score(TEXTS).tolist(), abs=1e-6)


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}]
BAD = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}]


@pytest.mark.parametrize(
    ("row", "inputs"),
    [
        ({"prompt": "q", "response": "good"}, {"reward": ("q", "good")}),
        ({"messages": MESSAGES}, {"reward": MESSAGES}),
        (
            {"prompt": "q", "chosen": "good", "rejected": "bad"},
            {"reward_chosen": ("q", "good"), "reward_rejected": ("q", "bad")},
        ),
        ({"chosen": "good", "rejected": "bad"}, {"reward_chosen": "good", "reward_rejected": "bad"}),
        ({"prompt": "q", "chosen": MESSAGES, "rejected": BAD}, {"reward_chosen": MESSAGES, "reward_rejected": BAD}),
        (
            {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": BAD[1:]},
            {"reward_chosen": MESSAGES, "reward_rejected": BAD},
        ),
        (
            {"prompt": MESSAGES[:1], "chosen": MESSAGES, "rejected": BAD},
            {"reward_chosen": MESSAGES, "reward_rejected": BAD},
        ),
        (
            {"prompt": "q", "chosen": MESSAGES[1:], "rejected": BAD[1:]},
            {"reward_chosen": MESSAGES, "reward_rejected": BAD},
        ),
    ],
)
def test_columns_tell_what_a_row_holds(folder, rm, tmp_path, row, inputs):
    done = run("score", *files(folder, tmp_path, [row]))
    assert done.exit_code == 0, done.output
    (out,) = read(tmp_path / "out.jsonl")
    rewards = {name: pytest.approx(rm.score([item])[0].item(), abs=1e-6) for name, item in inputs.items()}
    assert out == row | rewards


def test_columns_may_have_any_name(folder, rm, tmp_path):
    args = files(folder, tmp_path, [{"q": "a", "yes": "b", "no": "c", "reward_chosen": "mine"}])
    names = ["--prompt-column", "q", "--chosen-column", "yes", "--rejected-column", "no", "--output-column", "r"]
    assert run("score", *args, *names).exit_code == 0
    (row,) = read(tmp_path / "out.jsonl")
    assert row["r_chosen"] == pytest.approx(rm.score([("a", "b")])[0].item(), abs=1e-6)


def test_messages_in_csv_are_json(folder, rm, tmp_path):
    write(tmp_path / "in.csv", [{"messages": json.dumps(MESSAGES)}])
    done = run("score", "--model", folder, "--input", tmp_path / "in.csv", "--output", tmp_path / "out.jsonl")
    assert done.exit_code == 0, done.output
    assert read(tmp_path / "out.jsonl")[0]["reward"] == pytest.approx(rm.score([MESSAGES])[0].item(), abs=1e-6)


def test_several_labels_are_a_list(tmp_path):
    models.decoder(labels=3).save_pretrained(tmp_path / "model")
    models.tokenizer().save_pretrained(tmp_path / "model")
    done = run("score", *files(tmp_path / "model", tmp_path, [{"chosen": "a", "rejected": "b"}]), "--stats")
    assert done.exit_code == 0, done.output
    (row,) = read(tmp_path / "out.jsonl")
    assert row["reward_chosen"] == pytest.approx(rmfast.load(tmp_path / "model").score(["a"])[0].tolist(), abs=1e-6)


def test_values_are_the_rewards_of_every_token(folder, rm, tmp_path):
    done = run("values", *files(folder, tmp_path, [{"text": text} for text in TEXTS]), "--tokens")
    assert done.exit_code == 0, done.output
    for row, expected in zip(read(tmp_path / "out.jsonl"), rm.token_values(TEXTS), strict=True):
        assert row["values"] == pytest.approx(expected.tolist(), abs=1e-6)
        assert row["token_ids"] == rm.encode([row["text"]])[0].ids.tolist()
        assert row["tokens"] == rm.tokenizer.convert_ids_to_tokens(row["token_ids"])


def test_rewards_keep_every_bit_of_fp32(folder, rm, tmp_path):
    run("score", *files(folder, tmp_path, [{"text": TEXTS[0]}]))
    written = torch.tensor(read(tmp_path / "out.jsonl")[0]["reward"], dtype=torch.float32)
    assert torch.equal(written, rm.score([TEXTS[0]])[0])


def test_no_more_than_a_window_is_held(folder, tmp_path, monkeypatch):
    seen = []
    score = rmfast.RewardModel.score
    monkeypatch.setattr(rmfast.RewardModel, "score", lambda *a, **kw: (seen.append(len(a[1])), score(*a, **kw))[1])
    assert run("score", *files(folder, tmp_path, [{"text": "t"}] * 10), "--window", 4).exit_code == 0
    assert seen == [4, 4, 2]


# Statistics


def test_stats_count_a_tie_as_half(folder, rm, tmp_path):
    high, low = sorted(["good", "bad"], key=lambda text: -rm.score([text])[0].item())
    pairs = [(high, low), (high, low), (low, high), (high, high)]
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    done = run("score", *files(folder, tmp_path, rows), "--stats")
    assert "pairs 4  accuracy 0.6250  ties 1" in done.stdout
    rewards = rm.score([chosen for chosen, _ in pairs]).double().numpy()
    assert f"reward_chosen  n 4  mean {rewards.mean():.4f}  std {np.std(rewards):.4f}" in done.stdout


# Bad rows

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


def test_skip_leaves_bad_rows_out_and_reports_their_lines(folder, rm, tmp_path):
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


def test_a_long_text_is_cut_when_asked(folder, rm, tmp_path):
    args = files(folder, tmp_path, [{"text": "y" * 200}])
    assert run("score", *args, "--truncation", "left", "--max-length", 20).exit_code == 0
    expected = rm.score(["y" * 200], max_length=20, truncation="left")[0].item()
    assert read(tmp_path / "out.jsonl")[0]["reward"] == pytest.approx(expected, abs=1e-6)


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


def test_json_nested_too_deeply_is_a_bad_row(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n" + '{"text": "fine"}\n')
    deep, fine = read_rows(tmp_path / "in.jsonl")
    assert (deep.line, fine.line, fine.error) == (1, 2, None)
    assert "recursion" in deep.error


def test_a_csv_quote_that_is_never_closed_is_a_bad_row(tmp_path):
    (tmp_path / "in.csv").write_text('text,id\nfine,1\n"a"b,2\nfine,3\n"open,4\nlost,5\n')
    rows = list(read_rows(tmp_path / "in.csv"))
    assert [(row.line, row.data.get("id")) for row in rows] == [(2, "1"), (3, None), (4, "3"), (5, None)]
    assert rows[1].error.startswith("is not CSV: ")
    assert rows[3].error.startswith("is not CSV: ")


def test_non_finite_numbers_of_the_input_are_written_as_null_at_any_depth():
    row = {"a": float("nan"), "b": [1.5, {"c": float("-inf"), "d": "NaN"}], "e": "Größe"}
    assert dump_line(row).decode() == '{"a": null, "b": [1.5, {"c": null, "d": "NaN"}], "e": "Größe"}\n'


def test_a_later_row_with_the_new_column_is_a_bad_row(folder, tmp_path):
    args = files(folder, tmp_path, [{"text": "a"}, {"text": "b", "reward": 1}])
    done = run("score", *args)
    assert done.exit_code == 1
    assert "line 2: has a column 'reward' of its own" in done.stderr
    assert [row["text"] for row in read(tmp_path / "out.jsonl")] == ["a"]


# Resuming


def many(count: int) -> list[dict[str, Any]]:
    return [{"id": i, "text": "" if i % 7 == 3 else f"{'word ' * (i % 11)}{i}"} for i in range(count)]


def test_a_killed_run_goes_on_as_if_never_interrupted(folder, tmp_path):
    options = ["--window", 4, "--on-error", "skip"]
    (tmp_path / "whole").mkdir()
    assert run("score", *files(folder, tmp_path / "whole", many(600)), *options).exit_code == 0
    args, out = files(folder, tmp_path, many(600)), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "rmfast", "score", *map(str, [*args, *options])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out.exists() and out.stat().st_size > 2000):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = (tmp_path / "whole" / "out.jsonl").read_bytes()
    assert 0 < out.stat().st_size < len(whole)
    assert run("score", *args, *options).exit_code == 0
    assert out.read_bytes() == whole


@pytest.mark.parametrize("cut", [1, 30, 700])
def test_a_torn_last_line_is_cut_and_every_row_is_there_once(folder, tmp_path, cut):
    args, out = files(folder, tmp_path, many(100)), tmp_path / "out.jsonl"
    options = ["--window", 16, "--on-error", "skip"]
    assert run("score", *args, *options).exit_code == 0
    whole, log = read(out), tmp_path / "out.jsonl.run.jsonl"
    out.write_bytes(out.read_bytes()[:-cut])
    log.write_bytes(log.read_bytes()[:-5])  # the end of the log was being written too
    done = run("score", *args, *options)
    assert done.exit_code == 0, done.output
    again = read(out)
    assert [row["id"] for row in again] == [row["id"] for row in whole]
    assert [row["reward"] for row in again] == pytest.approx([row["reward"] for row in whole], abs=1e-5)


def test_skipped_rows_logged_ahead_of_lost_lines_are_not_confused(tmp_path):
    output = Output(tmp_path / "o", {"run": 1})
    output.begin()
    output.append([b"0\n", b"2\n", b"3\n", b"6\n"], [(n, _row(n)) for n in (1, 4, 5)])
    (tmp_path / "o").write_bytes(b"0\n2\n")
    assert Output(tmp_path / "o", {"run": 1}).next_row == 3
    (tmp_path / "o").write_bytes(b"")
    assert Output(tmp_path / "o", {"run": 1}).next_row == 0
    (tmp_path / "o").write_bytes(b"0\n2\n3\n6\n7\n")
    assert Output(tmp_path / "o", {"run": 1}).next_row == 8


def test_a_skipped_row_whose_lines_were_lost_may_get_a_line(tmp_path):
    output = Output(tmp_path / "o", {"run": 1})
    output.begin()
    output.append([b"0\n", b"1\n"], [(2, _row(2))])
    (tmp_path / "o").write_bytes(b"0\n")  # killed between the log and the lines
    again = Output(tmp_path / "o", {"run": 1})
    again.begin()
    again.append([b"1\n", b"2\n"], [])  # with --on-error null
    assert again.next_row == Output(tmp_path / "o", {"run": 1}).next_row == 3


def _row(line: int) -> Any:
    from rmfast.tables import Row

    return Row(line, {}, "bad")


def test_an_interrupted_run_exits_130_and_scores_nothing_twice(folder, tmp_path, monkeypatch):
    scored: list[int] = []
    score = rmfast.RewardModel.score

    def counting(self: Any, inputs: Any, **kw: Any) -> Any:
        if sum(scored) == 8 and not (tmp_path / "interrupted").exists():
            (tmp_path / "interrupted").touch()
            raise KeyboardInterrupt
        scored.append(len(inputs))
        return score(self, inputs, **kw)

    monkeypatch.setattr(rmfast.RewardModel, "score", counting)
    args = [*files(folder, tmp_path, [{"id": i, "text": f"t{i}"} for i in range(20)]), "--window", 4]
    done = run("score", *args)
    assert done.exit_code == 130
    assert "the same command goes on" in done.stderr
    assert run("score", *args).exit_code == 0
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == list(range(20))
    assert scored == [4] * 5


def test_a_finished_run_loads_no_model_again(folder, tmp_path, monkeypatch):
    args = files(folder, tmp_path, [{"chosen": "good", "rejected": "bad"}])
    first = run("score", *args, "--stats")
    monkeypatch.setattr(rmfast, "load", lambda *a, **kw: pytest.fail("the model was loaded"), raising=False)
    again = run("score", *args, "--stats")
    assert again.exit_code == 0
    assert again.stdout == first.stdout


@pytest.mark.parametrize(
    ("options", "word"), [(["--truncation", "left"], "truncation"), (["--dtype", "float64"], "dtype")]
)
def test_going_on_with_other_options_is_refused(folder, tmp_path, options, word):
    args = files(folder, tmp_path, [{"text": "a"}])
    run("score", *args)
    before = (tmp_path / "out.jsonl").read_bytes()
    done = run("score", *args, *options)
    assert done.exit_code == 1
    assert word in done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert run("score", *args, *options, "--overwrite").exit_code == 0


def test_going_on_with_another_input_or_command_is_refused(folder, tmp_path):
    args = files(folder, tmp_path, [{"text": "a"}])
    run("score", *args)
    assert "command" in run("values", *args).stderr
    assert "input_sha256" in run("score", *files(folder, tmp_path, [{"text": "b"}])).stderr


def test_a_file_of_something_else_is_left_alone(folder, tmp_path):
    args = files(folder, tmp_path, [{"text": "a"}])
    (tmp_path / "out.jsonl").write_text("my notes, no newline")
    done = run("score", *args)
    assert done.exit_code == 1
    assert "--overwrite" in done.stderr
    assert (tmp_path / "out.jsonl").read_text() == "my notes, no newline"


def test_a_failed_load_does_not_lose_the_old_output(folder, tmp_path):
    args = files(folder, tmp_path, [{"text": "a"}])
    run("score", *args)
    before = (tmp_path / "out.jsonl").read_bytes()
    assert run("score", *args, "--model", tmp_path, "--overwrite").exit_code == 1
    assert (tmp_path / "out.jsonl").read_bytes() == before


# Errors and the rest


def test_errors_are_one_line_and_exit_1(folder, tmp_path):
    args = files(folder, tmp_path, [{"text": "a"}])
    command = [sys.executable, "-m", "rmfast", "score", *map(str, args), "--model", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("rmfast: ")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"x": 1}], "Expected columns chosen+rejected or messages or prompt+response or text, got x"),
        ([{"text": "a", "reward": 1}], "'reward'"),
    ],
)
def test_columns_that_do_not_fit_are_an_error(folder, tmp_path, rows, message):
    done = run("score", *files(folder, tmp_path, rows))
    assert done.exit_code == 1
    assert message in done.stderr


def test_a_json_file_is_read_only_where_its_format_is_given(folder, tmp_path):
    (tmp_path / "in.json").write_text('{"text": "a"}\n')
    args = ["--model", folder, "--input", tmp_path / "in.json", "--output", tmp_path / "out.jsonl"]
    done = run("score", *args)
    assert done.exit_code == 1
    assert "one JSON array must be rewritten" in done.stderr
    assert run("score", *args, "--input-format", "jsonl").exit_code == 0


def test_the_input_is_never_the_output(folder, tmp_path):
    args = files(folder, tmp_path, [{"text": "a"}])
    done = run("score", *args, "--output", tmp_path / "in.jsonl", "--overwrite")
    assert done.exit_code == 1
    assert read(tmp_path / "in.jsonl") == [{"text": "a"}]


def test_wrong_usage_exits_2(tmp_path):
    assert run("score", "--model", "m").exit_code == 2
    assert run("score", "--no-such-option").exit_code == 2


def test_an_empty_input_gives_an_empty_output(folder, tmp_path):
    done = run("score", *files(folder, tmp_path, []), "--stats")
    assert done.exit_code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_explain_prints_what_would_run():
    done = run("explain")
    assert done.exit_code == 0
    assert done.stdout == f"{rmfast.explain()}\n"


def test_explain_of_a_model_tells_its_engine(folder, rm):
    done = run("explain", "--model", folder, "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{rm.explain()}\n"
    assert done.stdout.startswith("engine: ")


@pytest.mark.parametrize("command", ["score", "values"])
@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_engine_reaches_the_model(folder, tmp_path, monkeypatch, command, engine):
    runs = {name: getattr(rmfast.RewardModel, f"_run_{name}") for name in ("packed", "padded")}
    seen = []
    for name, function in runs.items():
        spy = lambda *a, name=name, function=function, **kw: (seen.append(name), function(*a, **kw))[1]  # noqa: E731
        monkeypatch.setattr(rmfast.RewardModel, f"_run_{name}", spy)
    assert run(command, *files(folder, tmp_path, [{"text": "a"}]), "--engine", engine).exit_code == 0
    assert seen == [engine]


def test_help_needs_neither_torch_nor_transformers():
    code = "import sys, rmfast.cli; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
