"""Rows in, rows out: streaming readers for JSONL, CSV and Parquet, and JSONL lines as either of the other two."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

from rmfast.texts.files import Source
from rmfast.texts.remote import Location

FORMATS = ("jsonl", "csv", "parquet")
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
_CHUNK = 1 << 20
_BATCH = 1024


@dataclass(frozen=True)
class Row:
    """One input row: `line` is where it begins (in Parquet its number), from 1; `error` says why it can't be read.

    `typed` is False in CSV, where a list of messages can only be written out as text.
    """

    line: int
    data: dict[str, Any]
    error: str | None = None
    typed: bool = True


def read_rows(given: Location | Source, kind: str | None = None) -> Iterator[Row]:
    """Yield the rows of a JSONL, CSV (both also gzipped) or Parquet file, in bounded memory; a pipe is read once.

    `kind` is one of FORMATS; None goes by the file's suffix. A row that can't be read is yielded with its `error`.
    Raises ValueError for an unknown suffix or kind, and, once the rows before are read, where the file can't be read
    on (it is cut short, or is of another format); ImportError for Parquet without pyarrow.
    """
    source = given if isinstance(given, Source) else Source.of(given)
    kind = kind or kind_of(source.given)
    if kind not in _READERS:
        raise ValueError(f"Expected kind to be one of {', '.join(FORMATS)}, got {kind!r}")
    return _read(source, kind)


def _read(source: Source, kind: str) -> Iterator[Row]:
    try:
        yield from _READERS[kind](source.path)
    except ImportError:
        raise
    except Exception as error:  # of a damaged file: zlib.error, EOFError, ArrowInvalid and whatever else
        raise ValueError(f"Expected {source.name} to be readable as {kind}: {error}") from error


def kind_of(path: Location) -> str:
    """The format that a file's name says it is of. Raises ValueError where it says none."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix.lower() not in SUFFIXES:
        # Not .json: such a file is more often one array than an object on each line, and an array is not streamed.
        raise ValueError(
            f"Expected a file ending in {', '.join(SUFFIXES)}, got {path.name!r}; --input-format says what it is"
            " (jsonl: one JSON object on each line; a file that is one JSON array must be rewritten so)"
        )
    return SUFFIXES[suffix.lower()]


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if _gzipped(path) else path.open("rb")  # type: ignore[return-value]


def _gzipped(path: Path) -> bool:
    """By what the file begins with: a pipe has no name, and no text begins so."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


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
            raise ValueError(f"its first line must hold the names of its columns: {error}") from error
        _check_names(header)
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
        _check_names(file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=_BATCH):
            for data in batch.to_pylist():
                line += 1
                yield Row(line, data)


def _check_names(names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"its columns must have different names, got {names}")


_READERS = {"jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet}


def count_and_digest(source: Source, kind: str) -> tuple[int | None, str]:
    """How many rows the file has (None where it can't be read through), and the SHA-256 of its bytes.

    Reads the whole file at about 1 GB/s, and CSV and what is gzipped once more, row by row: little beside the time to
    score it.
    """
    digest, newlines, last = hashlib.sha256(), 0, b"\n"
    with source.path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            newlines += chunk.count(b"\n")
            last = chunk[-1:]
    count: int | None = None
    if kind == "jsonl" and not _gzipped(source.path):
        count = newlines + (last != b"\n")
    elif kind == "parquet":
        import pyarrow.parquet as parquet

        try:
            count = parquet.read_metadata(source.path).num_rows
        except Exception as error:
            raise ValueError(f"Expected {source.name} to be readable as parquet: {error}") from error
    else:
        with contextlib.suppress(ValueError):  # a damaged file, whose rows before the damage are scored
            count = sum(1 for _ in read_rows(source, kind))
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


def write_table(lines: Path, path: Path, kind: str) -> None:
    """Write the rows of a JSONL file as CSV or Parquet, in bounded memory: one pass finds the columns, one writes.

    Raises ValueError where the format can't hold them.
    """
    try:
        if kind == "csv":
            _write_csv(lines, path)
        else:
            _write_parquet(lines, path)
    except OSError:
        raise
    except Exception as error:  # pyarrow raises ArrowInvalid, ArrowTypeError, OverflowError, ...
        raise ValueError(f"Expected rows that {kind} can hold, got {error}; they are whole in {lines}") from error


def _write_csv(lines: Path, path: Path) -> None:
    """A cell of text as it stands, nothing for null, JSON for all else."""

    def cell(value: Any) -> str:
        return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)

    names = list(dict.fromkeys(name for row in read_rows(lines, "jsonl") for name in row.data))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        if names:
            writer.writerow(names)
        for row in read_rows(lines, "jsonl"):
            writer.writerow([cell(row.data.get(name)) for name in names])


def _write_parquet(lines: Path, path: Path) -> None:
    """A column's type is the one that holds its values in all rows: whole numbers among fractions become fractions."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    def batches() -> Iterator[list[dict[str, Any]]]:
        rows = (row.data for row in read_rows(lines, "jsonl"))
        while batch := list(itertools.islice(rows, _BATCH)):
            yield batch

    def column(name: str, batch: list[dict[str, Any]], kind: Any = None) -> Any:
        try:
            return pa.array([row.get(name) for row in batch], kind)
        except Exception as error:
            raise ValueError(f"column {name!r}: {error}") from error

    schema = pa.schema([])
    for batch in batches():
        names = dict.fromkeys(name for row in batch for name in row)
        found = pa.schema([(name, column(name, batch).type) for name in names])
        schema = pa.unify_schemas([schema, found], promote_options="permissive")
    with parquet.ParquetWriter(path, schema) as writer:
        for batch in batches():
            columns = [column(name, batch, kind) for name, kind in zip(schema.names, schema.types)]
            writer.write_table(pa.table(columns, schema))
    parquet.read_schema(path)  # what is nested too deeply can be written, and never read
