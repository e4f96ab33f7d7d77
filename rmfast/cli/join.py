"""`rmfast join`: the outputs of shards as the output of one run over the whole input."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from typing import IO, Annotated, Any

import typer

from rmfast.cli.options import file_of_option, with_options
from rmfast.cli.shards import shards_of
from rmfast.texts.files import STANDARD, Source
from rmfast.texts.log import entries_of, replayed
from rmfast.texts.output import check_output, write_whole
from rmfast.texts.remote import Location, Remote, location


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinOptions:
    output: Annotated[
        Any,
        typer.Option(
            help="The .jsonl, .csv or .parquet file or URL to write: that of `score`.", parser=file_of_option,
            metavar="FILE",
        ),
    ]  # fmt: skip
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error arose.")] = False


@with_options
def join(
    options: JoinOptions,
    shards: Annotated[
        list[str] | None, typer.Argument(help="Outputs of `--shard K/N`; default: those beside --output.")
    ] = None,
) -> None:
    """Put the outputs of all shards together.

    In the input's order: what one run over the whole would have written (see docs/scale.md).
    """
    output: Location = options.output
    if output == STANDARD:
        raise ValueError("Expected --output to be a file, got -")
    check_output(output)
    paths = [location(shard) for shard in shards] if shards else shards_of(output)
    found = _in_order([_Shard(path) for path in paths])
    rows = write_whole(output, _lines(found), reads=paths, overwrite=options.overwrite)
    typer.echo(f"rmfast: {rows} rows of {len(found)} shards in {output}", err=True)


class _Shard:
    """The output of a run that finished, and what its log says of it."""

    def __init__(self, path: Location) -> None:
        self.path = path
        log = path.with_name(path.name + ".run.jsonl")
        data = log.read() if isinstance(log, Remote) else log.read_bytes() if log.exists() else None
        if data is None:
            raise ValueError(f"Expected {path} to be the output of a shard, but there is no {log}")
        entries, _ = entries_of(data, log)
        windows, finished = replayed(entries, log) if entries else ([], None)
        if finished is None:
            raise ValueError(f"Expected {path} to be complete: its run has not ended")
        header = dict(entries[0])
        self.shard = header.pop("shard", None)
        if self.shard is None:
            raise ValueError(f"Expected {path} to be the output of a shard, but it is that of a whole input")
        self.index, self.count, self.window = (self.shard[name] for name in ("index", "count", "window"))
        self.run = {name: value for name, value in header.items() if name not in ("rmfast", "name")}
        self._windows = iter(windows)
        self._file: IO[bytes] | None = None
        self._source: Source | None = None

    def next_window(self) -> tuple[int, list[bytes]]:
        """How many rows the next window of the input has (0 behind the last), and their lines."""
        if self._file is None:
            self._source = Source.of(self.path)
            self._file = self._source.path.open("rb")
        rows, parts = 0, []
        while rows < self.window and (entry := next(self._windows, None)) is not None:
            data = self._file.read(entry["bytes"])
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise ValueError(
                    f"Expected {self.path} to be as its run left it, but rows from {entry['row'] + 1} on were changed"
                )
            rows += entry["rows"]
            parts.append(data)
        if rows > self.window:
            raise ValueError(f"Expected windows of {self.window} rows in {self.path}, got {rows}")
        return rows, parts

    def expect_end(self) -> None:
        assert self._file is not None
        if self._file.read(1):
            raise ValueError(f"Expected {self.path} to be as its run left it, but it has lines behind its last")


def _in_order(shards: list[_Shard]) -> list[_Shard]:
    """All shards of one run, each once. Raises ValueError where one is missing, there twice or of another run."""
    first = shards[0]
    for other in shards[1:]:
        for what in ("count", "window"):
            if getattr(other, what) != getattr(first, what):
                raise ValueError(
                    f"Expected shards of one run, but {what} is {getattr(first, what)} in {first.path} and "
                    f"{getattr(other, what)} in {other.path}"
                )
        for name in first.run.keys() | other.run.keys():
            one, two = first.run.get(name), other.run.get(name)
            if one != two:
                raise ValueError(
                    f"Expected shards of one run, but {name} is {one!r} in {first.path} and {two!r} in {other.path}"
                )
    found: dict[int, _Shard] = {}
    for shard in shards:
        if shard.index in found:
            raise ValueError(
                f"Expected each shard once, but {found[shard.index].path} and {shard.path} both are "
                f"{shard.index}/{shard.count}"
            )
        found[shard.index] = shard
    if missing := [f"{index}/{first.count}" for index in range(first.count) if index not in found]:
        raise ValueError(f"Expected all {first.count} shards, but {', '.join(missing)} is missing")
    return [found[index] for index in range(first.count)]


def _lines(shards: list[_Shard]) -> Iterator[bytes]:
    """The windows of all shards in turn, of which only the last has fewer rows than the others."""
    for shard in itertools.cycle(shards):
        rows, parts = shard.next_window()
        yield from parts
        if rows < shard.window:
            break
    for other in shards:
        if other.next_window()[0]:
            raise ValueError(f"Expected no rows behind the last of {shard.path}, got some in {other.path}")
        other.expect_end()
