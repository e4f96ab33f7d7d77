"""An output that survives being killed: lines that a log beside them vouches for, from which the same run goes on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from rmfast.texts.files import LOCK, STANDARD, apart, locked, naming, target
from rmfast.texts.log import LOG_FORMAT, entries_of, expect_same, replayed, window_entry
from rmfast.texts.remote import Location, Remote
from rmfast.texts.remote_output import RemoteOutput, remove_parts
from rmfast.texts.tables import SUFFIXES, Row, dump_line, write_table

_CHUNK = 1 << 20


class Lines(Protocol):
    """Where the lines of a run go, and from which row on."""

    next_row: int
    finished: bool

    def begin(self, **late: Any) -> None: ...
    def append(self, lines: list[bytes], skipped: list[tuple[int, Row]]) -> None: ...
    def finish(self) -> None: ...


def check_output(path: Location) -> None:
    """Raise ValueError where nothing could be written to `path`."""
    if isinstance(path, Remote):
        kind_of_output(path)
    elif path != STANDARD:
        kind_of_output(path)
        target(path, "--output")
    elif sys.stdout is None:
        raise ValueError("Expected standard output to be open")


@contextlib.contextmanager
def opened(
    path: Location, run: dict[str, Any], *, reads: Iterable[Location] = (), overwrite: bool = False
) -> Iterator[Lines]:
    """The output at `path`, for this run alone while it is entered; "-" is standard output.

    What is not on this machine has no locks: runs at once that write it do the same work twice.

    Raises ValueError where it is no regular file, another process writes it, it is of another run, or one of the files
    in `reads` would be written or removed.
    """
    if path == STANDARD:
        yield StandardOutput()
        return
    if isinstance(path, Remote):
        if path in reads:
            raise ValueError(f"Expected other files to be read than written, got {path}")
        output = RemoteOutput(path, run, kind=kind_of_output(path), overwrite=overwrite)
        try:
            yield output
        finally:
            output.flush()
        return
    kind, real = kind_of_output(path), target(path, "--output")
    beside = [_beside(real, ending) for ending in (".run.jsonl", ".run.rows.jsonl", f".run.{kind}", LOCK)]
    for file in beside:
        target(file, "what lies beside --output")
        if file.is_symlink():
            raise ValueError(f"Expected a regular file beside --output, but {file} is a link")
    apart((read for read in reads if isinstance(read, Path)), [real, *beside])
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
        self.path, self.kind, self.run = path, kind, {"log_format": LOG_FORMAT, **run}
        self.log_path = _beside(path, ".run.jsonl")
        self.lines_path = path if kind == "jsonl" else _beside(path, ".run.rows.jsonl")
        self.header: dict[str, Any] | None = None
        self.next_row = self.log_size = self.size = 0
        self.finished = False
        if overwrite:
            return
        entries, self.log_size = _read_log(self.log_path)
        # A run that ended before its first row, as by a wrong option, holds nobody to what it was.
        if len(entries) > 1 or (entries and self.lines_path.exists() and self.lines_path.stat().st_size):
            self.header = entries[0]
            expect_same(self.path, self.header, self.run)
            self._look(*replayed(entries, self.log_path))
        else:
            for file in {self.path, self.lines_path}:
                if file.exists() and file.stat().st_size:
                    raise ValueError(f"{file} exists and is of no run of rmfast: give another --output, or --overwrite")

    def begin(self, **late: Any) -> None:
        """Create the files, or check that they fit `late` too: what is known only once the model is loaded."""
        if self.header is not None:
            expect_same(self.path, self.header, late)
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
        self._record(window_entry(self.next_row, rows, data, skipped))
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


def write_whole(
    path: Location, lines: Iterable[bytes], *, reads: Iterable[Location] = (), overwrite: bool = False
) -> int:
    """Write lines, whole or not at all, as the file that the suffix of `path` says; gives how many there are.

    Raises ValueError where there is a file and not `overwrite`, and else as `opened`.
    """
    kind, reads = kind_of_output(path), list(reads)
    if isinstance(path, Remote):
        if path in reads:
            raise ValueError(f"Expected other files to be read than written, got {path}")
        if path.size() and not overwrite:
            raise ValueError(f"{path} exists: give another --output, or --overwrite")
        with tempfile.TemporaryDirectory() as folder:
            rows, made = _written(lines, kind, Path(folder) / "lines", Path(folder) / "table")
            path.with_name(path.name + ".run.jsonl").remove()
            remove_parts(path)
            path.write_file(made)
        return rows
    real = target(path, "--output")
    real.parent.mkdir(parents=True, exist_ok=True)
    log, one, table = (_beside(real, ending) for ending in (".run.jsonl", ".run.rows.jsonl", f".run.{kind}"))
    apart((read for read in reads if isinstance(read, Path)), [real, log, one, table, _beside(real, LOCK)])
    with locked(real):
        if real.exists() and real.stat().st_size and not overwrite:
            raise ValueError(f"{path} exists: give another --output, or --overwrite")
        for file in (one, table):
            target(file, "what lies beside --output")
            file.unlink(missing_ok=True)
        rows, made = _written(lines, kind, one, table)
        log.unlink(missing_ok=True)  # of a run whose file this was
        os.replace(made, real)
        one.unlink(missing_ok=True)
    return rows


def _written(lines: Iterable[bytes], kind: str, one: Path, table: Path) -> tuple[int, Path]:
    """How many lines there are, which are on disk at `one`, and the file that is the output."""
    rows = 0
    with naming(one), one.open("wb") as file:
        for part in lines:
            file.write(part)
            rows += part.count(b"\n")
    made = one
    if kind != "jsonl":
        made = table
        with naming(table):
            write_table(one, table, kind)
    _append(made, b"")
    return rows, made


def kind_of_output(path: Location) -> str:
    """By the suffix that was given, which a link need not share with its file. Compressed files can't be continued."""
    if isinstance(path, Remote):
        path.expect_one()
    if (suffix := path.suffix.lower()) not in SUFFIXES:
        raise ValueError(f"Expected --output to end in {', '.join(SUFFIXES)}, or to be - (standard output), got {path}")
    return SUFFIXES[suffix]


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    return entries_of(target(path, "the run's log").read_bytes(), path) if path.exists() else ([], 0)


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
