"""Makes the page of benchmarks from bench/data while the site is built: the newest row of each kind, by machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mkdocs_gen_files

_DATA = Path(__file__).parents[2] / "bench" / "data"
_HEAD = """# Benchmarks

The newest recorded run of every row, made from `bench/data` while this site was built. How a row is measured, what its
baselines are and what "share" means: `bench/README.md` in the repository; `make bench` makes them again. A ratio is a
baseline's time, in its fastest form that passes the check of its numbers, over ours; both are medians of interleaved
runs in one process. *Forced* means a wider CPU that was held to AVX2, ours and its libraries.
"""


def _isa(row: dict[str, Any]) -> str:
    """Which instruction set the C++ ops ran: that of the row's own account of its backends."""
    named = {value.split("(")[1].rstrip(")") for value in row.get("backends", {}).values() if "(" in value}
    return ", ".join(sorted(named)) or "-"


def _cpu(row: dict[str, Any]) -> str:
    machine = row["machine"]
    name = f"{machine['cpu']}, family {machine.get('cpu_family', '?')} model {machine.get('cpu_model', '?')}"
    return name if row["device"] == "cpu" else str(machine.get("gpu", row["device"]))


def _line(row: dict[str, Any]) -> str:
    ours = row["contenders"].get("ours", {})
    ratios = ", ".join(f"{name} {ratio:.3g}×" for name, ratio in row.get("ratios", {}).items())
    share = f"{row['share']:.0%}" if row.get("share") else ""
    version = row["machine"].get("torch", "")
    return (
        f"| `{row['benchmark']}` | {ours.get('ms', float('nan')):.4g} | {ratios} | {share} "
        f"| {row['date'][:10]}, {row['commit'][:8]}, torch {version} |"
    )


def _page() -> str:
    newest: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in sorted(_DATA.glob("*-cores.jsonl")) + sorted(_DATA.glob("nvidia*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if not row.get("quick") and row.get("check") == "passed":
                key = (_cpu(row), _isa(row), row["benchmark"])
                newest[key] = max(row, newest.get(key, row), key=lambda each: each["date"])
    lines = [_HEAD]
    for cpu, isa in dict.fromkeys((cpu, isa) for cpu, isa, _ in newest):
        rows = [row for (c, i, _), row in sorted(newest.items()) if (c, i) == (cpu, isa)]
        wide = "avx512f" in rows[0]["machine"].get("isa", [])
        forced = " (forced)" if isa == "avx2" and wide else ""
        lines.append(f"\n## {cpu}: {isa}{forced}, {rows[0]['machine'].get('threads', '?')} threads\n")
        lines.append(
            "| row | ours, ms | a baseline's time over ours | share of the limit | when |\n|---|---|---|---|---|"
        )
        lines += [_line(row) for row in rows]
    return "\n".join(lines) + "\n"


with mkdocs_gen_files.open("benchmarks.md", "w") as page:
    page.write(_page())
