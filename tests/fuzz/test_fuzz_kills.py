"""Runs over files that are killed, out of disk, or two at once: every row is there once, in bytes that never differ.

Children are forked and score with a stand-in for a model, so that one takes milliseconds.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import fsspec
import numpy as np
import pyarrow.parquet  # noqa: F401  what a child needs is there when it is forked
import pytest
import tqdm  # noqa: F401
from fuzzing import fuzz, tried
from hypothesis import strategies as st
from stored import Store
from typer.testing import CliRunner

import rmfast
from rmfast.cli import app
from rmfast.texts import remote_output
from rmfast.texts.tables import read_rows


@pytest.fixture(scope="module", autouse=True)
def warm():
    """What typer imports when it first parses a command is there before children are forked."""
    CliRunner().invoke(app, ["score", "--model", "m", "--input", "nowhere.jsonl", "--output", "out.jsonl"])


class Text(bytes):
    cut = 0


class Model:
    """Rewards that are sums of letters; a text with "!" has none that is finite."""

    model = SimpleNamespace(config=SimpleNamespace())
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda ids: list(map(chr, ids)))

    def encode(self, inputs: list[Any], **kw: Any) -> list[Text]:
        return [Text(text.encode()) for text in inputs]

    def score(self, encoded: list[Text], **kw: Any) -> Any:
        time.sleep(0.0005)
        return np.array([np.nan if b"!" in text else sum(text) / 7 for text in encoded], dtype=np.float32)


class Child:
    """A forked process that runs a command, after `before`."""

    def __init__(self, args: list[Any], before: Callable[[], Any] = lambda: None) -> None:
        self.errors, end = os.pipe()  # no file: its size may be limited
        self.process = os.fork()
        if not self.process:
            _run(args, end, before)
        os.close(end)

    def status(self) -> int:
        """The exit code, or minus the signal; `stderr` is there then."""
        with open(self.errors, encoding="utf-8") as file:
            self.stderr = file.read()
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def _run(args: list[Any], errors: int, before: Callable[[], Any]) -> NoReturn:
    code = 99
    try:
        signal.alarm(60)
        os.dup2(errors, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        rmfast.load = lambda *a, **kw: Model()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        before()
        code = app(list(map(str, args)), standalone_mode=False) or 0  # it returns what an Exit holds
    except BaseException as error:
        code = 98
        sys.stderr.write(repr(error))
    finally:
        sys.stderr.flush()
        os._exit(code)


def limited(size: int, deadly: bool) -> Callable[[], None]:
    """No file may grow over `size`: the process is killed there, in the middle of a write, or gets an error."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    return limit


TEXTS = st.lists(st.sampled_from(["a", "some words", "", "bad!", "Größe\n", "x" * 50]), min_size=1, max_size=40)
SUFFIXES = st.sampled_from([".jsonl", ".csv", ".parquet"])
OPTIONS = st.tuples(st.integers(1, 9), st.sampled_from(["skip", "null"]))


def command(folder: Path, texts: list[str], suffix: str, options: tuple[int, str]) -> tuple[list[Any], Path]:
    folder.mkdir()
    (folder / "model").mkdir()
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / f"out{suffix}"
    args = ["score", "--model", folder / "model", "--input", folder / "in.jsonl", "--output", out]
    return [*args, "--window", options[0], "--on-error", options[1]], out


def done(args: list[Any]) -> None:
    process = Child(args)
    assert process.status() == 0, process.stderr


def whole(folder: Path, *what: Any) -> bytes:
    """The output of a run that nothing happens to, and that it has every row."""
    args, out = command(folder, *what)
    done(args)
    texts, (_, on_error) = what[0], what[-1]
    good = [i for i, text in enumerate(texts) if text and "!" not in text]
    assert [int(row.data["id"]) for row in read_rows(out)] == (good if on_error == "skip" else list(range(len(texts))))
    return out.read_bytes()


@fuzz(
    20,
    texts=TEXTS,
    suffix=SUFFIXES,
    options=OPTIONS,
    accidents=st.lists(st.tuples(st.integers(0, 4000), st.booleans()), min_size=1, max_size=3),
)
def test_kills_at_any_byte_and_full_disks_change_no_byte(tmp_path_factory, texts, suffix, options, accidents):
    folder = tmp_path_factory.mktemp("kills")
    expected = whole(folder / "whole", texts, suffix, options)
    args, out = command(folder / "killed", texts, suffix, options)
    for size, deadly in accidents:
        process = Child(args, limited(size, deadly))
        code = process.status()
        assert code in ((0, -signal.SIGXFSZ) if deadly else (0, 1)), process.stderr
        tried({0: "accidents after the end", 1: "full disks"}.get(code, "kills in the middle of a write"))
        if code == 1:
            last = process.stderr.splitlines()[-1]
            assert last.startswith("rmfast: ") and str(folder / "killed") in last, last
    done(args)
    assert out.read_bytes() == expected
    assert not (folder / "killed" / f"{out.name}.run.lock").exists()


@fuzz(8, texts=TEXTS, suffix=SUFFIXES, options=OPTIONS, delays=st.lists(st.integers(0, 20), min_size=1, max_size=4))
def test_kills_at_any_time_change_no_byte(tmp_path_factory, texts, suffix, options, delays):
    folder = tmp_path_factory.mktemp("kills")
    expected = whole(folder / "whole", texts, suffix, options)
    args, out = command(folder / "killed", texts, suffix, options)
    for delay in delays:
        process = Child(args)
        time.sleep(delay / 1000)
        os.kill(process.process, signal.SIGKILL)
        if process.status() == -signal.SIGKILL:
            tried("kills at any time")
    done(args)
    assert out.read_bytes() == expected


@fuzz(8, texts=TEXTS, suffix=SUFFIXES, options=OPTIONS, delays=st.lists(st.integers(0, 20), min_size=1, max_size=4))
def test_kills_change_no_byte_of_what_is_on_no_disk(tmp_path_factory, texts, suffix, options, delays):
    folder = tmp_path_factory.mktemp("kills")
    expected = whole(folder / "whole", texts, suffix, options)
    args, out = command(folder / "killed", texts, suffix, options)
    args[args.index(out)] = f"stored://{out}"
    for delay in delays:
        process = Child(args, each_window_a_part)
        time.sleep(delay / 1000)
        os.kill(process.process, signal.SIGTERM if delay % 3 == 0 else signal.SIGKILL)
        if process.status() in (-signal.SIGKILL, 143):
            tried("kills of runs to a store")
    process = Child(args, each_window_a_part)
    assert process.status() == 0, process.stderr
    assert out.read_bytes() == expected


def each_window_a_part() -> None:
    fsspec.register_implementation("stored", Store, clobber=True)
    remote_output._INTERVAL = 0.0


@fuzz(5, texts=TEXTS, suffix=SUFFIXES, options=OPTIONS, runs=st.integers(2, 4))
def test_runs_at_once_write_every_row_once(tmp_path_factory, texts, suffix, options, runs):
    folder = tmp_path_factory.mktemp("runs")
    expected = whole(folder / "whole", texts, suffix, options)
    args, out = command(folder / "shared", texts, suffix, options)
    processes = [Child(args) for _ in range(runs)]
    codes = [process.status() for process in processes]
    assert 0 in codes
    for process, code in zip(processes, codes):
        assert code == 0 or "is being written by" in process.stderr
    assert out.read_bytes() == expected
