"""How far a run is, how fast, and how long it still takes: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

import typer

_SECONDS = 60.0  # between two lines of a log


class Progress:
    """Of `total` rows (None: unknown), from row `first` on, to stderr."""

    def __init__(self, total: int | None, first: int) -> None:
        self.total, self.first = total, first
        self.start = time.monotonic()
        self.due = self.start + _SECONDS
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, initial=self.first, unit="row", smoothing=0.1)
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def reached(self, row: int, rates: str) -> None:
        if self.bar is not None:
            self.bar.update(row - self.bar.n)
            self.bar.set_postfix_str(rates)
        elif (now := time.monotonic()) >= self.due:
            self.due = now + _SECONDS
            typer.echo(f"rmfast: {self._line(row, now - self.start, rates)}", err=True)

    def _line(self, row: int, seconds: float, rates: str) -> str:
        rate = (row - self.first) / seconds
        if self.total is None or not rate:
            return f"{row} rows, {rate:.1f} rows/s, {rates}"
        left = round((self.total - row) / rate)
        clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        return f"{row} of {self.total} rows ({row / self.total:.0%}), {rate:.1f} rows/s, {rates}, {clock} left"
