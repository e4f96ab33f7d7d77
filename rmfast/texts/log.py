"""The log of a run: what it is of, then which rows are in which lines, and that it finished."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from rmfast.texts.remote import Location
from rmfast.texts.tables import Row

LOG_FORMAT = 2


def window_entry(first: int, rows: int, data: bytes, skipped: list[tuple[int, Row]]) -> dict[str, Any]:
    """What a log says of the lines `data` of `rows` rows, of which `skipped` (number from 0, row) are left out."""
    what = {"row": first, "rows": rows, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    left_out = [{"row": number, "line": row.line, "error": row.error} for number, row in skipped]
    return {**what, "skipped": left_out} if left_out else what


def expect_same(path: Location, header: dict[str, Any], run: dict[str, Any]) -> None:
    """ValueError where the output at `path` was begun as another run than this."""
    for key, value in run.items():
        if key != "rmfast" and header.get(key) != value:
            raise ValueError(
                f"{path} was begun with {key} {header.get(key)!r} and now it is {value!r}:"
                " use the same to go on where it stopped, or --overwrite to start anew"
            )


def entries_of(data: bytes, path: Location) -> tuple[list[dict[str, Any]], int]:
    """The entries of a log, and the length of its complete lines: a kill may have torn the last."""
    size = data.rfind(b"\n") + 1
    lines, entries = data[:size].split(b"\n")[:-1], []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(json.loads(line))
            if not isinstance(entries[-1], dict):
                raise ValueError(f"a {type(entries[-1]).__name__}")
        except (ValueError, RecursionError) as error:
            raise _damaged(path, number, error) from error
    return entries, size


def replayed(entries: list[dict[str, Any]], path: Location) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The windows that follow each other from the first row, and the last entry if it says that the run finished.

    A window that is there a second time was written again, and so was all behind it.
    """
    windows: list[dict[str, Any]] = []
    for number, entry in enumerate(entries[1:], start=2):
        try:
            first = entry["finished"] if "finished" in entry else entry["row"]
            while windows and "row" in entry and windows[-1]["row"] >= first:
                windows.pop()
            reached = windows[-1]["row"] + windows[-1]["rows"] if windows else 0
            if first != reached:
                raise ValueError(f"row {first} does not follow on row {reached}")
            if "finished" not in entry:
                windows.append({"row": first, **{name: entry[name] for name in ("rows", "bytes", "sha256")}})
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, number, error) from error
    last = entries[-1] if "finished" in entries[-1] else None
    return windows, last


def _damaged(path: Location, line: int, error: Exception) -> ValueError:
    return ValueError(f"{path}, line {line} is damaged ({error}): put it back, or --overwrite starts the run anew")
