"""The machine that a row was measured on, and probes of its limits."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
_ISA = re.compile(r"avx2|fma|f16c|avx512\w*|avx_vnni|amx_\w+|neon|asimd\w*|sve\w*|bf16")


def _proc(path: str) -> dict[str, str]:
    """The first value of each key of a "key : value" file, as /proc/cpuinfo is; empty where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in reversed(lines))
    return {key.strip(): value.strip() for key, _, value in pairs}


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(device: torch.device) -> dict[str, Any]:
    """CPU or GPU model, instruction sets, cores, threads and versions; no host name and no path."""
    cpu = _proc("/proc/cpuinfo")
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    out: dict[str, Any] = {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cpu_family": cpu.get("cpu family"),
        "cpu_model": cpu.get("model"),
        "isa": sorted(flag for flag in flags if _ISA.fullmatch(flag)),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        out |= {
            "gpu": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "gpu_memory_gib": round(gpu.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": driver.splitlines()[0] if driver else None,
        }
    return out


def kind(machine: dict[str, Any]) -> str:
    """The name of the machine's file in bench/data/: its GPU, or its CPU and number of cores."""
    name = machine.get("gpu") or f"{machine['cpu']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> dict[str, Any]:
    """The commit and whether the tree differs from it, benchmark data aside; {"commit": None, ...} outside git."""
    changes = _output("git", "status", "--porcelain", "--", ".", ":!bench/data")
    return {"commit": _output("git", "rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def _own_seconds(process: Path) -> float:
    """CPU seconds of a process and of its children, the ended ones too."""
    times = (process / "stat").read_text().rpartition(")")[2].split()[11:15]
    seconds = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
    for child in " ".join(path.read_text() for path in process.glob("task/*/children")).split():
        with contextlib.suppress(OSError):  # it has ended since
            seconds += _own_seconds(Path("/proc", child))
    return seconds


def busy_seconds() -> tuple[float, float] | None:
    """CPU seconds that the cores of this process have been busy (what a virtual machine's host took too), and those of
    this process and its children; None where the system does not say."""
    try:
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        user_to_steal = [list(map(int, times[:8])) for name, *times in lines if name in cores]
        idle = sum(times[3] + times[4] for times in user_to_steal)
        busy = (sum(map(sum, user_to_steal)) - idle) / os.sysconf("SC_CLK_TCK")
        return busy, _own_seconds(Path("/proc/self"))
    except (OSError, AttributeError, ValueError):
        return None


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = _proc("/proc/meminfo").get("MemAvailable")
    return int(available.split()[0]) << 10 if available else 8 << 30


def bandwidth_probes(device: torch.device, size: int) -> dict[str, tuple[int, Callable[[], Any]]]:
    """{"read: how" or "copy": (bytes moved by a call, call)} over `size` bytes of the device's memory.

    A read is measured in several ways, of which the fastest counts: which of PyTorch's reductions comes nearest to
    the memory's speed differs between machines.
    """
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    matrix = source[: source.numel() // 2048 * 2048].view(-1, 2048)
    vector = torch.ones(2048, device=device)
    count = source.numel() * 4
    return {
        "read: sum": (count, source.sum),
        "read: max": (count, source.max),
        "read: dot": (count, lambda: torch.dot(source, source)),
        "read: gemv": (matrix.numel() * 4, lambda: matrix @ vector),
        "copy": (2 * count, lambda: target.copy_(source)),
    }


def gemm_probes(
    device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype
) -> dict[str, tuple[int, Callable[[], Any]]]:
    """{"gemm: dtype": (FLOPs of a call, call)} at (m, n, k), in the workload's dtype and in fp32."""

    def probe(kind: torch.dtype) -> Callable[[], Any]:
        a, b = torch.ones(m, k, dtype=kind, device=device), torch.ones(n, k, dtype=kind, device=device)
        return lambda: a @ b.T

    m, n, k = shape
    kinds = dict.fromkeys((dtype, torch.float32))
    return {f"gemm: {str(kind).removeprefix('torch.')}": (2 * m * n * k, probe(kind)) for kind in kinds}
