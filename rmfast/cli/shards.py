"""Parts of an input for several processes or machines: which rows are whose, and where each puts them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from rmfast.texts.files import STANDARD
from rmfast.texts.output import kind_of_output
from rmfast.texts.remote import Location, Remote

T = TypeVar("T")
_GIVEN = re.compile(r"(\d+)/(\d+)")
_NAMED = re.compile(r"-(\d{5,})-of-(\d{5,})\.jsonl")


@dataclass(frozen=True)
class Shard:
    """Every `count`-th window of rows, from window `index` on.

    Windows are those of a run over the whole, so that texts run with the same others, and parts of a file that is
    sorted by length take equally long.
    """

    index: int
    count: int

    @classmethod
    def of(cls, given: str | None) -> Shard | None:
        """Of K/N, else of RANK and WORLD_SIZE (as torchrun sets them); None for the whole. Raises ValueError."""
        if given is None:
            rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
            if rank is None or size is None:
                return None
            name, given = "RANK/WORLD_SIZE", f"{rank}/{size}"
        else:
            name = "--shard"
        found = _GIVEN.fullmatch(given.strip())
        index, count = map(int, found.groups()) if found else (0, 0)
        if index >= count:
            raise ValueError(f"Expected {name} to be K/N with K from 0 to N - 1, got {given}")
        return cls(index, count) if count > 1 else None

    def path(self, output: Location) -> Location:
        """OUTPUT-00003-of-00008.jsonl for OUTPUT of any suffix: tables are made once all rows are there."""
        if output == STANDARD:
            raise ValueError("Expected --output to be a file with --shard, got -")
        kind_of_output(output)
        return output.with_name(f"{output.stem}-{self.index:05}-of-{self.count:05}.jsonl")

    def part(self, rows: Iterator[T], window: int) -> Iterator[T]:
        return (row for number, row in enumerate(rows) if number // window % self.count == self.index)

    def size(self, total: int, window: int) -> int:
        """How many of `total` rows are this shard's."""
        windows, rest = divmod(total, window)
        mine = len(range(self.index, windows, self.count))
        return mine * window + (rest if windows % self.count == self.index else 0)


def shards_of(output: Location) -> list[Location]:
    """The shards of an output that lie beside it, by their names and in their order.

    Raises ValueError where there are none, or some of runs with different numbers of shards.
    """
    found: dict[int, list[tuple[int, Location]]] = {}
    beside: Iterable[Location] = output.beside() if isinstance(output, Remote) else output.parent.glob("*.jsonl")
    for path in beside:
        named = _NAMED.fullmatch(path.name.removeprefix(output.stem)) if path.name.startswith(output.stem) else None
        if named:
            found.setdefault(int(named[2]), []).append((int(named[1]), path))
    if len(found) != 1:
        got = " and ".join(f"shards of {count}" for count in sorted(found)) or "none"
        raise ValueError(f"Expected the shards of one run beside {output}, got {got}: name them")
    (shards,) = found.values()
    return [path for _, path in sorted(shards, key=lambda shard: shard[0])]
