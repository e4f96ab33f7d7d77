"""Times a benchmark's contenders interleaved in one process, checks their numbers, and writes rows.

A ratio is printed only over baselines whose numbers agree with the truth in the same run; where ours do not, or no
form of a baseline does, the row fails.
"""

from __future__ import annotations

import datetime
import gc
import itertools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import rmfast
from bench import machine, memory
from bench.registry import Benchmark

DATA = Path(__file__).parent / "data"

# Cores' worth of others' work above which times don't stand; a quiet machine's background stays below 0.02.
DISTURBED = 0.06

# A sample is one call, or as many calls as take this long, so that neither the clock nor a thread that went to
# sleep during the contender before weighs in.
SAMPLE_SECONDS = 0.02
SLOW_SECONDS = 4  # a call this long needs no warm-up beyond it: the checked run is its first sample
PROBE_BYTES = 5 << 28  # 1.25 GiB


@dataclass
class Contender:
    """One timed form: its call, how many calls make a sample, milliseconds per call of each sample."""

    call: Callable[[], Any]
    work: int = 0  # bytes or FLOPs of a call, for a probe
    error: float | None = None
    failure: str | None = None
    repeats: int = 1
    scale: float = 1  # of a call that does a sample of the work: what all of it would take
    samples: list[float] = field(default_factory=list)

    @property
    def ms(self) -> float:
        return statistics.median(self.samples)


def _sample(contender: Contender, device: torch.device) -> float:
    """Milliseconds per call."""
    call, repeats = contender.call, contender.repeats
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats * contender.scale
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) * 1e3 / repeats * contender.scale


def measure(
    contenders: Iterable[Contender],
    device: torch.device,
    seconds: float,
    rounds: tuple[int, int],
    sample_seconds: float = SAMPLE_SECONDS,
) -> None:
    """Fills the samples, A B C A B C ..., for about `seconds` and at least rounds[0], at most rounds[1] each."""
    contenders = list(contenders)
    for contender in contenders:
        if contender.samples:
            continue
        contender.call()
        call_ms = _sample(contender, device) / contender.scale
        contender.repeats = max(1, min(1000, int(sample_seconds * 1e3 / max(call_ms, 1e-3))))
    gc.collect()
    gc.disable()
    try:
        begin = time.monotonic()
        for done in range(rounds[1]):
            if done >= rounds[0] and time.monotonic() - begin > seconds:
                break
            for contender in contenders:
                contender.samples.append(_sample(contender, device))
    finally:
        gc.enable()


def _checked(maker: Callable, problem: Any, calls: Any, tolerance: float) -> Contender:
    """A contender, run once on inputs[0] against the truth; what it raises is its failure."""
    try:
        function = maker(problem)
        begin = time.perf_counter()
        out = function(problem.inputs[0])
        seconds = time.perf_counter() - begin
        error = problem.error(out)
    except Exception as raised:  # a baseline may not run here at all, such as torch.compile without a compiler
        print(f"{type(raised).__name__}: {raised}", file=sys.stderr)
        return Contender(lambda: None, failure=type(raised).__name__)  # its message may hold paths
    contender = Contender(lambda: function(next(calls)), error=error, scale=getattr(function, "scale", 1))
    if not error <= tolerance:
        contender.failure = f"error {error:.1e} > {tolerance:.1e}"
    if seconds > SLOW_SECONDS:
        contender.samples.append(seconds * 1e3 * contender.scale)
    return contender


