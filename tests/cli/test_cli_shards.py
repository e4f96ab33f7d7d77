"""Parts of an input, each by a run of its own, and what `join` makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shell import files, read, run, saved, write

import rmfast

ROWS = [{"id": i, "text": "" if i % 7 == 3 else f"{'word ' * (i % 5)}{i}"} for i in range(23)]
OPTIONS = ["--window", 4, "--on-error", "skip"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with one label and a chat template."""
    return saved(tmp_path_factory.mktemp("model"))


def whole(folder: Path, tmp_path: Path, suffix: str = ".jsonl", rows: Any = ROWS, options: Any = OPTIONS) -> bytes:
    """What one run writes over the whole input."""
    (tmp_path / "whole").mkdir()
    args = files(folder, tmp_path / "whole", rows)
    out = tmp_path / "whole" / f"out{suffix}"
    assert run("score", *args, *options, "--output", out).exit_code == 0
    return out.read_bytes()


def sharded(folder: Path, tmp_path: Path, count: int, rows: Any = ROWS, options: Any = OPTIONS) -> list[Path]:
    args = files(folder, tmp_path, rows)
    for index in range(count):
        done = run("score", *args, *options, "--shard", f"{index}/{count}")
        assert done.exit_code == 0, done.stderr
    return [tmp_path / f"out-{index:05}-of-{count:05}.jsonl" for index in range(count)]


@pytest.mark.parametrize("count", [2, 3, 9])  # 9: more than there are windows
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_the_joined_shards_are_to_the_byte_what_one_run_writes(folder, tmp_path, suffix, count):
    expected = whole(folder, tmp_path, suffix)
    shards = sharded(folder, tmp_path, count)
    assert sum(len(read(shard)) for shard in shards) == len([row for row in ROWS if row["text"]])
    done = run("join", "--output", tmp_path / f"out{suffix}")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / f"out{suffix}").read_bytes() == expected
    assert f"of {count} shards" in done.stderr


@pytest.mark.parametrize("rows", [[], ROWS[:4], ROWS[:8]], ids=["none", "one window", "two"])
def test_windows_that_end_with_the_input_are_joined(folder, tmp_path, rows):
    expected = whole(folder, tmp_path, rows=rows)
    shards = sharded(folder, tmp_path, 2, rows)
    done = run("join", *shards[::-1], "--output", tmp_path / "out.jsonl")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_a_shard_that_stopped_in_a_window_is_joined(folder, tmp_path):
    expected = whole(folder, tmp_path)
    args = files(folder, tmp_path, ROWS)
    stopped = run("score", *args, "--window", 4, "--shard", "0/2")
    assert "line 4: column 'text' is empty" in stopped.stderr
    sharded(folder, tmp_path, 2)
    assert run("join", "--output", tmp_path / "out.jsonl").exit_code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_rank_and_world_size_say_which_part(folder, tmp_path, monkeypatch):
    expected = whole(folder, tmp_path)
    args = files(folder, tmp_path, ROWS)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert run("score", *args, *OPTIONS).exit_code == 0
    assert not (tmp_path / "out.jsonl").exists()
    assert run("join", "--output", tmp_path / "out.jsonl").exit_code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    assert run("score", *args, *OPTIONS, "--shard", "0/1", "--overwrite").exit_code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_a_copy_of_the_model_elsewhere_is_the_same_model(folder, tmp_path):
    expected = whole(folder, tmp_path)
    args = files(folder, tmp_path, ROWS)
    copy = saved(tmp_path / "copy")
    for index, model in enumerate((folder, copy)):
        done = run("score", *args, *OPTIONS, "--shard", f"{index}/2", "--model", model)
        assert done.exit_code == 0, done.stderr
    done = run("join", "--output", tmp_path / "out.jsonl")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_shards_of_another_model_input_or_option_are_refused(folder, tmp_path):
    args = files(folder, tmp_path, ROWS)
    assert run("score", *args, *OPTIONS, "--shard", "0/2").exit_code == 0
    other = saved(tmp_path / "other", seed=1)
    second = [*args, *OPTIONS, "--shard", "1/2", "--overwrite"]
    for name, changed in (
        ("model_files", [*second, "--model", other]),
        ("truncation", [*second, "--truncation", "left"]),
        ("window", [*second, "--window", 5]),
        ("input_sha256", second),
    ):
        if name == "input_sha256":
            write(tmp_path / "in.jsonl", ROWS[:-1])
        assert run("score", *changed).exit_code == 0
        done = run("join", "--output", tmp_path / "joined.jsonl", *sorted(tmp_path.glob("out-*-of-00002.jsonl")))
        assert done.exit_code == 1
        assert f"Expected shards of one run, but {name} is " in done.stderr
    assert not (tmp_path / "joined.jsonl").exists()


