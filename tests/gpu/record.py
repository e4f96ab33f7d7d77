"""What a check measured: lines of a file, written as they come, and the table of them that is printed last."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One figure. `target`: at least that, or at most where it is negative; `failed`: why there is none."""

    step: str
    name: str
    value: float | str | None = None
    unit: str = ""
    target: float | None = None
    failed: str | None = None

    @property
    def verdict(self) -> str:
        if self.failed is not None:
            return "FAILED: " + self.failed
        if self.target is None or not isinstance(self.value, float | int):
            return ""
        met = self.value >= self.target if self.target >= 0 else self.value <= -self.target
        return f"{'met' if met else 'MISSED'} ({'at least' if self.target >= 0 else 'at most'} {abs(self.target):g})"

    def __str__(self) -> str:
        number = isinstance(self.value, float | int)
        shown = f"{self.value:.4g}" if number else str(self.value or "")
        return f"{self.step:<12}{self.name:<52}{shown:>12} {self.unit:<10}{self.verdict}".rstrip()


class Record:
    """The file `rows.jsonl` of a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "rows.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        value = row.value
        if isinstance(value, float) and not math.isfinite(value):
            row = Row(row.step, row.name, None, row.unit, row.target, row.failed or f"got {value}")
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(row, flush=True)

    def rows(self) -> list[Row]:
        return [Row(**json.loads(line)) for line in self.path.read_text().splitlines()] if self.path.exists() else []
