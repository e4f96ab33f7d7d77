"""`python -m bench`: runs the rows of the registry, prints them and appends them to bench/data/."""

from __future__ import annotations

import argparse
import re
import sys

import torch

from bench import machine, runner
from bench.registry import benchmarks


def main(argv: list[str] | None = None) -> int:
    """Returns 1 where a check failed, 2 where no row matches; a missed target is only printed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", metavar="REGEX", help="rows whose name matches")
    parser.add_argument("--without", metavar="REGEX", help="leave out contenders whose label matches, such as compile")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does everything run? Saves nothing")
    parser.add_argument("--seconds", type=float, default=20, help="of samples per row (default 20)")
    parser.add_argument("--no-memory", action="store_true", help="don't measure peak memory: two processes for a row")
    parser.add_argument("--no-save", action="store_true", help="don't append to bench/data/")
    parser.add_argument("--commit", help="the commit to record where the tree is no git checkout")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    args = parser.parse_args(argv)

    chosen = [b for b in benchmarks() if args.device in b.devices and (not args.only or re.search(args.only, b.name))]
    if not chosen:
        print(f"No row on {args.device} matches {args.only!r}", file=sys.stderr)
        return 2
    if args.list:
        for b in chosen:
            targets = ", ".join(f"{k} >= {v:g}" for k, v in b.targets.get(args.device, {}).items()) or "report"
            print(f"{b.name:<40} {targets:<44} {', '.join(b.contenders())}")
        return 0

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    about = machine.describe(torch.device(args.device))
    print(", ".join(f"{k} {' '.join(v) if isinstance(v, list) else v}" for k, v in about.items() if v is not None))
    print(", ".join(f"{k} {v}" for k, v in machine.commit().items()))
    rows = []
    for benchmark in chosen:
        row = runner.run(
            benchmark, args.device, quick=args.quick, seconds=args.seconds, without=args.without,
            peaks=not args.no_memory,
        )  # fmt: skip
        print(runner.text(row), flush=True)
        rows.append(row)
        if not (args.no_save or args.quick):
            runner.save([row], args.device, args.commit)

    standing = [row for row in rows if not runner.disturbed(row)]
    missed = [f"{row['benchmark']} {name}" for row in standing for name, met in row["met"].items() if not met]
    failed = [row["benchmark"] for row in rows if row["check"] != "passed"]
    count = sum(len(row["met"]) for row in standing)
    print(f"\n{len(rows)} rows; targets met {count - len(missed)} of {count}")
    for name in missed:
        print(f"  missed: {name}")
    if len(standing) < len(rows):
        print(f"disturbed by other processes: {', '.join(row['benchmark'] for row in rows if runner.disturbed(row))}")
    print("checks: " + (f"FAILED in {', '.join(failed)}" if failed else "all passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
