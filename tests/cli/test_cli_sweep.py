"""`rmfast sweep`: two texts in, a folder with result, table and heat map out."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import shell
import torch
from shell import saved

import rmfast
from rmfast.patching.grid import PatchSweep

CLEAN, CORRUPTED = "a good film", "a grim film"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with one label and a chat template."""
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rm(folder: Path) -> rmfast.RewardModel:
    return rmfast.load(folder)


def run(folder: Path, output: Path, *args: Any, pair: bool = True) -> Any:
    texts = ["--clean", CLEAN, *(["--corrupted", CORRUPTED] if pair else [])]
    given = ["sweep", "--model", folder, "--output", output, *texts, *args]
    return shell.run(*given)


def equal(folder: Path, expected: PatchSweep) -> bool:
    """Whether the result in a folder is that of the library."""
    got = PatchSweep.load(folder)
    assert (got.axes, got.coords, got.mode) == (expected.axes, expected.coords, expected.mode)
    return torch.equal(got.rewards.nan_to_num(9e9), expected.rewards.nan_to_num(9e9))


def test_a_sweep_writes_result_table_and_heat_map(folder, rm, tmp_path):
    pytest.importorskip("matplotlib")
    done = run(folder, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "sweep.safetensors", "sweep.json", "sweep.csv", "sweep.png"
    }  # fmt: skip
    expected = rm.patch_sweep(CLEAN, CORRUPTED)
    assert equal(tmp_path / "out", expected)
    with (tmp_path / "out" / "sweep.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["effect"]) for row in rows] == expected.effect.flatten().tolist()
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_rewards_and_the_strongest_sites_are_printed(folder, rm, tmp_path):
    done = run(folder, tmp_path, "--top", 3)
    expected = rm.patch_sweep(CLEAN, CORRUPTED)
    base, count, names, *sites = done.stdout.splitlines()
    low, high = expected.corrupted_reward.item(), expected.clean_reward.item()
    assert base == f"base reward (corrupted text) {low:.4f}  other reward (clean text) {high:.4f}"
    assert count.startswith(f"sites run {expected.run}  without effect {expected.without_effect}")
    assert names.split()[-4:] == ["token", "reward", "effect", "recovered"]
    assert [float(line.split()[-1]) for line in sites] == [round(row.recovered, 4) for row in expected.top(3)]


def test_options_reach_the_sweep(folder, rm, tmp_path):
    args = ["--mode", "noising", "--sites", "head_out,q", "--layers", "0-1", "--positions", "3,5-7", "--heads", "1,3"]
    done = run(folder, tmp_path, *args)
    assert done.exit_code == 0, done.output
    expected = rm.patch_sweep(
        CLEAN, CORRUPTED, mode="noising", sites=["head_out", "q"], layers=[0, 1], positions=[3, [5, 6, 7]], heads=[1, 3]
    )
    assert equal(tmp_path, expected)


def test_both_texts_respond_to_the_prompt(folder, rm, tmp_path):
    assert run(folder, tmp_path, "--prompt", "how was it?", "--positions", "joint").exit_code == 0
    expected = rm.patch_sweep(("how was it?", CLEAN), ("how was it?", CORRUPTED), positions="joint")
    assert equal(tmp_path, expected)


def test_a_text_may_be_in_a_file(folder, rm, tmp_path):
    (tmp_path / "clean.txt").write_bytes("größer\r\n".encode())
    args = ["--clean", f"@{tmp_path / 'clean.txt'}", "--positions", "joint"]
    assert run(folder, tmp_path / "out", *args).exit_code == 0
    assert equal(tmp_path / "out", rm.patch_sweep("größer", CORRUPTED, positions="joint"))


@pytest.mark.parametrize("mode", ["mean", "resample"])
def test_baseline_texts_come_from_a_file(folder, rm, tmp_path, mode):
    rows = [{"text": "one"}, {"prompt": "q", "response": "two"}, {"messages": [{"role": "user", "content": "three"}]}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["--mode", mode, "--baseline", tmp_path / "texts.jsonl", "--seed", 3]
    done = run(folder, tmp_path / "out", *args, pair=False)
    assert done.exit_code == 0, done.output
    assert "other reward" not in done.stdout
    baseline = ["one", ("q", "two"), rows[2]["messages"]]
    assert equal(tmp_path / "out", rm.patch_sweep(CLEAN, mode=mode, baseline=baseline, seed=3))


def test_only_the_screened_sites_are_run(folder, rm, tmp_path):
    done = run(folder, tmp_path, "--screen", 4)
    assert done.exit_code == 0, done.output
    assert "sites run 4" in done.stdout
    assert "Spearman" in done.stdout
    assert equal(tmp_path, rm.patch_sweep(CLEAN, CORRUPTED, screen="atp", top=4))


def test_a_model_of_several_labels_prints_and_draws_each(tmp_path):
    pytest.importorskip("matplotlib")
    done = run(saved(tmp_path / "model", labels=2), tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert re.match(r"base reward \(corrupted text\) \S+ \S+  other reward \(clean text\) \S+ \S+\n", done.stdout)
    assert (tmp_path / "out" / "sweep.png").exists()


def test_unequal_texts_report_positions_without_a_partner(folder, tmp_path):
    done = run(folder, tmp_path, "--corrupted", "a truly grim film")
    assert done.exit_code == 0, done.output
    assert "positions without a partner" in done.stdout
    with (tmp_path / "sweep.csv").open(newline="") as file:
        assert any(row["reward"] == "" for row in csv.DictReader(file))


def test_an_interrupted_sweep_goes_on_where_it_stopped(folder, rm, tmp_path, monkeypatch):
    sweep = rmfast.RewardModel.patch_sweep
    seen = []

    def stopped(self: Any, *texts: Any, **kw: Any) -> Any:
        seen.append(kw["checkpoint"])
        Path(kw["checkpoint"]).parent.mkdir(exist_ok=True)
        sweep(self, *texts, **kw)
        raise KeyboardInterrupt

    monkeypatch.setattr(rmfast.RewardModel, "patch_sweep", stopped)
    done = run(folder, tmp_path / "out")
    assert done.exit_code == 130
    assert "the same command goes on" in done.stderr
    assert seen[0].exists()
    monkeypatch.setattr(rmfast.RewardModel, "patch_sweep", sweep)
    assert run(folder, tmp_path / "out").exit_code == 0
    assert not seen[0].exists()
    assert equal(tmp_path / "out", rm.patch_sweep(CLEAN, CORRUPTED))


def test_a_checkpoint_of_the_users_own_is_kept(folder, tmp_path):
    assert run(folder, tmp_path / "out", "--checkpoint", tmp_path / "kept").exit_code == 0
    assert (tmp_path / "kept").exists()


def test_a_folder_with_a_sweep_is_replaced_only_when_asked(folder, tmp_path):
    assert run(folder, tmp_path, "--layers", 0).exit_code == 0
    done = run(folder, tmp_path)
    assert done.exit_code == 1
    assert "--overwrite" in done.stderr
    assert run(folder, tmp_path, "--overwrite").exit_code == 0
    assert PatchSweep.load(tmp_path).coords["layer"] == [0, 1]


def test_without_matplotlib_all_but_the_heat_map_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run(folder, tmp_path)
    assert done.exit_code == 0
    assert "no sweep.png: " in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.safetensors", "sweep.json", "sweep.csv"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--corrupted", CLEAN], "differ"),
        (["--corrupted", "@nowhere.txt"], "nowhere.txt"),
        (["--sites", "residual"], "residual"),
        (["--layers", "7"], "layers"),
        (["--positions", "3;5"], "Expected --positions to be numbers and spans like 3,5,7-9, got '3;5'"),
        (["--positions", "0-999999999999"], "Expected spans of --positions to hold at most 1000000 numbers"),
        (["--positions", "99"], "positions"),
        (["--corrupted", "a grim old film", "--align", "strict"], "strict"),
        (["--mode", "mean"], "baseline"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(folder, tmp_path, args, message):
    done = run(folder, tmp_path / "out", *args)
    assert done.exit_code == 1
    last = done.stderr.splitlines()[-1]  # transformers draws a bar before it
    assert last.startswith("rmfast: ")
    assert message in last
    assert not (tmp_path / "out").exists()


def test_a_bad_baseline_row_is_named(folder, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n{"other": "b"}\n')
    done = run(folder, tmp_path / "out", "--mode", "mean", "--baseline", tmp_path / "texts.jsonl", pair=False)
    assert done.exit_code == 1
    assert "texts.jsonl, line 2: column 'text' is missing" in done.stderr


def test_the_command_runs_as_a_program(folder, tmp_path):
    texts = ["--clean", CLEAN, "--corrupted", CORRUPTED]
    command = [sys.executable, "-m", "rmfast", "sweep", "--model", folder, "--output", tmp_path / "out", *texts]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("base reward (corrupted text) ")
