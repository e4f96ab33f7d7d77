"""SIGTERM, as a scheduler sends it: the window at work is finished, and the same command goes on."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from shell import files, read, run, saved

import rmfast
from rmfast.cli.progress import Progress
from rmfast.cli.termination import Terminated, Termination

ROWS = [{"id": i, "text": f"text {i}"} for i in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with one label and a chat template."""
    return saved(tmp_path_factory.mktemp("model"))


def told(monkeypatch: Any, times: int, at: int = 2) -> list[int]:
    """`score` gets so many SIGTERMs in its `at`-th call; gives the sizes of calls that returned."""
    scored: list[int] = []
    score, calls = rmfast.RewardModel.score, []

    def scoring(self: Any, inputs: Any, **kw: Any) -> Any:
        calls.append(len(inputs))
        if len(calls) == at:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)
        found = score(self, inputs, **kw)
        scored.append(len(inputs))
        return found

    monkeypatch.setattr(rmfast.RewardModel, "score", scoring)
    return scored


def test_a_window_is_finished_and_nothing_is_scored_twice(folder, tmp_path, monkeypatch):
    scored, before = told(monkeypatch, 1), signal.getsignal(signal.SIGTERM)
    args = [*files(folder, tmp_path, ROWS), "--window", 4]
    done = run("score", *args)
    assert done.exit_code == 143
    assert done.stderr.splitlines()[-1] == "rmfast: terminated (the same command goes on where it stopped)"
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == list(range(8))
    assert signal.getsignal(signal.SIGTERM) is before
    assert run("score", *args).exit_code == 0
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == list(range(20))
    assert scored == [4] * 5


def test_a_second_one_does_not_wait(folder, tmp_path, monkeypatch):
    scored = told(monkeypatch, 2)
    args = [*files(folder, tmp_path, ROWS), "--window", 4]
    assert run("score", *args).exit_code == 143
    assert scored == [4]
    assert run("score", *args).exit_code == 0
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == list(range(20))


def test_before_the_first_window_it_ends_at_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(rmfast, "load", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM) or pytest.fail("waited"))
    assert run("score", *files(folder, tmp_path, ROWS)).exit_code == 143
    assert not (tmp_path / "out.jsonl").exists()


def test_nothing_else_handles_it_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), Termination() as termination:
        with termination.finishing():
            os.kill(os.getpid(), signal.SIGTERM)
            done = True
        pytest.fail("went on")
    assert done
    assert signal.getsignal(signal.SIGTERM) is before
    assert not issubclass(Terminated, Exception)


def test_a_log_has_a_line_now_and_then_with_rate_and_time_left(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with Progress(10_000, 1_000) as progress:
        for row in (1_100, 2_000, 2_100, 5_000):
            clock[0] += 50
            progress.reached(row, "20.0 texts/s")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "rmfast: 2000 of 10000 rows (20%), 10.0 rows/s, 20.0 texts/s, 0:13:20 left",
        "rmfast: 5000 of 10000 rows (50%), 20.0 rows/s, 20.0 texts/s, 0:04:10 left",
    ]
    with Progress(None, 0) as progress:
        clock[0] += 100
        progress.reached(50, "20.0 texts/s")
    assert capsys.readouterr().err == "rmfast: 50 rows, 0.5 rows/s, 20.0 texts/s\n"