def test_gaps_and_doubles_are_refused(folder, tmp_path):
    shards = sharded(folder, tmp_path, 3)
    out = tmp_path / "joined.jsonl"

    def refusal(*given: Any) -> str:
        done = run("join", *given, "--output", out)
        assert done.exit_code == 1
        assert not out.exists()
        return done.stderr

    assert "Expected all 3 shards, but 1/3 is missing" in refusal(shards[0], shards[2])
    assert "both are 1/3" in refusal(*shards, shards[1])
    assert "but there is no" in refusal(tmp_path / "in.jsonl")
    assert "got none: name them" in refusal()
    log = shards[1].with_name(shards[1].name + ".run.jsonl")
    entries = log.read_text().splitlines(keepends=True)
    log.write_text("".join(entries[:-1]))
    assert "to be complete: its run has not ended" in refusal(*shards)
    lines, last = shards[1].read_bytes(), json.loads(entries[-2])
    log.write_text("".join([*entries[:-2], json.dumps({"finished": last["row"]}) + "\n"]))
    shards[1].write_bytes(lines[: -last["bytes"]])
    assert "no rows behind the last of" in refusal(*shards)
    log.write_text("".join(entries))
    shards[1].write_bytes(lines.replace(b"word", b"Word", 1))
    assert "rows from 1 on were changed" in refusal(*shards)
    shards[1].write_bytes(lines + b"{}\n")
    assert "lines behind its last" in refusal(*shards)


def test_an_output_that_is_there_is_replaced_on_request_alone(folder, tmp_path):
    shards = sharded(folder, tmp_path, 2)
    (tmp_path / "out.jsonl").write_text("mine\n")
    done = run("join", "--output", tmp_path / "out.jsonl")
    assert "exists: give another --output, or --overwrite" in done.stderr
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"
    assert run("join", "--output", tmp_path / "out.jsonl", "--overwrite").exit_code == 0
    done = run("join", *shards, "--output", shards[0], "--overwrite")
    assert "other files to be read than written" in done.stderr


def test_a_shard_goes_on_with_its_own_window_alone(folder, tmp_path):
    args = files(folder, tmp_path, ROWS)
    assert run("score", *args, "--window", 4, "--shard", "0/2").exit_code == 1  # at the empty row
    done = run("score", *args, "--window", 5, "--on-error", "skip", "--shard", "0/2")
    assert "was begun with shard" in done.stderr


@pytest.mark.parametrize("given", ["2/2", "1", "-1/2", "a/b", "0/0"])
def test_a_shard_that_is_none_is_refused(folder, tmp_path, given):
    done = run("score", *files(folder, tmp_path, ROWS), f"--shard={given}")
    assert done.exit_code == 1
    assert f"Expected --shard to be K/N with K from 0 to N - 1, got {given}" in done.stderr


def test_standard_output_has_no_shards(folder, tmp_path):
    done = run("score", *files(folder, tmp_path, ROWS), "--output", "-", "--shard", "0/2")
    assert "Expected --output to be a file with --shard" in done.stderr


@pytest.mark.parametrize("gpus, device", [(0, None), (1, "cuda:0"), (4, "cuda:3")])
def test_a_process_takes_the_gpu_of_its_rank(folder, tmp_path, monkeypatch, gpus, device):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)

    def load(*_: Any, **given: Any) -> Any:
        raise ValueError(f"device {given.get('device')}")

    monkeypatch.setattr(rmfast, "load", load)
    assert f"device {device}" in run("score", *files(folder, tmp_path, ROWS[:2])).stderr
    assert "device cpu" in run("score", *files(folder, tmp_path, ROWS[:2]), "--device", "cpu").stderr
