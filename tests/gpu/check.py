"""What needs a CUDA GPU, in two calls of at most 400 and 300 seconds, on a machine without a network:

    python tests/gpu/check.py 1 --out DIR
    python tests/gpu/check.py 2 --out DIR --tests test_the_one_that_failed

Each step is a process of its own with a limit of its own, so that none takes the others with it. Figures go to
DIR/rows.jsonl and output to DIR/log.txt as they come, rows of benchmarks to bench/data/ and from there to DIR; the
table comes last. RMFAST_CUDA_LIBRARY names a library that was built elsewhere; without one that loads, the first step
builds it. `--rehearse` runs all of it on the CPU, small: every line that is not a GPU's own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from record import Record, Row  # noqa: E402

LIMITS = {1: 400, 2: 300}  # seconds of a call
DATA = ROOT / "bench" / "data"
MOVERS = "^(reward_head|rms_norm|rotary|gated_activation|patch_rows|neuron_stats|topk_encode|losses)/"
COMPILED = "^(reward_head/rms-bf16|rms_norm/residual-8b-bf16|patch_rows/8b-bf16)$"
REHEARSED = "^(reward_head/rms-bf16|patch_rows/bf16)$"
TESTS = ("tests/ops", "tests/engine/test_gpu_models.py", "tests/training/test_linear_value_loss.py")
LOADS = (
    "from rmfast.backends import why_not; import rmfast.ops, sys; "
    "cause = why_not('suffix_attention', 'cuda', 'cuda'); print(cause or 'loaded'); sys.exit(bool(cause))"
)
BUILDS = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")


@dataclass(frozen=True)
class Step:
    """A command and its limit. `rehearsal`: the command that stands for it without a GPU, None for none."""

    name: str
    seconds: float
    command: tuple[str, ...]
    rehearsal: tuple[str, ...] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    unless: tuple[str, ...] | None = None  # not needed where this command succeeds


def steps(call: int, out: Path, tests: str | None = None) -> list[Step]:
    """The steps of a call, in the order of what matters most."""

    def ours(name: str, seconds: float) -> Step:
        command = (sys.executable, str(HERE / "steps.py"), name, "--out", str(out))
        return Step(name, seconds, command, (*command, "--rehearse"))

    def bench(name: str, seconds: float, only: str, without: str, each: float) -> Step:
        command = (sys.executable, "-m", "bench", "--device")
        given = ("--only", only, "--without", without, "--seconds", str(each), "--no-memory")
        tried = ("--only", REHEARSED, "--without", "compile", "--quick", "--no-save", "--no-memory")
        return Step(name, seconds, (*command, "cuda", *given), (*command, "cpu", *tried))

    def pytest(name: str, seconds: float, *more: str) -> Step:
        # -v: a run that is killed has said by then which tests failed.
        run = (sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "thin", "--thin", "2", *TESTS)
        return Step(name, seconds, (*run, "--maxfail=40", *more), (*run, "--collect-only"), {"PYTHONPATH": str(HERE)})

    def sanitizer(tool: str, seconds: float) -> Step:
        found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        return Step(tool, seconds, (found, "--tool", tool, "--error-exitcode", "9", *SMALL))

    if call == 1:
        built = {"RMFAST_BUILD_EXT": "1", "RMFAST_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": _architecture()}
        return [
            Step("library", 120, BUILDS, None, built, unless=(sys.executable, "-c", LOADS)),
            ours("ceilings", 20),
            ours("agree", 40),
            ours("attention", 50),
            bench("bandwidth", 50, MOVERS, "compile|max-autotune|chunked", 0.3),
            pytest("tests", 110, "-n", "14"),
            ours("model", 60),
            Step("warm", 20, (*SMALL, "cuda", "apart"), (*SMALL, "cpu", "apart")),
            sanitizer("memcheck", 25),
            sanitizer("racecheck", 25),
        ]
    counted = ("--section", "SpeedOfLight", "--section", "Occupancy", "--section", "MemoryWorkloadAnalysis")
    five = ours("kernels", 45)
    ncu = ("ncu", "--clock-control", "none", "--profile-from-start", "off", *counted, "--csv", "--page", "raw")
    return [
        ours("agree", 40),
        pytest("tests", 55, "-n", "14", *(("-k", tests) if tests else ())),
        ours("graphs", 35),
        ours("sweep", 80),
        bench("compile", 45, COMPILED, "max-autotune|chunked", 1),
        Step("kernels", 45, (*ncu, "--log-file", str(out / "ncu.csv"), *five.command), five.rehearsal),
    ]


SMALL = (sys.executable, str(HERE / "small.py"))


def _architecture() -> str:
    """TORCH_CUDA_ARCH_LIST for the GPU at hand, from nvidia-smi: this process does not load torch."""
    said = ""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True).stdout
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or (said.split() or ["9.0"])[0]


def run(step: Step, seconds: float, record: Record, *, rehearsal: bool = False, asks: bool = False) -> bool:
    """Runs a step for at most so long, its output in log.txt; whether it succeeded. A row says how it ended.

    asks: that it fails is an answer, and no row of its own.
    """
    command = step.rehearsal if rehearsal else step.command
    if command is None:
        return True
    # Steps find this checkout and bench's other modules; a rehearsal's Triton kernels run in Triton's interpreter.
    path = os.pathsep.join(filter(None, (step.environment.get("PYTHONPATH"), str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | step.environment | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if rehearsal and command[1:2] == SMALL[1:2]:
        environment["TRITON_INTERPRET"] = "1"
    begin = time.monotonic()
    with (record.path.parent / "log.txt").open("ab") as log:
        log.write(f"\n== {step.name}: {' '.join(command)}\n".encode())
        log.flush()
        at = log.tell()
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            record.add(Row(step.name, "whole", failed=f"{command[0]} does not start: {error.strerror}"))
            return False
        try:
            status = process.wait(timeout=seconds)
            failed = f"exit status {status}" if status else None
        except subprocess.TimeoutExpired:
            failed = f"killed after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it left running, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not (asks and failed):
        record.add(Row(step.name, "whole", time.monotonic() - begin, "s", failed=failed))
    if failed:
        said = (record.path.parent / "log.txt").read_bytes()[at:].decode(errors="replace").splitlines()
        print("\n".join("    " + line[:200] for line in said[-15:]), flush=True)
    return failed is None


def keep_rows(before: Mapping[str, int], out: Path) -> None:
    """Copies what bench/data/ has gained, since of a lent machine only `out` comes back."""
    for path in sorted(DATA.glob("*.jsonl")):
        if path.stat().st_size > before.get(path.name, 0):
            (out / f"bench-{path.name}").write_bytes(path.read_bytes()[before.get(path.name, 0) :])


def check(plan: list[Step], seconds: float, out: Path, *, rehearsal: bool = False) -> int:
    """Runs the steps one after the other and prints the table; 1 where something failed.

    A step gets its own limit, or what is left of `seconds` where that is less.
    """
    record = Record(out)
    before = {path.name: path.stat().st_size for path in DATA.glob("*.jsonl")}
    end = time.monotonic() + seconds
    for step in plan:
        left = end - time.monotonic()
        if left < 1:
            record.add(Row(step.name, "whole", failed=f"not run: the {seconds:.0f} s were over"))
            continue
        if step.unless is not None and not rehearsal:
            there = Step(step.name, min(30, left), step.unless)
            if run(there, there.seconds, record, asks=True):
                continue
            left = end - time.monotonic()
        run(step, min(step.seconds, left), record, rehearsal=rehearsal)
        keep_rows(before, out)
    rows = record.rows()
    table = "\n".join(map(str, rows))
    (out / "table.txt").write_text(table + "\n")
    print(f"\n{table}")
    missed = [row for row in rows if row.verdict.startswith(("FAILED", "MISSED"))]
    print(f"\n{len(rows)} rows, {len(missed)} failed or missed")
    return int(any(row.failed for row in rows))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/gpu/check.py", description=__doc__.splitlines()[0])
    parser.add_argument("call", type=int, choices=LIMITS)
    parser.add_argument("--out", type=Path, required=True, help="a folder for figures, rows and output; made anew")
    parser.add_argument("--tests", metavar="EXPRESSION", help="in call 2: pytest's -k")
    parser.add_argument("--only", metavar="STEP", action="append", help="this step alone; may be given several times")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, small")
    args = parser.parse_args(argv)
    plan = steps(args.call, args.out.resolve(), args.tests)
    unknown = set(args.only or ()) - {step.name for step in plan}
    if unknown:
        parser.error(f"call {args.call} has no step {sorted(unknown)}; its steps: {', '.join(s.name for s in plan)}")
    chosen = [step for step in plan if not args.only or step.name in args.only]
    if args.out.exists():
        (args.out / "rows.jsonl").unlink(missing_ok=True)
        (args.out / "log.txt").unlink(missing_ok=True)
    return check(chosen, LIMITS[args.call], args.out.resolve(), rehearsal=args.rehearse)


if __name__ == "__main__":
    sys.exit(main())
