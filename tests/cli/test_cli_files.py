"""What `score` and `values` read and write: pipes, links, devices, other formats, one run at a time."""

from __future__ import annotations

import json
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from shell import files, read, run, saved, write

import rmfast
from rmfast.texts.files import locked
from rmfast.texts.tables import read_rows

ROWS = [{"id": i, "text": f"text {i}"} for i in range(7)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with one label and a chat template."""
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rewards(folder: Path) -> list[float]:
    return rmfast.load(folder).score([row["text"] for row in ROWS]).tolist()


def device(path: Path) -> None:
    """A device node of the test's own, for root alone: nothing here ever names one of the machine's."""
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes device nodes")


def piped(command: str, *args: Any, data: bytes, **kw: Any) -> Any:
    """A run in a shell, whose standard input is a pipe."""
    rmfast_ = f"{sys.executable} -m rmfast"
    text = command.format(*args, rmfast=rmfast_)
    return subprocess.run(["bash", "-c", text], input=data, capture_output=True, timeout=300, **kw)


@pytest.mark.parametrize("make", [device, os.mkfifo], ids=["device", "pipe"])
@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_an_output_that_is_no_regular_file_is_refused_and_stays(folder, tmp_path, make, options):
    make(tmp_path / "node.jsonl")
    (tmp_path / "link.jsonl").symlink_to("node.jsonl")
    before = (tmp_path / "node.jsonl").stat()
    for name in ("node.jsonl", "link.jsonl"):
        done = run("score", *files(folder, tmp_path, ROWS), "--output", tmp_path / name, *options)
        assert done.exit_code == 1
        assert f"Expected --output to be a regular file, but {tmp_path / name} is a " in done.stderr
    after = (tmp_path / "node.jsonl").stat()
    assert (before.st_mode, before.st_rdev, before.st_ino) == (after.st_mode, after.st_rdev, after.st_ino)


@pytest.mark.parametrize("ending", [".run.jsonl", ".run.lock", ".run.rows.jsonl", ".run.parquet"])
def test_what_lies_beside_the_output_is_not_replaced_where_it_is_a_device(folder, tmp_path, ending):
    beside = tmp_path / f"out.parquet{ending}"
    device(beside)
    done = run("score", *files(folder, tmp_path, ROWS), "--output", tmp_path / "out.parquet", "--overwrite")
    assert done.exit_code == 1
    assert f"{beside} is a device" in done.stderr
    assert stat.S_ISCHR(beside.stat().st_mode)


def test_a_link_is_followed(folder, rewards, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "out.jsonl").symlink_to("there/really.jsonl")
    for _ in range(2):
        done = run("score", *files(folder, tmp_path, ROWS))
        assert done.exit_code == 0, done.output
    assert (tmp_path / "out.jsonl").is_symlink()
    assert [row["reward"] for row in read(tmp_path / "there" / "really.jsonl")] == pytest.approx(rewards, abs=1e-6)
    assert (tmp_path / "there" / "really.jsonl.run.jsonl").exists()


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".ndjson"])
def test_the_suffix_says_what_is_written(folder, rewards, tmp_path, suffix):
    out = tmp_path / f"out{suffix}"
    first = run("score", *files(folder, tmp_path, ROWS), "--output", out, "--stats")
    assert first.exit_code == 0, first.output
    rows = [row.data for row in read_rows(out)]
    assert [row["text"] for row in rows] == [row["text"] for row in ROWS]
    written = torch.tensor([float(row["reward"]) for row in rows])
    assert torch.equal(written, torch.tensor(rewards))
    again = run("score", *files(folder, tmp_path, ROWS), "--output", out, "--stats")
    assert "complete" in again.stderr
    assert again.stdout == first.stdout
    assert "reward  n 7" in first.stdout


@pytest.mark.parametrize("name", ["out.txt", "out", "out.json", "out.jsonl.gz"])
def test_a_suffix_that_says_nothing_is_refused(folder, tmp_path, name):
    done = run("score", *files(folder, tmp_path, ROWS), "--output", tmp_path / name)
    assert done.exit_code == 1
    assert (
        "Expected --output to end in .jsonl, .ndjson, .csv, .parquet, or to be - (standard output), got" in done.stderr
    )
    assert not (tmp_path / name).exists()


def test_rows_that_parquet_can_not_hold_are_kept_as_lines(folder, tmp_path):
    rows = [{"text": "a", "x": 1}, {"text": "b", "x": "one"}]
    done = run("score", *files(folder, tmp_path, rows), "--output", tmp_path / "out.parquet")
    assert done.exit_code == 1
    assert "parquet can hold, got column 'x'" in done.stderr
    assert [row["x"] for row in read(tmp_path / "out.parquet.run.rows.jsonl")] == [1, "one"]


@pytest.mark.parametrize("command", ["score", "values --tokens"])
def test_standard_output_gets_the_rows_and_nothing_else(folder, tmp_path, command):
    (tmp_path / "in.jsonl").write_bytes(LINES)
    args = ["--model", folder, "--input", tmp_path / "in.jsonl"]
    assert run(*command.split(), *args, "--output", tmp_path / "out.jsonl").exit_code == 0
    done = run(*command.split(), *args, "--output", "-")
    assert done.exit_code == 0, done.output
    assert done.stdout == (tmp_path / "out.jsonl").read_text()
    assert not Path("-").exists()


def test_statistics_need_a_file(folder, tmp_path):
    done = run("score", *files(folder, tmp_path, ROWS), "--output", "-", "--stats")
    assert done.exit_code == 1
    assert "Expected --output to be a file with --stats" in done.stderr


def test_rows_come_and_go_through_pipes(folder, rewards, tmp_path):
    done = piped("{rmfast} score --model {0} --input - --input-format jsonl --output - | cat", folder, data=LINES)
    assert [json.loads(line)["reward"] for line in done.stdout.splitlines()] == pytest.approx(rewards, abs=1e-6)
    command = (
        "{rmfast} score --model {0} --input <(cat) --input-format jsonl --output {1} && {rmfast} score --model {0}"
        " --input /dev/stdin --input-format jsonl --output {1} < <(cat {1} | sed 's/, .reward.*$/}}/')"
    )
    done = piped(command, folder, tmp_path / "out.jsonl", data=LINES)
    assert done.returncode == 0, done.stderr
    assert [row["reward"] for row in read(tmp_path / "out.jsonl")] == pytest.approx(rewards, abs=1e-6)
    assert b"out.jsonl is complete" in done.stderr  # the same rows through another pipe are the same input


def test_a_reader_that_goes_away_is_an_error_of_one_line(folder):
    command = "{rmfast} score --model {0} --input - --input-format jsonl --output - --window 1 | true;"
    command += " exit ${{PIPESTATUS[0]}}"
    done = piped(command, folder, data=LINES)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == b"rmfast: standard output was closed before the last row"


def test_a_pipe_without_a_suffix_needs_its_format(folder, tmp_path):
    done = run("score", *files(folder, tmp_path, []), "--input", "-")
    assert done.exit_code == 1
    assert "--input-format" in done.stderr


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.run.jsonl", "out.jsonl.run.rows.jsonl", "linked.jsonl"])
def test_an_input_that_would_be_written_or_removed_is_refused(folder, tmp_path, name):
    (tmp_path / "out.jsonl").write_bytes(LINES)
    if name == "linked.jsonl":
        os.link(tmp_path / "out.jsonl", tmp_path / name)
    (tmp_path / name).write_bytes(LINES)
    args = ["--model", folder, "--input", tmp_path / name, "--output", tmp_path / "out.jsonl", "--overwrite"]
    done = run("score", *args)
    assert done.exit_code == 1
    assert "other files to be read than written" in done.stderr
    assert (tmp_path / name).read_bytes() == LINES


@pytest.mark.parametrize("option", ["--tools", "--chat-template-kwargs"])
@pytest.mark.parametrize("command", ["score", "values", "sweep", "debias"])
def test_a_file_of_an_option_is_never_the_output(folder, tmp_path, command, option):
    names = {"sweep": "sweep.json", "debias": "intervention.json"}
    file = tmp_path / names.get(command, "out.jsonl")
    text = '[{"type": "function", "function": {"name": "f"}}]' if option == "--tools" else '{"enable_thinking": false}'
    file.write_text(text)
    args = files(folder, tmp_path, ROWS)
    if command in names:
        write(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
        args = ["--model", folder, "--output", tmp_path]
        args += ["--clean", "a", "--corrupted", "b"] if command == "sweep" else ["--pairs", tmp_path / "pairs.jsonl"]
    done = run(command, *args, option, f"@{file}", "--overwrite")
    assert done.exit_code == 1
    assert "other files to be read than written" in done.stderr
    assert file.read_text() == text


def test_a_file_of_the_model_is_never_the_output(tmp_path):
    folder = saved(tmp_path / "model")
    (tmp_path / "out.jsonl").symlink_to(folder / "config.json")
    before = (folder / "config.json").read_bytes()
    done = run("score", *files(folder, tmp_path, ROWS), "--overwrite")
    assert done.exit_code == 1
    assert "config.json" in done.stderr
    assert (folder / "config.json").read_bytes() == before


def test_outputs_in_the_models_folder_change_nothing_of_the_model(tmp_path):
    folder = saved(tmp_path / "model")
    for suffix in ("jsonl", "csv", "parquet"):
        args = ["--output", folder / f"out.{suffix}", "--window", 3]
        stopped = run("score", *files(folder, tmp_path, [*ROWS, {"text": ""}]), *args)
        assert stopped.exit_code == 1
        assert "line 8: column 'text' is empty" in stopped.stderr
        done = run("score", *files(folder, tmp_path, [*ROWS, {"text": ""}]), *args, "--on-error", "skip")
        assert done.exit_code == 0, done.output
        assert done.stderr.splitlines()[-1].startswith("rmfast: 1 rows, 0 texts")
        assert len(list(read_rows(folder / f"out.{suffix}"))) == 7


def test_two_runs_with_one_output_do_not_mix(folder, tmp_path, monkeypatch):
    args = files(folder, tmp_path, ROWS)
    score, second = rmfast.RewardModel.score, []

    def scoring(self: Any, *a: Any, **kw: Any) -> Any:
        if not second:
            second.append(None)
            second.append(run("score", *args))  # another run begins while this one is at work
        return score(self, *a, **kw)

    monkeypatch.setattr(rmfast.RewardModel, "score", scoring)
    assert run("score", *args).exit_code == 0
    assert second[1].exit_code == 1
    assert f"is being written by process {os.getpid()}" in second[1].stderr
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == [row["id"] for row in ROWS]
    assert not (tmp_path / "out.jsonl.run.lock").exists()


def test_a_damaged_log_is_named(folder, tmp_path):
    args = files(folder, tmp_path, ROWS)
    assert run("score", *args).exit_code == 0
    (tmp_path / "out.jsonl.run.jsonl").write_text('{"rmfast": \n')
    done = run("score", *args)
    assert done.exit_code == 1
    assert "out.jsonl.run.jsonl, line 1 is damaged" in done.stderr


def test_a_deleted_line_is_noticed(folder, tmp_path):
    args = files(folder, tmp_path, ROWS)
    assert run("score", *args).exit_code == 0
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(b"".join(lines[:1] + lines[2:]))
    done = run("score", *args)
    assert done.exit_code == 1
    assert "out.jsonl to be as the run left it, but rows from 1 on were changed" in done.stderr
    assert len(read(tmp_path / "out.jsonl")) == 6


def test_folders_of_results_too_have_one_run_and_never_replace_what_is_read(folder, tmp_path):
    out = tmp_path / "out"
    sweep = ["sweep", "--model", folder, "--output", out, "--clean", "a good film", "--corrupted", "a grim film"]
    with locked(out):
        done = run(*sweep)
    assert done.exit_code == 1
    assert "out is being written by process" in done.stderr
    out.mkdir()
    write(out / "sweep.csv", [{"text": "a"}])
    done = run(*sweep, "--mode", "mean", "--baseline", out / "sweep.csv", "--overwrite")
    assert done.exit_code == 1
    assert "other files to be read than written" in done.stderr
    write(out / "report.csv", [{"chosen": "a", "rejected": "b"}])
    done = run("debias", "--model", folder, "--pairs", out / "report.csv", "--output", out)
    assert done.exit_code == 1
    assert "other files to be read than written" in done.stderr


def test_a_sweep_removes_no_file_that_is_not_its_checkpoint(folder, tmp_path):
    sweep = ["sweep", "--model", folder, "--output", tmp_path / "out", "--clean", "a good film"]
    sweep += ["--corrupted", "a grim film", "--overwrite", "--checkpoint", tmp_path / "notes"]
    (tmp_path / "notes").write_text("mine")
    done = run(*sweep)
    assert done.exit_code == 1
    assert "notes to be the checkpoint of a sweep" in done.stderr
    assert (tmp_path / "notes").read_text() == "mine"
    (tmp_path / "notes").unlink()
    device(tmp_path / "notes")
    assert "checkpoint to be a regular file" in run(*sweep).stderr
    assert stat.S_ISCHR((tmp_path / "notes").stat().st_mode)


def test_a_full_disk_is_an_error_that_names_the_file_and_the_run_goes_on_after_it(folder, tmp_path):
    rows = [{"id": i, "text": f"text {i}"} for i in range(40)]
    args = [*files(folder, tmp_path, rows), "--window", 4]
    (tmp_path / "whole").mkdir()
    assert run("score", *files(folder, tmp_path / "whole", rows), "--window", 4).exit_code == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "whole" / "out.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))  # Python ignores the signal: writing more is an error
    try:
        done = run("score", *args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.exit_code == 1
    assert "File too large" in done.stderr
    assert str(tmp_path / "out.jsonl") in done.stderr
    assert run("score", *args).exit_code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole" / "out.jsonl").read_bytes()


def test_a_pipe_with_a_name_is_read_once(folder, rewards, tmp_path):
    os.mkfifo(tmp_path / "in.jsonl")
    feeder = threading.Thread(target=(tmp_path / "in.jsonl").write_bytes, args=[LINES], daemon=True)
    feeder.start()
    args = ["--model", folder, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]
    done = run("score", *args)
    assert done.exit_code == 0, done.output
    assert [row["reward"] for row in read(tmp_path / "out.jsonl")] == pytest.approx(rewards, abs=1e-6)