def run(
    benchmark: Benchmark,
    device: str = "cpu",
    *,
    quick: bool = False,
    seconds: float = 20,
    without: str | None = None,
    peaks: bool = True,
) -> dict[str, Any]:
    """Runs one benchmark and returns its row, ready for JSON.

    Args:
        benchmark: the row of the registry.
        device: "cpu" or "cuda".
        quick: tiny shapes and two rounds, to see that everything runs; the times mean nothing.
        seconds: time spent on samples, after the checks and `torch.compile`; at least five rounds are run.
        without: leaves out contenders whose label matches this regular expression; ours always runs.
        peaks: whether peak memory is measured, where the benchmark has it: two processes more.

    Returns:
        "check" is "passed" or what failed; "contenders" holds each one's median and quartiles in ms, error and, where
        its numbers failed, why; "ratios" the fastest passing form of each baseline over ours; "share" ours of the
        limit; "met" each target's outcome; "others" how many of its cores other processes took.
    """
    where = torch.device(device)
    torch.compiler.reset()  # else earlier rows count towards torch.compile's limit on versions of a function
    free = machine.free_memory(where)
    shape = benchmark.quick if quick else benchmark.shape
    problem = benchmark.problem(shape, where, min(benchmark.rotate, 1 << 15 if quick else free // 4))
    # One counter for all: what a contender has just read is not what the next one reads.
    calls = itertools.cycle(problem.inputs)

    with torch.set_grad_enabled(problem.grad):
        contenders = {
            label: _checked(maker, problem, calls, problem.tolerance if label == "ours" else problem.baseline_tolerance)
            for label, maker in benchmark.contenders().items()
            if label == "ours" or not (without and re.search(without, label))
        }
        probed: dict[str, tuple[int, Callable]] = {}
        if benchmark.limit:
            probed |= machine.bandwidth_probes(where, 1 << 20 if quick else min(PROBE_BYTES, free // 8))
            if problem.gemm is not None:
                probed |= machine.gemm_probes(where, problem.gemm, problem.dtype)
        probes = {label: Contender(call, work) for label, (work, call) in probed.items()}
        running = [c for c in contenders.values() if c.error is not None]
        timed = [*running, *probes.values()]
        begin, busy = time.monotonic(), machine.busy_seconds()
        if quick:
            measure(timed, where, 0, (2, 2), sample_seconds=0)
        else:
            measure(timed, where, seconds, benchmark.rounds)
        others = others_cores(busy, machine.busy_seconds(), time.monotonic() - begin)

    row: dict[str, Any] = {
        "benchmark": benchmark.name,
        "shape": dict(shape),
        "device": where.type,
        "quick": quick,
        "backends": {choice.op: choice.runs for choice in rmfast.explain(device=where.type)},
        "check": "passed",
        "contenders": {label: _summary(contender) for label, contender in contenders.items()},
        "ratios": {},
        "rotated_bytes": len(problem.inputs) * problem.input_bytes,
        "bytes": problem.bytes_moved,
        "flops": problem.flops,
        "facts": dict(problem.facts),
        "others": others,
    }
    failures = []
    ours = contenders["ours"]
    if ours.failure:
        failures.append(f"ours: {ours.failure}")
    for group, forms in benchmark.baselines.items():
        labels = [f"{group}: {form}" if form else group for form in forms]
        present = [contenders[label] for label in labels if label in contenders]
        passing = [c.ms for c in present if not c.failure]
        if present and not passing:
            failures.append(f"{group}: {present[0].failure}")
        if passing and not ours.failure:
            row["ratios"][group] = min(passing) / ours.ms
    if failures:
        row["check"] = "failed: " + "; ".join(failures)

    row["limits"] = _limits(probes)
    kind = benchmark.limit.get(where.type)
    row["limit"] = kind
    row["share"] = None
    if kind and not ours.failure:
        work = problem.flops if kind == "gemm" else problem.bytes_moved
        row["share"] = work / (ours.ms / 1e3) / row["limits"][kind]
    row["memory"] = None
    if benchmark.memory and peaks and not quick:
        taken = {label: memory.measured(benchmark.name, label, where.type) for label in ("ours", benchmark.memory)}
        row["memory"] = taken | {"share": taken["ours"] / taken[benchmark.memory]}
    reached = row["ratios"] | {"share": row["share"]}
    targets = {} if quick else benchmark.targets.get(where.type, {})
    targets = {name: bound for name, bound in targets.items() if not _left_out(name, row)}
    row["targets"] = targets
    row["met"] = {name: (reached.get(name) or 0) >= least for name, least in targets.items() if name != "memory"}
    if "memory" in targets:
        row["met"]["memory"] = row["memory"]["share"] <= targets["memory"]
    return row


def others_cores(before: tuple[float, float] | None, after: tuple[float, float] | None, seconds: float) -> float | None:
    """How many cores' worth of this process' cores others took meanwhile; None where the system does not count."""
    if before is None or after is None:
        return None
    busy, own = after[0] - before[0], after[1] - before[1]
    return None if busy < own / 2 else round(max(0.0, busy - own) / seconds, 3)


def disturbed(row: dict[str, Any]) -> bool:
    """Whether other processes took so much that the row's times don't stand."""
    return not row["quick"] and (row["others"] or 0) > DISTURBED


def _left_out(group: str, row: dict[str, Any]) -> bool:
    if group == "memory":
        return row["memory"] is None
    return group != "share" and not any(label.split(":")[0] == group for label in row["contenders"])


def _summary(contender: Contender) -> dict[str, Any]:
    out: dict[str, Any] = {"error": contender.error if math.isfinite(contender.error or 0) else str(contender.error)}
    if contender.samples:
        samples = contender.samples * 2 if len(contender.samples) == 1 else contender.samples
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        out |= {"ms": contender.ms, "quartiles_ms": [low, high], "samples": len(contender.samples)}
    if contender.failure:
        out["failure"] = contender.failure
    return out


def _limits(probes: dict[str, Contender]) -> dict[str, float]:
    """Bytes/s or FLOP/s by kind ("read", "copy", "gemm"), the best of its probes, and each probe's own."""
    rates = {label: probe.work / (probe.ms / 1e3) for label, probe in probes.items()}
    best: dict[str, float] = {}
    for label, rate in rates.items():
        kind = label.split(":")[0]
        best[kind] = max(rate, best.get(kind, 0))
    return best | rates


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.3f}"


def text(row: dict[str, Any]) -> str:
    """A row for reading: a line per contender, then the machine's limits and the check."""
    shape = ", ".join(f"{k} {v}" for k, v in row["shape"].items())
    work = row["benchmark"].split("/")[0]
    own = {op: name for op, name in row["backends"].items() if op.startswith(work)} or row["backends"]
    chosen = ", ".join(f"{op} {name}" for op, name in own.items())
    lines = [f"\n{row['benchmark']}  ({shape}) on {row['device']}: {chosen}"]
    lines.append(f"  {'contender':<28}{'median ms':>11}{'quartiles':>20}{'error':>10}{'vs ours':>9}")
    ours = row["contenders"]["ours"].get("ms")
    for label, c in row["contenders"].items():
        if "ms" not in c:
            lines.append(f"  {label:<28}  did not run: {c['failure']}")
            continue
        quartiles = " .. ".join(map(_ms, c["quartiles_ms"]))
        ratio = f"{c['ms'] / ours:.2f}x" if ours else ""
        note = f"  not counted: {c['failure']}" if "failure" in c else ""
        lines.append(f"  {label:<28}{_ms(c['ms']):>11}{quartiles:>20}{float(c['error']):>10.1e}{ratio:>9}{note}")
    lines += [f"  {name}: {value:.4g}" for name, value in row["facts"].items()]
    for name, rate in row["limits"].items():
        if ":" in name or name == "copy":
            unit = "GFLOP/s" if name.startswith("gemm") else "GB/s"
            lines.append(f"  {'limit, ' + name:<28}{rate / 1e9:>11.4g} {unit}")
    for name, value in (row["ratios"] | ({"share": row["share"]} if row["share"] else {})).items():
        shown = f"{value:.0%} of the {row['limit']} limit" if name == "share" else f"{value:.2f}x {name}"
        target = ""
        if name in row["targets"]:
            least = row["targets"][name]
            least_shown = f"{least:.0%}" if name == "share" else f"{least:g}x"
            target = f", target {least_shown}: {'met' if row['met'][name] else 'MISSED'}"
        lines.append(f"  -> {shown}{target}")
    if row["memory"]:
        shown = ", ".join(
            f"{label} {size / 2**20:.0f} MiB" for label, size in row["memory"].items() if label != "share"
        )
        most = row["targets"].get("memory")
        target = "" if most is None else f", target at most {most}: {'met' if row['met']['memory'] else 'MISSED'}"
        lines.append(f"  -> peak memory {shown}: {row['memory']['share']:.2f}x{target}")
    if disturbed(row):
        lines.append(f"  DISTURBED: other processes took {row['others']:g} cores; measure on a quiet machine")
    lines.append(f"  check {row['check']}")
    return "\n".join(lines)


def save(rows: Iterable[dict[str, Any]], device: str, commit: str | None = None, folder: Path = DATA) -> Path:
    """Appends rows to <folder>/<machine kind>.jsonl with machine, versions, commit and date; returns the file.

    `commit` stands in where the tree is no git checkout.
    """
    about = machine.describe(torch.device(device))
    git = machine.commit()
    if git["commit"] is None:
        git["commit"] = commit
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{machine.kind(about)}.jsonl"
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps({"date": date, **git, "machine": about, **row}, allow_nan=False) + "\n")
    return path
