"""Runs over files that were killed, interrupted or finished: they go on, or are refused."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from shell import files, read, run, saved

import rmfast


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with one label and a chat template."""
    return saved(tmp_path_factory.mktemp("model"))


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
    ("options", "word"),
    [
        (["--truncation", "left"], "truncation"),
        (["--dtype", "float64"], "dtype"),
        (["--num-labels", "1"], "num_labels"),
    ],
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
