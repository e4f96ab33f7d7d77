"""Rows in, rows out: streaming readers for JSONL, CSV and Parquet, and a JSONL output that survives being killed."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

FORMATS = ("jsonl", "csv", "parquet")
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Row:
    """One input row: `line` is where it begins (in Parquet its number), from 1; `error` says why it can't be read.

    `typed` is False in CSV, where a list of messages can only be written out as text.
    """

    line: int
    data: dict[str, Any]
    error: str | None = None
    typed: bool = True


def read_rows(path: Path, kind: str | None = None) -> Iterator[Row]:
    """Yield the rows of a JSONL, CSV (both also as .gz) or Parquet file, in bounded memory.

    `kind` is one of FORMATS; None goes by the file's suffix. A row that can't be read is yielded with its `error`.
    Raises ValueError for an unknown suffix or kind, ImportError for Parquet without pyarrow.
    """
    kind = kind or kind_of(path)
    if kind == "jsonl":
        return _read_jsonl(path)
    if kind == "csv":
        return _read_csv(path)
    if kind == "parquet":
        return _read_parquet(path)
    raise ValueError(f"Expected kind to be one of {', '.join(FORMATS)}, got {kind!r}")


def kind_of(path: Path) -> str:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix.lower() not in _SUFFIXES:
        # Not .json: such a file is more often one array than an object on each line, and an array is not streamed.
        raise ValueError(
            f"Expected a file ending in {', '.join(_SUFFIXES)}, got {path.name!r}; --input-format says what it is"
            " (jsonl: one JSON object on each line; a file that is one JSON array must be rewritten so)"
        )
    return _SUFFIXES[suffix.lower()]


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _read_jsonl(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                data = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
                yield Row(line, {}, f"is not JSON: {error}")
                continue
            if isinstance(data, dict):
                yield Row(line, data)
            else:
                yield Row(line, {}, f"is not a JSON object but a {type(data).__name__}")


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default, 128 KiB, is less than a long conversation
    # Bytes that are not UTF-8 become lone surrogates here, which makes the one row bad and not the whole file.
    with (
        _open(path) as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        reader = csv.reader(text, strict=True)  # else a quote that is never closed makes one row of the file's rest
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise ValueError(f"Expected {path.name} to begin with the names of its columns: {error}") from error
        if len(set(header)) < len(header):
            raise ValueError(f"Expected the columns of {path.name} to have different names, got {header}")
        line = reader.line_num + 1
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(line, {}, f"is not CSV: {error}")
                line = reader.line_num + 1
                continue
            data = dict(zip_longest(header, fields[: len(header)]))
            if len(fields) == len(header):
                yield Row(line, data, typed=False)
            elif fields:
                more = f", beyond it {fields[len(header) :]}" if len(fields) > len(header) else ""
                yield Row(line, data, f"has {len(fields)} fields where the header has {len(header)}{more}", typed=False)
            line = reader.line_num + 1


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(f"reading Parquet needs pyarrow (pip install pyarrow): {error}") from error
    line = 0
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            for data in batch.to_pylist():
                line += 1
                yield Row(line, data)


def count_and_digest(path: Path, kind: str | None = None) -> tuple[int | None, str]:
    """How many rows the file has, where that is known cheaply (else None), and the SHA-256 of its bytes.

    Reads the whole file at about 1 GB/s, little beside the time to score it.
    """
    digest, newlines, last = hashlib.sha256(), 0, b"\n"
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            newlines += chunk.count(b"\n")
            last = chunk[-1:]
    count: int | None = None
    kind = kind or kind_of(path)
    if kind == "jsonl" and path.suffix != ".gz":
        count = newlines + (last != b"\n")
    elif kind == "parquet":
        import pyarrow.parquet as parquet

        count = parquet.read_metadata(path).num_rows
    return count, digest.hexdigest()


def dump_line(data: dict[str, Any]) -> bytes:
    """One JSONL line. Non-finite numbers become null (JSON has none), dates and the like their text."""
    try:
        text = json.dumps(data, ensure_ascii=False, default=_text_of, allow_nan=False)
    except ValueError:  # NaN or Infinity, at any depth: the parser finds them where a walk in Python may go too deep
        data = json.loads(json.dumps(data, default=_text_of), parse_constant=lambda _: None)
        text = json.dumps(data, ensure_ascii=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which only an escape can carry
        return json.dumps(data, default=_text_of).encode() + b"\n"


def _text_of(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class Output:
    """A JSONL file that a killed run leaves in a state from which the same run goes on.

    The complete lines of the file are the truth: a row is done where its line is there. A torn last line is cut.
    Beside it, `FILE.run.jsonl` holds what the run is (a header that a resumed run must match), and a line for every
    row that was left out, written before any line that comes after that row: with these two, the count of lines says
    which input row comes next, and no progress counter has to be kept in step with the data.

    `Output(path, run)` looks at what is there and changes nothing but torn lines; `begin` starts or goes on.
    Raises ValueError where the file is of another run or of no run.
    """

    def __init__(self, path: Path, run: dict[str, Any], *, overwrite: bool = False) -> None:
        self.path, self.log_path = path, path.with_name(path.name + ".run.jsonl")
        self.run, self.lines, self.log = run, 0, []
        if not overwrite:
            self.log = _read_log(self.log_path)
            if self.log:
                self._check(run)
                self.lines = _cut_torn_line(self.path)
            elif path.exists() and path.stat().st_size:
                raise ValueError(f"{path} exists and is of no run of rmfast: give another --output, or --overwrite")
        self.next_row = _next_row(self.lines, {entry["skipped"] for entry in self.log if "skipped" in entry})

    @property
    def finished(self) -> bool:
        return bool(self.log) and self.log[-1].get("finished") == self.next_row

    def begin(self, **late: Any) -> None:
        """Create the files, or check that they fit `late` too: what is known only once the model is loaded."""
        if self.log:
            self._check(late)
            return self._forget_lost()
        self.path.unlink(missing_ok=True)
        self.log_path.unlink(missing_ok=True)
        self._record({**self.run, **late})
        _append(self.path, b"")

    def append(self, lines: list[bytes], skipped: list[tuple[int, Row]]) -> None:
        """Write the lines of the next rows, and which of these (number from 0, row) are left out; on disk at return."""
        self._record(*({"skipped": number, "line": row.line, "error": row.error} for number, row in skipped))
        _append(self.path, b"".join(lines))
        self.lines += len(lines)
        self.next_row += len(lines) + len(skipped)

    def finish(self) -> None:
        self._record({"finished": self.next_row})

    def _forget_lost(self) -> None:
        """Take out of the log the skipped rows that come after the last line: they will be looked at again.

        Left there, such a row would count twice if it now gets a line (with --on-error null), and another be lost.
        """
        kept = [entry for entry in self.log if entry.get("skipped", -1) < self.next_row]
        if len(kept) < len(self.log):
            whole = self.log_path.with_name(self.log_path.name + ".tmp")
            whole.unlink(missing_ok=True)
            _append(whole, b"".join(map(dump_line, kept)))
            os.replace(whole, self.log_path)  # a kill leaves the old log or the new one
            self.log = kept

    def _record(self, *entries: dict[str, Any]) -> None:
        _append(self.log_path, b"".join(map(dump_line, entries)))
        self.log += entries

    def _check(self, run: dict[str, Any]) -> None:
        for key, value in run.items():
            if key != "rmfast" and self.log[0].get(key) != value:
                raise ValueError(
                    f"{self.path} was begun with {key} {self.log[0].get(key)!r} and now it is {value!r}:"
                    " use the same to go on where it stopped, or --overwrite to start anew"
                )


def _read_log(path: Path) -> list[dict[str, Any]]:
    _cut_torn_line(path)
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def _next_row(lines: int, skipped: set[int]) -> int:
    """The number of the first row that is neither among the first `lines` rows written nor skipped before those."""
    row = 0
    for number in sorted(skipped):
        if number - row > lines:
            break
        lines -= number - row
        row = number + 1
    return row + lines


def _cut_torn_line(path: Path) -> int:
    """Cut what follows the last newline; return the number of lines."""
    if not path.exists():
        return 0
    lines = position = end = 0
    with path.open("r+b") as file:
        while chunk := file.read(_CHUNK):
            lines += chunk.count(b"\n")
            if (newline := chunk.rfind(b"\n")) >= 0:
                end = position + newline + 1
            position += len(chunk)
        if end < position:
            file.truncate(end)
    return lines


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        if data:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
