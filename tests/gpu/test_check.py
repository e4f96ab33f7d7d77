"""The GPU check rehearsed without a GPU: every step's lines on the CPU, and steps that fail, hang or do not start."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import check
import pytest
import steps
import thin
import torch
from record import Record, Row
from torch.autograd import DeviceType

from bench.registry import benchmarks


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-S", "-c", code


@pytest.mark.parametrize("step", ["ceilings", "attention", "model", "graphs", "sweep", "kernels"])
def test_a_step_runs_on_the_cpu(step, tmp_path, capsys):
    assert steps.main([step, "--out", str(tmp_path), "--rehearse"]) == 0
    rows = Record(tmp_path).rows()
    # Triton's kernels, torch's varlen_attn and wgmma have no CPU in which to run.
    failed = {row.name for row in rows if row.failed and not re.search("tiles of 64|varlen|wgmma", row.name)}
    assert rows and failed == set()


def test_the_ops_agree_step_runs_on_the_cpu(tmp_path, monkeypatch, capsys):
    some = [b for b in benchmarks() if b.name in ("reward_head/rms-bf16", "patch_rows/bf16", "losses/tcrm")]
    monkeypatch.setattr(steps, "benchmarks", lambda: some)
    assert steps.main(["agree", "--out", str(tmp_path), "--rehearse"]) == 0
    rows = Record(tmp_path).rows()
    assert len(rows) >= len(some) and all(row.failed is None and row.value <= 1 for row in rows)


def test_a_step_that_fails_hangs_or_does_not_start_takes_no_other_with_it(tmp_path, capsys):
    hangs = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    plan = [
        check.Step("fails", 5, python("print('words of it'); raise SystemExit(3)")),
        check.Step("hangs", 0.5, python(hangs + "time.sleep(60)")),
        check.Step("missing", 5, ("/no/such/program",)),
        check.Step("there", 5, python("raise SystemExit(1)"), unless=python("")),
        check.Step("works", 5, python("print('fine')")),
    ]
    assert check.check(plan, 30, tmp_path) == 1
    rows = {row.step: row for row in Record(tmp_path).rows()}
    assert rows["fails"].failed == "exit status 3" and "killed after" in rows["hangs"].failed
    assert "does not start" in rows["missing"].failed and rows["there"].failed is None and rows["works"].failed is None
    printed = capsys.readouterr().out
    assert "words of it" in printed and printed.strip().endswith("5 rows, 3 failed or missed")
    assert "fine" in (tmp_path / "log.txt").read_text() and "works" in (tmp_path / "table.txt").read_text()


def test_what_has_to_be_built_first_is_no_failure(tmp_path, capsys):
    asks = python("print('no library'); raise SystemExit(1)")
    assert check.check([check.Step("library", 5, python("print('built')"), unless=asks)], 30, tmp_path) == 0
    assert [row.failed for row in Record(tmp_path).rows()] == [None] and "no library" in capsys.readouterr().out


def test_no_step_starts_when_the_time_is_over(tmp_path, capsys):
    check.check([check.Step("late", 5, python(""))], 0.5, tmp_path)
    assert "not run" in Record(tmp_path).rows()[0].failed


@pytest.mark.parametrize("call", check.LIMITS)
def test_the_steps_fit_their_call_and_name_what_there_is(call, tmp_path):
    plan = check.steps(call, tmp_path)
    assert sum(step.seconds for step in plan if step.unless is None) <= check.LIMITS[call]
    names = {row.name: row for row in benchmarks()}
    for step in plan:
        for command in filter(None, (step.command, step.rehearsal)):
            for word in command:
                assert not word.endswith(".py") or (check.ROOT / word).exists(), word
            if "--only" in command:
                device = command[command.index("--device") + 1]
                only = command[command.index("--only") + 1]
                assert [n for n, row in names.items() if re.search(only, n) and device in row.devices], only
            if str(check.HERE / "steps.py") in command:
                assert command[command.index(str(check.HERE / "steps.py")) + 1] in steps.STEPS
    assert len([n for n in names if re.search(check.COMPILED, n)]) == 3


def test_rows_of_benchmarks_come_along(tmp_path, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    out.mkdir()
    (data / "gpu.jsonl").write_text("old\nnew\n")
    (data / "cpu.jsonl").write_text("old\n")
    monkeypatch.setattr(check, "DATA", data)
    check.keep_rows({"gpu.jsonl": 4, "cpu.jsonl": 4}, out)
    assert {path.name: path.read_text() for path in out.iterdir()} == {"bench-gpu.jsonl": "new\n"}


def test_targets_are_lower_bounds_or_negative_upper_ones(tmp_path):
    assert Row("s", "n", 3.0, target=2.0).verdict == "met (at least 2)"
    assert Row("s", "n", 3.0, target=-2.0).verdict == "MISSED (at most 2)"
    record = Record(tmp_path)
    record.add(Row("s", "n", float("nan"), target=2.0))
    assert record.rows()[0].failed == "got nan"


def test_a_few_parameters_of_each_gpu_test_are_kept():
    def item(name: str, file: str, *keywords: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, originalname=name.split("[")[0], path=Path(file), keywords=keywords)

    many = [item(f"test_a[cuda-triton-{i}]", "test_x.py", "gpu") for i in range(50)]
    other = [item(f"test_a[cuda-cuda-{i}]", "test_x.py", "gpu") for i in range(2)]
    cpu = [item(f"test_a[cpu-{i}]", "test_x.py") for i in range(9)]
    triton = [item("test_runs", "test_triton_rows.py"), item("test_kernels_compile", "test_triton_rows.py")]
    wgmma = item("test_b[wgmma-0]", "test_cuda_x.py", "gpu")
    few = thin.kept([wgmma, *many, *cpu, *other, *triton], 3)
    assert [i.name for i in few] == [
        many[0].name, many[24].name, many[49].name, "test_runs", *(i.name for i in other), wgmma.name,
    ]  # fmt: skip


def test_a_worker_that_lost_its_gpu_gives_way_to_another(tmp_path):
    """Here a GPU that each process loses in the first test it runs."""
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text(
        "import thin, torch\ntorch.cuda.is_initialized = lambda: True\n"
        "torch.cuda.synchronize = lambda: (_ for _ in ()).throw(RuntimeError('CUDA error'))\n"
    )
    (tmp_path / "test_x.py").write_text("def test_a(): assert 0, 'said'\ndef test_b(): pass\ndef test_c(): pass\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "thin", "-n", "1", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(check.HERE)}
    out = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True).stdout
    assert "said" in out and "2 passed" in out, out


def test_idle_time_is_what_no_span_covers(tmp_path):
    run = steps.Run("model", Record(tmp_path), torch.device("cpu"), True)
    assert 0 <= steps._idle(run, lambda: torch.randn(200, 200) @ torch.randn(200, 200)) < 1


def test_idle_time_counts_the_device_s_own_spans_alone(tmp_path, monkeypatch):
    def event(kind: DeviceType, end: float) -> SimpleNamespace:
        return SimpleNamespace(device_type=kind, time_range=SimpleNamespace(start=0.0, end=end))

    @contextlib.contextmanager
    def profile(activities):
        yield SimpleNamespace(events=lambda: [event(DeviceType.CPU, 0.0), event(DeviceType.CUDA, 1e12)])

    monkeypatch.setattr(torch.profiler, "profile", profile)
    run = steps.Run("model", Record(tmp_path), torch.device("cpu"), True)
    assert steps._idle(run, lambda: None) == 1
