"""Which rows of a base run the suffixes of a chunk's edits are, and which of them are read: arithmetic on the host."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from rmfast.engine.invariance import padding
from rmfast.patching.suffix_record import SuffixRecord


@dataclass
class Rows:
    """Flat rows of suffixes, those of edits and after some of them one that pads them to whole tiles.

    Attributes:
        tokens: of the base run; an edit's suffix ends with the last of them.
        rows, prefix, read: (S,) of each suffix its rows, those before it and how many of its last ones are read.
        at: (n,) the base run's position of each row.
        reads: (m,) which rows are read.
        of_edits: (m,) bool, which of those are an edit's.
    """

    tokens: int
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    prefix: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    read: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    at: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    reads: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    of_edits: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    def and_edits(self, first: np.ndarray, read_from: np.ndarray, tile: int) -> Rows:
        """With edits whose suffixes start at `first` and are read from `read_from` on, and padding."""
        rows, counts = self.tokens - first, self.tokens - read_from
        more, more_reads = padding(int(rows.sum()), int(counts.sum()), tile)
        reads = np.repeat(rows.cumsum(), counts) + positions(read_from, self.tokens) - self.tokens
        made = Rows(
            self.tokens,
            np.append(rows, more),
            np.append(first, 0),
            np.append(counts, more_reads),
            np.append(positions(first, self.tokens), np.zeros(more, np.int64)),
            np.append(reads, rows.sum() + more - more_reads + np.arange(more_reads)),
            np.arange(len(reads) + more_reads) < len(reads),
        )
        return self.and_rows(made)

    def and_rows(self, other: Rows) -> Rows:
        def joined(name: str) -> np.ndarray:
            return np.concatenate([getattr(self, name), getattr(other, name)])

        reads = np.concatenate([self.reads, other.reads + len(self.at)])
        return Rows(
            self.tokens, joined("rows"), joined("prefix"), joined("read"), joined("at"), reads, joined("of_edits")
        )


def read_from(base: SuffixRecord, first: np.ndarray, every: bool) -> np.ndarray:
    """(E,) the first row that is read of edits whose first changed position is `first`: that itself where `every` row
    is read, else the gate's, else the last."""
    if every:
        return first
    last = len(base.ids) - 1
    return np.full(len(first), last) if base.gate is None else np.where(first <= base.gate, base.gate, last)


def positions(first: np.ndarray, tokens: int) -> np.ndarray:
    """first[0], ..., tokens - 1, first[1], ..., tokens - 1, ..."""
    counts = tokens - first
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - tokens, counts)
