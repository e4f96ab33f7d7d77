"""Runs over files that were killed, interrupted or finished: they go on, or are refused."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import transformers
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
        (["--invariant"], "invariant"),
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


def test_what_only_shapes_the_work_may_change(folder, tmp_path):
    args, rows = ["--window", 1], [{"text": "a"}, {"text": ""}, {"text": "b"}]
    assert run("score", *files(folder, tmp_path, rows), *args).exit_code == 1
    changed = [
        "--on-error",
        "skip",
        "--engine",
        "padded",
        "--backend",
        "eager",
        "--device",
        "cpu",
        "--batch-tokens",
        64,
    ]
    done = run("score", *files(folder, tmp_path, rows), *changed)
    assert done.exit_code == 0, done.stderr
    assert len(read(tmp_path / "out.jsonl")) == 2


def adapter(base: Path, folder: Path) -> Path:
    """An adapter on the model in a folder, which it names."""
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def test_going_on_with_another_base_of_the_adapter_is_refused(tmp_path):
    base = saved(tmp_path / "base")
    folder = adapter(base, tmp_path / "adapter")
    rows = [{"text": "a"}, {"text": ""}, {"text": "b"}]
    args = [*files(folder, tmp_path, rows), "--window", 1]
    assert "line 2: column 'text' is empty" in run("score", *args).stderr
    before = (tmp_path / "out.jsonl").read_bytes()
    saved(base, seed=1)
    done = run("score", *args, "--on-error", "skip")
    assert done.exit_code == 1
    assert "was begun with base_files" in done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == before
    weights = (base / "model.safetensors").read_bytes()
    (tmp_path / "linked.jsonl").symlink_to(base / "model.safetensors")
    done = run("score", *args, "--output", tmp_path / "linked.jsonl", "--overwrite")
    assert "other files to be read than written" in done.stderr
    assert (base / "model.safetensors").read_bytes() == weights


def test_going_on_with_another_revision_of_an_adapter_on_the_hub_is_refused(tmp_path, monkeypatch):
    """As the hub's cache has it: `main` of some repository, which has moved."""
    base = saved(tmp_path / "base")
    cache = tmp_path / "cache" / "models--some--adapter"
    for commit in ("1" * 40, "2" * 40):
        adapter(base, cache / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.parent))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(cache.parent), raising=False)
    load = rmfast.load
    monkeypatch.setattr(rmfast, "load", lambda path, **kw: load(cache / "snapshots" / ("1" * 40), **kw))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("1" * 40)
    args = [*files(base, tmp_path, [{"text": "a"}, {"text": ""}]), "--window", 1]
    args[1] = "some/adapter"
    assert "line 2: column 'text' is empty" in run("score", *args).stderr
    assert read(tmp_path / "out.jsonl.run.jsonl")[0]["adapter_revision"] == "1" * 40
    (cache / "refs" / "main").write_text("2" * 40)
    assert "was begun with adapter_revision" in run("score", *args, "--on-error", "skip").stderr


def test_a_command_that_failed_at_the_first_row_can_be_corrected(folder, tmp_path):
    args = files(folder, tmp_path, [{"text": "some words"}])
    assert "over --max-length 1;" in run("score", *args, "--max-length", 1).stderr
    assert run("score", *args).exit_code == 0


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
