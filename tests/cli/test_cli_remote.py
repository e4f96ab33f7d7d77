"""Runs that read and write what is not on this machine, over a store that processes share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shell import files, run, saved
from stored import store  # noqa: F401  a fixture

from rmfast.cli.shards import shards_of
from rmfast.texts.remote import Remote

ROWS = [{"id": i, "text": "" if i == 5 else f"text {i}"} for i in range(11)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with one label and a chat template."""
    return saved(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows_from_a_url_to_a_url_are_those_of_files(folder, tmp_path, store, suffix):  # noqa: F811
    Remote(f"{store}/in.jsonl").write(LINES)
    here = [*files(folder, tmp_path, ROWS), "--output", tmp_path / f"out{suffix}", "--window", 4]
    there = ["--model", folder, "--input", f"{store}/in.jsonl", "--output", f"{store}/a/out{suffix}", "--window", 4]
    for args in (here, there):
        assert "line 6: column 'text' is empty" in run("score", *args).stderr
    assert Remote(f"{store}/a/out{suffix}").size() is None
    for args in (here, there):
        done = run("score", *args, "--on-error", "skip", "--stats")
        assert done.exit_code == 0, done.stderr
        assert done.stdout.startswith("reward  n 10")
    assert done.stderr.splitlines()[-1].startswith("rmfast: 6 rows, 5 texts")  # those from the bad one on
    assert Remote(f"{store}/a/out{suffix}").read() == (tmp_path / f"out{suffix}").read_bytes()
    again = run("score", *there, "--on-error", "skip")
    assert f"{store}/a/out{suffix} is complete" in again.stderr
    changed = run("score", *there, "--truncation", "left")
    assert "was begun with truncation" in changed.stderr


def test_shards_and_their_whole_may_be_there(folder, tmp_path, store):  # noqa: F811
    args = [*files(folder, tmp_path, ROWS), "--window", 4, "--on-error", "skip"]
    assert run("score", *args).exit_code == 0
    for index in range(2):
        done = run("score", *args, "--output", f"{store}/out.jsonl", "--shard", f"{index}/2")
        assert done.exit_code == 0, done.stderr
    shards = [f"{store}/out-0000{index}-of-00002.jsonl" for index in range(2)]
    assert "got none: name them" in run("join", "--output", f"{store}/other.jsonl").stderr
    assert "got none: name them" in run("join", "--output", f"{store}/nowhere/out.jsonl").stderr
    for named in (shards, []):
        done = run("join", *named, "--output", f"{store}/out.jsonl", "--overwrite")
        assert done.exit_code == 0, done.stderr
        assert Remote(f"{store}/out.jsonl").read() == (tmp_path / "out.jsonl").read_bytes()


def test_shards_in_a_bucket_are_found():
    for index in (1, 0):
        Remote(f"memory://shards/a/out-0000{index}-of-00002.jsonl").write(b"")
    Remote("memory://shards/a/out-00000-of-00002.jsonl.run.jsonl").write(b"")
    Remote("memory://shards/a/out-00002-of-00003.jsonl/x").write(b"")
    found = [f"memory://shards/a/out-0000{index}-of-00002.jsonl" for index in range(2)]
    assert shards_of(Remote("memory://shards/a/out.parquet")) == list(map(Remote, found))


def test_an_input_is_never_the_output(folder, tmp_path, store):  # noqa: F811
    Remote(f"{store}/in.jsonl").write(LINES)
    url = f"{store}/in.jsonl"
    done = run("score", "--model", folder, "--input", url, "--output", url, "--overwrite")
    assert "other files to be read than written" in done.stderr
    assert Remote(url).read() == LINES


def test_a_url_that_is_not_there_is_an_error_of_one_line(folder, tmp_path, store):  # noqa: F811
    done = run("score", "--model", folder, "--input", f"{store}/none.jsonl", "--output", tmp_path / "out.jsonl")
    assert done.exit_code == 1
    assert "none.jsonl" in done.stderr
    done = run("score", "--model", folder, "--input", "nosuch://a/b.jsonl", "--output", tmp_path / "out.jsonl")
    assert done.exit_code == 1
    assert done.stderr.startswith("rmfast: ") and "nosuch" in done.stderr


def test_a_folder_is_wrong_usage(folder, tmp_path):
    args = files(folder, tmp_path, ROWS)
    for option in ("--input", "--output"):
        done = run("score", *args, option, tmp_path)
        assert done.exit_code == 2
        assert "is a directory" in done.stderr
    done = run("score", *args, "--input", tmp_path / "none.jsonl")
    assert done.exit_code == 2
    assert "does not exist" in done.stderr
