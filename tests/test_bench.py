"""The benchmark runner on tiny shapes. No time is asserted."""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as cli
from bench import machine, reward_head, runner
from bench.registry import ROTATE, benchmarks

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
CPU_ROWS = [row for row in benchmarks() if "cpu" in row.devices]
ROW = next(row for row in CPU_ROWS if row.name == "reward_head/rms-fp32")


def quick(row, **changes):
    return runner.run(dataclasses.replace(row, **changes), quick=True, without="compile")


def off_by_one_percent(p):
    run = reward_head.hf(p)
    return lambda h: run(h) * 1.01


def broken(p):
    raise RuntimeError("no compiler at /some/path")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", CPU_ROWS, ids=lambda row: row.name)
def test_every_row_runs_and_its_contenders_agree_with_the_truth(row, device):
    result = runner.run(row, device, quick=True, without="compile")
    assert result["check"] == "passed"
    for label, contender in result["contenders"].items():
        assert contender["ms"] > 0, label
        assert contender["samples"] == 2, label
    assert set(result["ratios"]) == {group for group in row.baselines if "compile" not in group}
    assert (result["share"] is None) == (row.limit == {})
    assert runner.text(result).count("\n") > len(result["contenders"])


def test_row_names_are_unique():
    names = [row.name for row in benchmarks()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("row", benchmarks(), ids=lambda row: row.name)
def test_targets_name_baselines_of_the_row(row):
    for device, targets in row.targets.items():
        assert set(targets) <= {*row.baselines, "share"} | ({"memory"} if row.memory else set())
        assert "share" not in targets or device in row.limit


def test_a_wrong_baseline_fails_the_row_and_gets_no_ratio():
    result = quick(ROW, baselines={"HF": {"": off_by_one_percent}})
    assert result["check"].startswith("failed: HF: error")
    assert result["ratios"] == {}


def test_a_wrong_form_does_not_count_beside_a_right_one():
    result = quick(ROW, baselines={"HF": {"wrong": off_by_one_percent, "right": reward_head.hf}})
    assert result["check"] == "passed"
    assert "error" in result["contenders"]["HF: wrong"]["failure"]
    ms = {label: contender["ms"] for label, contender in result["contenders"].items()}
    assert result["ratios"]["HF"] == ms["HF: right"] / ms["ours"]


def test_wrong_numbers_of_ours_fail_the_row_and_give_no_ratio():
    result = quick(ROW, ours=off_by_one_percent)
    assert result["check"].startswith("failed: ours: error")
    assert result["ratios"] == {}
    assert result["share"] is None


def test_nan_and_a_wrong_shape_fail_the_check():
    nan = quick(ROW, baselines={"HF": {"": lambda p: lambda h: reward_head.hf(p)(h) * torch.nan}})
    assert nan["check"] == "failed: HF: error nan > 1.0e-05"
    json.dumps(nan, allow_nan=False)
    assert quick(ROW, baselines={"HF": {"": lambda p: lambda h: h}})["check"].startswith("failed: HF: error inf")


def test_a_baseline_that_cannot_run_fails_the_row_without_its_message():
    result = quick(ROW, baselines={"HF": {"": broken}})
    assert result["check"] == "failed: HF: RuntimeError"
    assert "did not run" in runner.text(result)


def test_contenders_are_timed_interleaved_over_rotating_inputs():
    order = []
    contenders = [runner.Contender(lambda name=name: order.append(name)) for name in "AB"]
    runner.measure(contenders, torch.device("cpu"), 0, rounds=(3, 3), sample_seconds=0)
    assert "".join(order[-6:]) == "ABABAB"
    assert [len(c.samples) for c in contenders] == [3, 3]


@pytest.mark.skipif(machine.busy_seconds() is None, reason="the system does not count CPU time in /proc")
def test_others_cpu_time_leaves_out_this_process_and_its_children():
    spin = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    before = machine.busy_seconds()
    with subprocess.Popen([sys.executable, "-c", spin], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        during = machine.busy_seconds()
        child.communicate(b"\n")
    assert during[1] - before[1] >= 0.45
    assert machine.busy_seconds()[1] >= during[1] - 0.05


def test_rows_that_others_disturbed_say_so_and_count_for_nothing(monkeypatch, capsys):
    assert runner.others_cores((5.0, 1.0), (10.0, 4.0), 10.0) == 0.2
    assert runner.others_cores((5.0, 1.0), (10.0, 6.01), 10.0) == 0
    assert runner.others_cores((5.0, 1.0), (5.0, 6.0), 10.0) is None  # a counter that stands still
    assert runner.others_cores(None, None, 1.0) is None
    row = {**quick(ROW), "quick": False, "met": {"HF": False}, "targets": {"HF": 1.0}}
    for others, told in ((0.1, "disturbed by other processes: reward_head/rms-fp32"), (0.0, "targets met 0 of 1")):
        monkeypatch.setattr(runner, "run", lambda *args, others=others, **options: {**row, "others": others})
        cli.main(["--only", "reward_head/rms-fp32", "--no-save"])
        out = capsys.readouterr().out
        assert told in out
        assert ("DISTURBED: other processes took 0.1 cores" in out) == bool(others)


def test_inputs_are_distinct_memory_of_the_asked_size():
    problem = ROW.problem(ROW.quick, torch.device("cpu"), 1 << 17)
    assert len({h.data_ptr() for h in problem.inputs}) == len(problem.inputs) == (1 << 17) // problem.input_bytes
    assert ROW.rotate == ROTATE >= 1 << 30


def test_rows_of_a_gather_cover_each_token_once():
    row = next(row for row in CPU_ROWS if row.name == "reward_head/rows-bf16")
    problem = row.problem(row.quick, torch.device("cpu"), 0)
    rows = torch.cat([rows for _, rows in problem.inputs])
    assert rows.sort().values.tolist() == list(range(row.quick["texts"] * row.quick["tokens"]))


def test_saved_rows_have_machine_versions_commit_and_date_and_nothing_private(tmp_path):
    path = runner.save([quick(ROW)], "cpu", folder=tmp_path)
    assert runner.save([quick(ROW)], "cpu", folder=tmp_path) == path
    line, _ = path.read_text().splitlines()
    row = json.loads(line)
    assert {
        "date",
        "commit",
        "dirty",
        "machine",
        "benchmark",
        "shape",
        "device",
        "backends",
        "check",
        "contenders",
        "others",
    } <= set(row)
    assert {"ratios", "targets", "met", "limits", "limit", "share", "rotated_bytes", "bytes", "flops"} <= set(row)
    assert {"cpu", "isa", "cores", "threads", "torch", "triton", "transformers"} <= set(row["machine"])
    assert platform.node() not in line
    assert str(machine.ROOT) not in line
    assert str(Path.home()) not in line


def test_peak_memory_and_its_target_may_be_left_out(monkeypatch):
    monkeypatch.setattr(runner, "measure", lambda timed, *_: [contender.samples.append(1.0) for contender in timed])
    shape, target = {**ROW.quick, "n": 8}, {"cpu": {"memory": 0.5, "HF": 0.1}}
    row = dataclasses.replace(ROW, shape=shape, memory="HF", targets=target, rotate=0, limit={})
    result = runner.run(row, without="compile", peaks=False)
    assert result["memory"] is None and result["met"] == {"HF": True}
    assert "peak memory" not in runner.text(result)


def test_commit_is_recorded_where_the_tree_is_no_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    path = runner.save([quick(ROW)], "cpu", commit="abc", folder=tmp_path / "data")
    assert json.loads(path.read_text())["commit"] == "abc"


def test_command_exits_1_where_a_check_fails_and_2_where_no_row_matches(monkeypatch, capsys):
    assert cli.main(["--quick", "--only", "no such row"]) == 2
    wrong = dataclasses.replace(ROW, baselines={"HF": {"": off_by_one_percent}})
    monkeypatch.setattr(cli, "benchmarks", lambda: [wrong])
    assert cli.main(["--quick"]) == 1
    monkeypatch.setattr(cli, "benchmarks", lambda: [ROW])
    assert cli.main(["--quick", "--without", "compile"]) == 0
    assert "checks: FAILED in reward_head/rms-fp32" in capsys.readouterr().out
