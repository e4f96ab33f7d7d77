"""`rmfast score`, `values` and `explain`: files in, JSONL out, statistics, exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from shell import files, read, run, saved, write

import rmfast
from rmfast.cli.options import in_options
from rmfast.engine import scorer

TEXTS = ["short", "a somewhat longer text", "x", "Größe, 大きさ", "the end\nof it"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with one label and a chat template."""
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rm(folder: Path) -> rmfast.RewardModel:
    return rmfast.load(folder)


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


def test_stats_count_a_tie_as_half(folder, rm, tmp_path):
    high, low = sorted(["good", "bad"], key=lambda text: -rm.score([text])[0].item())
    pairs = [(high, low), (high, low), (low, high), (high, high)]
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    done = run("score", *files(folder, tmp_path, rows), "--stats")
    assert "pairs 4  accuracy 0.6250  ties 1" in done.stdout
    rewards = rm.score([chosen for chosen, _ in pairs]).double().numpy()
    assert f"reward_chosen  n 4  mean {rewards.mean():.4f}  std {np.std(rewards):.4f}" in done.stdout


def test_a_long_text_is_cut_when_asked(folder, rm, tmp_path):
    args = files(folder, tmp_path, [{"text": "y" * 200}])
    assert run("score", *args, "--truncation", "left", "--max-length", 20).exit_code == 0
    expected = rm.score(["y" * 200], max_length=20, truncation="left")[0].item()
    assert read(tmp_path / "out.jsonl")[0]["reward"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "message, told",
    [
        ('over max_length=512; truncation="left" or "right" would cut it',
         "over --max-length 512; --truncation left or right would cut it"),
        ("which only runs with trust_remote_code=True", "which only runs with --trust-remote-code"),
        ("Expected dtype='bfloat16', got 3", "Expected --dtype bfloat16, got 3"),
        ('only with truncation="left", max_length=512', "only with --truncation left, --max-length 512"),
        # No options of the command, calls, and what merely looks so.
        ('rmfast.load(..., head="NAME")', 'rmfast.load(..., head="NAME")'),
        ('rm.score(x, truncation="left")', 'rm.score(x, truncation="left")'),
        ('rmfast.load(f(x), truncation="left", max_length=5), or dtype="a"',
         'rmfast.load(f(x), truncation="left", max_length=5), or --dtype a'),
        *[(same, same) for same in ('align="strict"', "a=b", 'x.dtype="y"', "https://host/?dtype=3")],
    ],
)  # fmt: skip
def test_messages_name_options_and_not_arguments(message, told):
    names = {"max_length", "truncation", "trust_remote_code", "dtype", "head"}
    assert in_options(message, names) == told


def test_a_text_over_the_limit_names_the_options(folder, tmp_path):
    args = files(folder, tmp_path, [{"text": "y" * 200}])
    done = run("score", *args, "--max-length", 20)
    assert done.exit_code == 1 and "over --max-length 20; --truncation left or right would cut it" in done.stderr
    assert run("score", *args, "--max-length", 20, "--overwrite", "--on-error", "null").exit_code == 0
    assert "--truncation left or right" in read(tmp_path / "out.jsonl")[0]["error"]


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
    printed, wanted = (re.sub(r"\d+( GFLOP/s)?", "", text) for text in (done.stdout, f"{rm.explain()}\n"))  # measured
    assert printed == wanted and done.stdout.startswith("engine: ")


def test_the_head_is_named_on_the_command_line(tmp_path):
    model, tokenizer = models.decoder("llama", task="CausalLM"), models.tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])
    paths = ["--model", tmp_path / "model", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]
    done = run("score", *paths, "--token-head", "a", "--token-head", "98")
    assert done.exit_code == 0, done.output
    want = rmfast.RewardModel(model, tokenizer, head=rmfast.TokenHead("a", 98)).score(TEXTS)
    assert [row["reward"] for row in read(tmp_path / "out.jsonl")] == want.tolist()
    done = run("score", *paths, "--token-head", "a")
    assert done.exit_code and "head" in done.output  # another run
    done = run("score", *paths, "--overwrite", "--head", "v_head", "--token-head", "a")
    assert done.exit_code and "Expected --head or --token-head, got both" in done.output


def test_explain_takes_how_the_model_is_loaded(folder):
    done = run("explain", "--model", folder, "--dtype", "bfloat16", "--compute", "fp32", "--num-labels", 1)
    assert "compute: fp32 on bfloat16 weights (as was asked for" in done.stdout, done.output
    assert run("explain", "--model", folder, "--dtype", "float64", "--compute", "fp32").exit_code == 1


@pytest.mark.parametrize("command", ["score", "values"])
@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_engine_reaches_the_model(folder, tmp_path, monkeypatch, command, engine):
    runs = {name: getattr(scorer, f"run_{name}") for name in ("packed", "padded")}
    seen = []
    for name, function in runs.items():
        spy = lambda *a, name=name, function=function, **kw: (seen.append(name), function(*a, **kw))[1]  # noqa: E731
        monkeypatch.setattr(scorer, f"run_{name}", spy)
    assert run(command, *files(folder, tmp_path, [{"text": "a"}]), "--engine", engine).exit_code == 0
    assert seen == [engine]


def test_help_needs_neither_torch_nor_transformers():
    code = "import sys, rmfast.cli; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(("labels", "code"), [(3, 0), (2, 1)])
def test_num_labels_says_how_many_rewards_the_head_gives(tmp_path, labels, code):
    """An error that names it where the head in the file has another number."""
    source = files(saved(tmp_path / "model", labels=3), tmp_path, [{"text": "a"}])
    done = run("score", *source, "--num-labels", labels)
    assert done.exit_code == code, done.output
    if code:
        assert "with --num-labels 2, got (3, 48)" in done.output
    else:
        assert len(read(tmp_path / "out.jsonl")[0]["reward"]) == 3


def test_the_list_of_commands_says_of_each_in_a_whole_sentence_what_it_does():
    commands = run("--help").stdout.split("Commands:")[1].strip().splitlines()
    assert len(commands) == 13 and all(line.endswith(".") and "..." not in line for line in commands)
