"""The registry for pytest-benchmark: `pytest bench/test_bench.py -k full --benchmark-autosave`, `--benchmark-compare`.

Ids are device/size/row/contender, with size "quick" (tiny shapes) or "full". One contender is timed after the other
here, not interleaved: for ratios and shares run `python -m bench`.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

from bench import machine
from bench.registry import Benchmark, Problem, benchmarks

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
ROWS = {row.name: row for row in benchmarks()}
CASES = [
    pytest.param(device, size, row.name, label, id=f"{device}/{size}/{row.name}/{label}")
    for device in DEVICES
    for size in ("quick", "full")
    for row in ROWS.values()
    if device in row.devices
    for label in row.contenders()
]


@functools.lru_cache(maxsize=1)
def _problem(device: str, size: str, name: str) -> Problem:
    row, where = ROWS[name], torch.device(device)
    rotate = min(row.rotate, machine.free_memory(where) // 4) if size == "full" else 0
    return row.problem(row.shape if size == "full" else row.quick, where, rotate)


@pytest.mark.parametrize(("device", "size", "name", "label"), CASES)
def test_bench(benchmark: Any, device: str, size: str, name: str, label: str) -> None:
    row: Benchmark = ROWS[name]
    problem = _problem(device, size, name)
    benchmark.group = f"{device}/{size}/{name}"
    torch.compiler.reset()
    inputs = itertools.cycle(problem.inputs)
    with torch.set_grad_enabled(problem.grad):
        function = row.contenders()[label](problem)
        error = problem.error(function(problem.inputs[0]))
        if label != "ours" and not error <= problem.baseline_tolerance:
            pytest.skip(f"its numbers are off by {error:.1e}")
        assert error <= problem.tolerance or label != "ours"

        def call() -> None:
            function(next(inputs))
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark(call)
