"""Peak memory of a benchmark's contender, in a process of its own: `python -m bench.memory NAME CONTENDER DEVICE`."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.registry import benchmarks


def measured(name: str, label: str, device: str) -> int:
    """Bytes that a call takes beyond what stood before it and `Problem.output_bytes`.

    Resident memory on a CPU, PyTorch's allocations on a GPU.

    Raises subprocess.CalledProcessError where the contender fails.
    """
    command = [sys.executable, "-m", "bench.memory", name, label, device]
    done = subprocess.run(command, cwd=machine.ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _peak(call: Any, given: Any, device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(given)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what was freed while the problem was built does not count as taken
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    call(given)
    return _status("VmHWM") - before


def main(name: str, label: str, kind: str) -> None:
    benchmark = next(b for b in benchmarks() if b.name == name)
    device = torch.device(kind)
    problem = benchmark.problem(benchmark.shape, device, 0)
    with torch.set_grad_enabled(problem.grad):
        call = benchmark.contenders()[label](problem)
        print(_peak(call, problem.memory_input(), device) - problem.output_bytes)


if __name__ == "__main__":
    main(*sys.argv[1:])
