"""An output that is not on this machine: parts that a run puts beside it as it goes, in the end one file."""

from __future__ import annotations

import hashlib
import re
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rmfast.texts.files import naming
from rmfast.texts.log import LOG_FORMAT, entries_of, expect_same, replayed, window_entry
from rmfast.texts.remote import Remote
from rmfast.texts.tables import Row, dump_line, write_table

# Seconds of work that a kill may cost: a write is a request of some 0.1 s, on the hub a commit, of which it takes a
# hundred or so an hour.
_INTERVAL, _INTERVALS = 15.0, {"hf": 600.0}
_PART = 64 << 20  # bytes that are held at most
_PART_NAME = re.compile(r"[0-9a-f]{32}/\d{12,}-\d+-\d+\.jsonl")  # of any run, in FILE.run


class RemoteOutput:
    """`rmfast.texts.output.Output` where nothing can be appended to: a machine that is lost takes one part with it.

    `FILE.run.jsonl` is a log, of the header alone until the run is complete; the header names the run. The lines of
    whole windows are parts, `FILE.run/NAME/ROW-ROWS-BYTES.jsonl`: first the log's entries of these windows in one line,
    then their lines. `finish` checks each against its entries, writes FILE and the whole log, and removes the parts.

    There are no locks, and none are needed: two processes of one run write the same lines, and the parts of a run that
    is begun anew (`overwrite`) are in a folder of its own.

    Raises ValueError where the file is of another run, of no run, or not as the run left it.
    """

    def __init__(self, path: Remote, run: dict[str, Any], *, kind: str = "jsonl", overwrite: bool = False) -> None:
        self.path, self.kind, self.run = path, kind, {"log_format": LOG_FORMAT, **run}
        self.log = path.with_name(path.name + ".run.jsonl")
        self.header: dict[str, Any] | None = None
        self.next_row, self.finished = 0, False
        self._parts: list[str] = []  # names, one row after another
        self._held: list[tuple[dict[str, Any], bytes]] = []  # windows that no part has yet
        self._interval = _INTERVALS.get(path.scheme, _INTERVAL)
        self._due = time.monotonic() + self._interval
        size = path.size()
        if overwrite:
            return
        entries = entries_of(self.log.read() or b"", self.log)[0]
        if not entries:
            if size:
                raise ValueError(f"{path} exists and is of no run of rmfast: give another --output, or --overwrite")
            return
        self.header = entries[0]
        expect_same(path, self.header, self.run)
        finished = replayed(entries, self.log)[1]
        if finished is not None:
            if size != finished["size"]:
                raise ValueError(f"Expected {path} to be as the run left it: --overwrite starts anew")
            self.next_row, self.finished = finished["finished"], True
            return
        self._parts, self.next_row = _chained(self._folder.below())

    def begin(self, **late: Any) -> None:
        """Write the header, or check that it fits `late` too: what is known only once the model is loaded."""
        if self.header is not None:
            return expect_same(self.path, self.header, late)
        for old in (self.log, self.path):
            old.remove()
        remove_parts(self.path)
        self.header = {**self.run, **late, "name": uuid.uuid4().hex}
        self.log.write(dump_line(self.header))

    def append(self, lines: list[bytes], skipped: list[tuple[int, Row]]) -> None:
        """Take the lines of the next rows, and which of these are left out; on their way within some seconds."""
        if not (rows := len(lines) + len(skipped)):
            return
        data = b"".join(lines)
        self._held.append((window_entry(self.next_row, rows, data, skipped), data))
        self.next_row += rows
        if time.monotonic() >= self._due or sum(len(data) for _, data in self._held) >= _PART:
            self.flush()

    def flush(self) -> None:
        """Write a part of the windows that are held."""
        if not self._held:
            return
        entries = [entry for entry, _ in self._held]
        part = b"".join([dump_line({"windows": entries}), *(data for _, data in self._held)])
        rows = sum(entry["rows"] for entry in entries)
        name = f"{entries[0]['row']:012}-{rows}-{len(part)}.jsonl"
        self._part(name).write(part)
        self._parts.append(name)
        self._held = []
        self._due = time.monotonic() + self._interval

    def finish(self) -> None:
        """Put the parts together as the file, by way of a copy on this machine."""
        assert self.header is not None
        self._expect_header()
        self.flush()
        log = [self.header]
        with tempfile.NamedTemporaryFile(suffix=".jsonl") as lines, tempfile.NamedTemporaryFile() as table:
            made = Path(lines.name)
            with naming(made):
                log += self._whole(lines)
                lines.flush()
            if self.kind != "jsonl":
                made = Path(table.name)
                try:
                    with naming(made):
                        write_table(Path(lines.name), made, self.kind)
                except ValueError as error:
                    raise ValueError(str(error).replace(lines.name, f"the parts in {self._folder}")) from error
            self._expect_header()  # while the parts were read, too
            self.path.write_file(made)
            log.append({"finished": self.next_row, "size": made.stat().st_size})
        self.log.write(b"".join(map(dump_line, log)))
        remove_parts(self.path)

    def _expect_header(self) -> None:
        assert self.header is not None
        if self.log.read() != dump_line(self.header):
            raise ValueError(f"{self.path} was begun anew by another run, or is complete: this one adds nothing")

    def _whole(self, lines: IO[bytes]) -> Iterator[dict[str, Any]]:
        """Write the lines of all parts, checked, and yield their entries."""
        for name in self._parts:
            about, _, data = (self._part(name).read() or b"").partition(b"\n")
            try:
                entries = entries_of(about + b"\n", self.path)[0][0]["windows"]
                sizes = [entry["bytes"] for entry in entries]
            except (ValueError, LookupError, TypeError) as error:
                raise self._changed(name) from error
            for entry, size in zip(entries, sizes):
                if hashlib.sha256(data[:size]).hexdigest() != entry["sha256"]:
                    raise self._changed(name)
                lines.write(data[:size])
                data = data[size:]
                yield entry

    def _changed(self, part: str) -> ValueError:
        return ValueError(
            f"Expected {self._part(part)} to be as the run left it, but it was changed since: remove it, and its rows"
            " are scored again, or --overwrite starts anew"
        )

    @property
    def _folder(self) -> Remote:
        assert self.header is not None
        folder = self.path.with_name(self.path.name + ".run")
        return Remote(f"{folder}/{self.header.get('name')}")

    def _part(self, name: str) -> Remote:
        return Remote(f"{self._folder}/{name}")


def remove_parts(path: Remote) -> None:
    """Remove what runs have put into FILE.run, and nothing else that lies there."""
    folder = path.with_name(path.name + ".run")
    folder.remove_below([name for name in folder.below() if _PART_NAME.fullmatch(name)])


def _chained(files: dict[str, int]) -> tuple[list[str], int]:
    """The names of parts that follow each other from the first row, and the row behind them.

    Of several from one row, as two processes of a run may leave, the one that reaches furthest; none that is not of the
    size that its name says, for file systems that show one before it is whole.
    """
    found: dict[int, tuple[int, str]] = {}
    for name, size in files.items():
        try:
            first, rows, whole = map(int, name.removesuffix(".jsonl").split("-"))
        except ValueError:  # none of ours
            continue
        if size == whole:
            found[first] = max(found.get(first, (0, "")), (rows, name))
    names, reached = [], 0
    while reached in found:
        rows, name = found[reached]
        names.append(name)
        reached += rows
    return names, reached
