"""An output that survives being killed: lines that a log beside them vouches for, from which the same run goes on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from rmfast.texts.files import LOCK, STANDARD, apart, locked, naming, target
from rmfast.texts.tables import SUFFIXES, Row, dump_line, write_table

_LOG_FORMAT = 2
_CHUNK = 1 << 20


class Lines(Protocol):
    """Where the lines of a run go, and from which row on."""

    next_row: int
    finished: bool

    def begin(self, **late: Any) -> None: ...
    def append(self, lines: list[bytes], skipped: list[tuple[int, Row]]) -> None: ...
    def finish(self) -> None: ...


def check_output(path: Path) -> None:
    """Raise ValueError where nothing could be written to `path`."""
    if path != STANDARD:
        _kind(path)
        target(path, "--output")
    elif sys.stdout is None:
        raise ValueError("Expected standard output to be open")


@contextlib.contextmanager
def opened(path: Path, run: dict[str, Any], *, reads: Iterable[Path] = (), overwrite: bool = False) -> Iterator[Lines]:
    """The output at `path`, for this run alone while it is entered; "-" is standard output.

    Raises ValueError where it is no regular file, another process writes it, it is of another run, or one of the files
    in `reads` would be written or removed.
    """
    if path == STANDARD:
        yield StandardOutput()
        return
    kind, real = _kind(path), target(path, "--output")
    beside = [_beside(real, ending) for ending in (".run.jsonl", ".run.rows.jsonl", f".run.{kind}", LOCK)]
    for file in beside:
        target(file, "what lies beside --output")
        if file.is_symlink():
            raise ValueError(f"Expected a regular file beside --output, but {file} is a link")
    apart(reads, [real, *beside])
    real.parent.mkdir(parents=True, exist_ok=True)
    with locked(real):
        yield Output(real, run, kind=kind, overwrite=overwrite)


class StandardOutput:
    """Lines as they come, which nobody can go on with."""

    next_row, finished = 0, False

    def begin(self, **late: Any) -> None:
        sys.stdout.flush()
        # Past the buffer: what could not be written would stay in it, and fail again when Python ends.
        self.file = getattr(sys.stdout.buffer, "raw", sys.stdout.buffer)

    def append(self, lines: list[bytes], skipped: list[tuple[int, Row]]) -> None:
        rest = memoryview(b"".join(lines))
        while rest:
            rest = rest[self.file.write(rest) :]
        self.next_row += len(lines) + len(skipped)

    def finish(self) -> None:
        self.file.flush()


class Output:
    """A file of rows that a killed run leaves in a state from which the same run goes on.

    Beside it, `FILE.run.jsonl` holds what the run is (a header that a resumed run must match), and then a line for
    each window of rows, on disk before the window is: which rows it holds and leaves out, and length and SHA-256 of its
    lines. A window whose lines are not whole was being written when the run was killed, and is scored again; anything
    else that differs was changed by somebody else, and is refused.

    CSV and Parquet can't be continued after any byte: their rows are collected as lines in `FILE.run.rows.jsonl`, and
    become FILE when the run finishes.

    `Output(path, run)` changes nothing; `begin` starts or goes on. Raises ValueError where the file is of another run,
    of no run, or not as the run left it.
    """

    def __init__(self, path: Path, run: dict[str, Any], *, kind: str = "jsonl", overwrite: bool = False) -> None:
        self.path, self.kind, self.run = path, kind, {"log_format": _LOG_FORMAT, **run}
        self.log_path = _beside(path, ".run.jsonl")
        self.lines_path = path if kind == "jsonl" else _beside(path, ".run.rows.jsonl")
        self.header: dict[str, Any] | None = None
        self.next_row = self.log_size = self.size = 0
        self.finished = False
        if overwrite:
            return
        entries, self.log_size = _read_log(self.log_path)
        if entries:
            self.header = entries[0]
            self._check(self.run)
            self._look(*_replayed(entries, self.log_path))
        else:
            for file in {self.path, self.lines_path}:
                if file.exists() and file.stat().st_size:
                    raise ValueError(f"{file} exists and is of no run of rmfast: give another --output, or --overwrite")

    def begin(self, **late: Any) -> None:
        """Create the files, or check that they fit `late` too: what is known only once the model is loaded."""
        if self.header is not None:
            self._check(late)
            for path, size in ((self.log_path, self.log_size), (self.lines_path, self.size)):
                _append(path, b"")  # where it is gone
                os.truncate(path, size)
            return
        for path in (self.log_path, self.lines_path, self.path):
            path.unlink(missing_ok=True)
        self.header = {**self.run, **late}
        self._record(self.header)
        _append(self.lines_path, b"")

    def append(self, lines: list[bytes], skipped: list[tuple[int, Row]]) -> None:
        """Write the lines of the next rows, and which of these (number from 0, row) are left out; on disk at return."""
        if not (rows := len(lines) + len(skipped)):
            return
        data = b"".join(lines)
        left_out = [{"row": number, "line": row.line, "error": row.error} for number, row in skipped]
        what = {"row": self.next_row, "rows": rows, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self._record({**what, "skipped": left_out} if left_out else what)
        _append(self.lines_path, data)
        self.next_row += rows

    def finish(self) -> None:
        """Write that the run is complete, and in CSV or Parquet the file itself."""
        if self.kind == "jsonl":
            return self._record({"finished": self.next_row})
        table = _beside(self.path, f".run.{self.kind}")
        with naming(table):
            write_table(self.lines_path, table, self.kind)
            _append(table, b"")
        digest = _digest(table, 0, None)
        os.replace(table, self.path)  # a kill leaves no part of it
        self._record({"finished": self.next_row, "sha256": digest})
        self.lines_path.unlink(missing_ok=True)

    def _look(self, windows: list[dict[str, Any]], finished: dict[str, Any] | None) -> None:
        """Find out where the run goes on, by what is there of the windows' lines."""
        if finished and self.kind != "jsonl":
            if _digest(self.path, 0, None) != finished["sha256"]:
                raise self._changed("its rows")
            self.lines_path.unlink(missing_ok=True)
            self.next_row, self.finished = finished["finished"], True
            return
        size = self.lines_path.stat().st_size if self.lines_path.exists() else 0
        whole = 0
        for number, window in enumerate(windows):
            end = self.size + window["bytes"]
            if end > size:
                break
            if _digest(self.lines_path, self.size, window["bytes"]) != window["sha256"]:
                if number == len(windows) - 1 and end == size:
                    break  # of a computer that went off: the length was on its disk, and the lines were not
                raise self._changed(f"rows {window['row'] + 1} to {window['row'] + window['rows']}")
            whole, self.size, self.next_row = number + 1, end, window["row"] + window["rows"]
        if finished and whole < len(windows):
            raise self._changed(f"rows from {self.next_row + 1} on")
        if whole == len(windows) and self.size < size:
            raise self._changed(f"the lines behind row {self.next_row}")
        if whole < len(windows) - 1:
            lost = f"{self.lines_path} has lost rows from {self.next_row + 1} on: they are scored again"
            warnings.warn(lost, stacklevel=2)
        self.finished = finished is not None

    def _changed(self, what: str) -> ValueError:
        return ValueError(
            f"Expected {self.path} to be as the run left it, but {what} were changed, added or removed since: "
            "put them back, give another --output, or --overwrite starts anew"
        )

    def _record(self, entry: dict[str, Any]) -> None:
        _append(self.log_path, dump_line(entry))

    def _check(self, run: dict[str, Any]) -> None:
        for key, value in run.items():
            if key != "rmfast" and self.header is not None and self.header.get(key) != value:
                raise ValueError(
                    f"{self.path} was begun with {key} {self.header.get(key)!r} and now it is {value!r}:"
                    " use the same to go on where it stopped, or --overwrite to start anew"
                )


def _kind(path: Path) -> str:
    """By the suffix that was given, which a link need not share with its file. Compressed files can't be continued."""
    if (suffix := path.suffix.lower()) not in SUFFIXES:
        raise ValueError(f"Expected --output to end in {', '.join(SUFFIXES)}, or to be - (standard output), got {path}")
    return SUFFIXES[suffix]


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The entries of a log, and the length of its complete lines: a kill may have torn the last."""
    if not path.exists():
        return [], 0
    data = target(path, "the run's log").read_bytes()
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


def _replayed(entries: list[dict[str, Any]], path: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
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


def _damaged(path: Path, line: int, error: Exception) -> ValueError:
    return ValueError(f"{path}, line {line} is damaged ({error}): put it back, or --overwrite starts the run anew")


def _digest(path: Path, start: int, size: int | None) -> str:
    digest = hashlib.sha256()
    if path.exists():
        with path.open("rb") as file:
            file.seek(start)
            while chunk := file.read(_CHUNK if size is None else min(_CHUNK, size)):
                digest.update(chunk)
                size = None if size is None else size - len(chunk)
    return digest.hexdigest()


def _append(path: Path, data: bytes) -> None:
    with naming(path), path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
