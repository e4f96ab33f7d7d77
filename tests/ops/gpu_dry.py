"""`make gpu-dry`: what is known of the Triton kernels without a GPU, read off the machine code of their own launches.

Compiles every case of gpu_cases.py and prints a line for each kernel: registers, shared memory, programs on a
multiprocessor, instructions, those of the innermost loops, the loads' widths and the matrix products. A kernel must not
spill, must fit, must not load elements of 8 or 16 bits one by one where rows are aligned, nor have several warps
compute the same part of a product, nor use HGMMA narrower than its op allows; and its counts must stay within
`kernels/<op>/sass.json`, which `--write` writes anew, so that a change shows in review.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

import triton
from aot import SHARED, Compiled, build, launches
from gpu_cases import CASES

KERNELS = Path(__file__).parents[2] / "kernels"
SM = {
    80: (65536, 2048, 164),
    90: (65536, 2048, 228),
    100: (65536, 2048, 228),
}  # registers, threads, KiB of shared memory
# A skinny product of few dots is bound by the rows that it reads.
LEAST_COLUMNS = {"reward_head": 16}
# What starts anywhere in a row, goes down columns, or does so for the seldom row that cancels.
UNALIGNED = {
    ("tcrm", "_forward"),
    ("neuron_stats", "_neuron_stats"),
    ("reward_head", "_finish"),
    ("reward_head", "_finish_all"),
}
VERSION = "triton"


def compiled(op: str, case: str, capability: int, folder: Path) -> Iterator[tuple[str, Compiled]]:
    """The kernels of a case by the names that their budgets have."""
    found: dict[str, int] = {}
    for launch in launches(CASES[op][case], capability):
        got = build(launch, capability, folder)
        kernel = got.name.split()[0]
        found[kernel] = found.get(kernel, 0) + 1
        yield f"{case}: {kernel}{'' if found[kernel] == 1 else found[kernel]} sm_{capability}", got


def counts(got: Compiled) -> dict[str, int | list[int]]:
    """What a budget holds: instructions, those of each innermost loop, registers, and loads narrower than 64 bits."""
    narrow = sum(count for bits, count in got.code.loads().items() if bits < 64)
    loops = [len(loop) for loop in got.code.loops]
    return {"instructions": len(got.code.instructions), "loops": loops, "registers": got.registers, "narrow": narrow}


def faults(op: str, got: Compiled) -> list[str]:
    """What is wrong with a kernel, whatever its budget."""
    found = got.faults(LEAST_COLUMNS.get(op, 32))
    if got.spills:
        found.append(f"{got.spills} spills")
    if (op, got.name.split()[0]) not in UNALIGNED and (
        single := sum(count for bits, count in got.code.loads().items() if bits < 32)
    ):
        found.append(f"{single} loads of single elements")
    return found


def budgets(op: str) -> dict:
    path = KERNELS / op / "sass.json"
    return json.loads(path.read_text()) if path.exists() else {}


def over(now: dict, budget: dict | None) -> list[str]:
    """Which counts are above their budget."""
    if budget is None:
        return ["no budget"]
    found = [f"{name} {now[name]} > {budget[name]}" for name in ("instructions", "registers", "narrow")
             if now[name] > budget[name]]  # fmt: skip
    if len(now["loops"]) != len(budget["loops"]) or any(a > b for a, b in zip(now["loops"], budget["loops"])):
        found.append(f"loops {now['loops']} against {budget['loops']}")
    return found


def programs(got: Compiled) -> int:
    """Programs that fit on a multiprocessor at once."""
    registers, threads, shared = SM[got.capability]
    each = got.warps * 32
    by_shared = shared * 1024 // (got.shared + 1024)
    return min(registers // ((got.registers + 7) // 8 * 8 * each), threads // each, by_shared, 32)


def line(name: str, got: Compiled) -> str:
    now, code = counts(got), got.code
    widths = " ".join(f"{count}x{bits}" for bits, count in sorted(code.loads().items()))
    products = sorted(set(re.findall(r"\b(?:HGMMA\.64x\d+x\d+|HMMA\.\d+|UTC\w*MMA|DMMA)", got.sass)))
    return (
        f"{name} | {now['registers']} registers, {got.warps} warps, {got.shared} B shared, {programs(got)} a SM | "
        f"{now['instructions']} instructions, loops {now['loops']} | loads {widths} | {' '.join(products)}"
    )


def write(op: str, made: dict) -> None:
    """One line for each kernel, so that a diff shows which one changed."""
    rows = [f"  {json.dumps(VERSION)}: {json.dumps(triton.__version__)}"]
    rows += [f"  {json.dumps(name)}: {json.dumps(made[name])}" for name in sorted(made) if name != VERSION]
    (KERNELS / op / "sass.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")


def left_out(name: str, cases: Collection[str], some: Collection[str], sm: Collection[int]) -> bool:
    """Whether a budget is of a case that is not compiled now."""
    case, _, kernel = name.partition(": ")
    return case in cases and (case not in some or int(kernel.rpartition("_")[2]) not in sm)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="a regular expression on 'op case'")
    parser.add_argument("--sm", type=int, nargs="+", default=list(SHARED), choices=list(SHARED))
    parser.add_argument("--write", action="store_true", help="write the budgets anew")
    parser.add_argument("--out", type=Path, help="a folder for the SASS and TTGIR of each kernel")
    given = parser.parse_args(arguments)
    wrong = 0
    for op, cases in CASES.items():
        known = budgets(op)
        same = known.get(VERSION) == triton.__version__
        some = [case for case in cases if re.search(given.only, f"{op} {case}")]
        if given.write:  # of what is left out what was known
            known = {name: row for name, row in known.items() if left_out(name, cases, some, given.sm)}
        for case in some:
            for capability in given.sm:
                with tempfile.TemporaryDirectory() as folder:
                    for name, got in compiled(op, case, capability, Path(folder)):
                        print(op, line(name, got), flush=True)
                        found = faults(op, got)
                        if given.write:
                            known[name] = counts(got)
                        elif same:
                            found += over(counts(got), known.get(name))
                        wrong += bool(found)
                        for fault in found:
                            print("   !", fault, flush=True)
                        if given.out is not None:
                            keep(given.out, f"{op} {name}", got)
        if given.write and some:
            write(op, known)
    print(f"{wrong} kernels with faults" if wrong else "no faults")
    return min(wrong, 1)


def keep(folder: Path, name: str, got: Compiled) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"\W+", "_", name)
    (folder / f"{stem}.sass").write_text(got.sass)
    (folder / f"{stem}.ttgir").write_text(got.ttgir)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
