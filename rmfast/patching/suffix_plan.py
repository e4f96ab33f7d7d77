"""What a chunk of edits does in each layer, as index arrays on the host, all of which go to the device at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rmfast.engine.invariance import padded
from rmfast.engine.uploads import Uploads
from rmfast.patching.sites import SITES, Edits
from rmfast.patching.suffix_record import SuffixRecord
from rmfast.patching.suffix_rows import Rows, positions, read_from

_CODE = {kind: i for i, kind in enumerate(SITES)}
_STREAM = (_CODE["resid_pre"], _CODE["resid_post"])
_KV = (_CODE["k"], _CODE["v"])


# Numbers of arrays are what `Uploads` knows them by.
@dataclass(frozen=True)
class Suffixes:
    """The numbers of cu_seqlens, prefix_len and (None: all rows have queries) cu_reads."""

    cu: int
    length: int
    cu_reads: int | None = None


@dataclass(frozen=True)
class Keys:
    """Attention of all rows from an edit's first changed one, for an edited key or value: numbers of its arrays.

    Attributes:
        at: the base run's position of each row.
        changed, changed_at, unit, source: the rows that are replaced, their positions and units, and where edits have
            sources, those.
        suffixes: of the rows.
    """

    at: int
    changed: int
    changed_at: int
    unit: int
    source: int | None
    suffixes: Suffixes


@dataclass(frozen=True)
class Tail:
    """A row of a layer's output for each edit inside of it: its kind, layer and count, and numbers of arrays.

    Attributes:
        at, unit, source: each row's position, its edit's unit and, where edits have one, source.
        whole: rows to gather for a whole number of tiles.
        attended: the single rows' suffixes of an edited query, or those of an edited key or value.
    """

    kind: str
    layer: int
    count: int
    at: int
    unit: int
    source: int | None
    whole: int
    attended: Suffixes | Keys | None = None


@dataclass(frozen=True)
class Stream:
    """Values of the stream, known for all positions."""

    kind: str
    layer: int


Pieces = Sequence[Stream | Tail]  # values (V, d), one after another, that stand in for rows


@dataclass(frozen=True)
class Entry:
    """Edits that enter a layer.

    Attributes:
        at, value_at: numbers: each row's position in the base run, and the value that stands in for it (-1: none).
        new: number: the rows that a value stands in for, padded.
        count: of those without padding, or None where they are all rows.
        reads: number: the rows that are read, in the last layer.
    """

    pieces: Pieces
    at: int
    value_at: int
    new: int
    count: int | None
    reads: int | None


@dataclass(frozen=True)
class Step:
    """A layer: numbers of the live rows' positions (None: there are none) and read ones, what enters, all suffixes;
    with frozen patterns the positions of all queries and of all keys."""

    layer: int
    at: int | None
    reads: int | None
    entry: Entry | None
    suffixes: Suffixes
    frozen: tuple[int, int] | None


@dataclass(frozen=True)
class Ending:
    """Edits of the last layer, of which the read rows alone count: numbers of each row's value, and of the rows that
    have none and their positions."""

    pieces: Pieces
    value_at: int
    kept: int | None
    kept_at: int


@dataclass(frozen=True)
class Reading:
    """Numbers: the rows of edits among those that the layers give, what the head reads of them, of gated heads the
    edits whose own row the gate reads, and where every row is read its edit and position."""

    of_edits: int
    rows: int
    gated: int | None = None
    gates: int = 0
    every: tuple[int, int] | None = None


class Plan:
    """The steps of edits that run together, sorted by the layer they enter."""

    def __init__(
        self, base: SuffixRecord, edits: Edits, entry: np.ndarray, layers: int, tile: int, frozen_patterns: bool,
        every: bool,
    ):  # fmt: skip
        self.base, self.edits, self.entry, self.layers, self.tile = base, edits, entry, layers, tile
        self.frozen_patterns, self.every = frozen_patterns, every
        self.tokens = len(base.ids)
        self.first = edits.groups.argmax(1)[edits.group]
        self.read_from = read_from(base, self.first, every)
        self.uploads = Uploads()
        self.steps: list[Step] = []
        live = Rows(self.tokens)
        for m in range(layers):
            entering = np.flatnonzero(entry == m)
            if len(live.at) + len(entering):
                live = self._step(m, live, entering)
        last = np.flatnonzero(entry == layers)
        self.ending = self._ending(last) if len(last) else None
        self.reading = self._reading(live)

    def _step(self, m: int, live: Rows, entering: np.ndarray) -> Rows:
        add, last = self.uploads.add, m == self.layers - 1
        at = add(live.at) if len(live.at) else None
        reads = add(live.reads) if at is not None and last else None
        entry = None
        if len(entering):
            rows = Rows(self.tokens).and_edits(self.first[entering], self.read_from[entering], self.tile)
            entry = self._entry(m, entering, rows, last)
            live = live.and_rows(rows)
        suffixes = self._suffixes(live.rows, live.prefix, live.read if last else None)
        frozen = (add(live.at[live.reads] if last else live.at), add(live.at)) if self.frozen_patterns else None
        self.steps.append(Step(m, at, reads, entry, suffixes, frozen))
        return live

    def _suffixes(self, rows: np.ndarray, prefix: np.ndarray, read: np.ndarray | None = None) -> Suffixes:
        add = self.uploads.add
        return Suffixes(add(_ends(rows)), add(prefix.astype(np.int32)), None if read is None else add(_ends(read)))

    def _entry(self, m: int, some: np.ndarray, rows: Rows, last: bool) -> Entry:
        add, first = self.uploads.add, self.first[some]
        edit = np.repeat(some, self.tokens - first)
        pieces, value_rows = self._replacements(m, edit, positions(first, self.tokens))
        value_rows = np.append(value_rows, np.full(len(rows.at) - len(value_rows), -1))  # padding
        fresh = np.flatnonzero(value_rows >= 0)
        return Entry(
            pieces, add(rows.at), add(value_rows), add(padded(fresh, self.tile)),
            None if len(fresh) == len(rows.at) else len(fresh), add(rows.reads) if last else None,
        )  # fmt: skip

    def _replacements(self, m: int, edit: np.ndarray, position: np.ndarray) -> tuple[Pieces, np.ndarray]:
        """For rows of edits that enter layer m, each edit's last ones: values (V, d), and which of them each row is
        replaced by, -1 for none."""
        edits = self.edits
        kind = edits.kind[edit]
        # After an edit of k or v all rows of the layer are new.
        replaced = edits.groups[edits.group[edit], position] | np.isin(kind, _KV)
        value_rows = np.full(len(edit), -1)
        pieces: list[Stream | Tail] = []
        offset = 0
        for code in np.unique(kind):
            chosen = (kind == code) & replaced
            if code in _STREAM and edits.source is None:  # what comes in their place is known for all positions
                pieces.append(Stream(SITES[code], m - (SITES[code] == "resid_post")))
                value_rows[chosen] = offset + position[chosen]
                offset += self.tokens
            else:
                tail = self._tail(SITES[code], m - 1, edit[chosen], position[chosen])
                pieces.append(tail)
                value_rows[chosen] = np.arange(offset, offset + tail.count)
                offset += tail.count
        return pieces, value_rows

    def _tail(self, kind: str, m: int, edit: np.ndarray, position: np.ndarray) -> Tail:
        add, count = self.uploads.add, len(edit)
        attended: Suffixes | Keys | None = None
        if kind == "q":
            attended = self._suffixes(np.ones(count, np.int64), position)
        elif kind in ("k", "v"):
            attended = self._keys(edit)
        # Matmuls run on a whole number of tiles; what is behind the edits' rows is left off again.
        whole = add(padded(np.arange(count), self.tile))
        return Tail(
            kind, m, count, add(position), add(self.edits.unit[edit]), self._source(edit), whole, attended
        )  # fmt: skip

    def _source(self, edit: np.ndarray) -> int | None:
        return None if self.edits.source is None else self.uploads.add(self.edits.source[edit])

    def _keys(self, edit: np.ndarray) -> Keys:
        """After the last layer's edit, queries of the read rows alone."""
        add, edits = self.uploads.add, self.edits
        which, index = np.unique(edit, return_inverse=True)
        first = self.first[which]
        rows = positions(first, self.tokens)
        owner = np.repeat(which, self.tokens - first)
        changed = np.flatnonzero(edits.groups[edits.group[owner], rows])
        return Keys(
            add(rows), add(changed), add(rows[changed]), add(edits.unit[owner[changed]]),
            self._source(owner[changed]), self._suffixes(self.tokens - first, first, np.bincount(index)),
        )  # fmt: skip

    def _ending(self, some: np.ndarray) -> Ending:
        add, start = self.uploads.add, self.read_from[some]
        position = positions(start, self.tokens)
        pieces, value_rows = self._replacements(self.layers, np.repeat(some, self.tokens - start), position)
        kept = np.flatnonzero(value_rows < 0)
        return Ending(pieces, add(value_rows.clip(0)), add(kept) if len(kept) else None, add(position[kept]))

    def _reading(self, live: Rows) -> Reading:
        """Of the read rows of all edits, one after the other's."""
        add, base = self.uploads.add, self.base
        ends = (self.tokens - self.read_from).cumsum()
        of_edits = add(np.flatnonzero(live.of_edits))
        if self.every:
            edit = np.repeat(np.arange(len(ends)), self.tokens - self.read_from)
            at = add(edit), add(positions(self.read_from, self.tokens))
            return Reading(of_edits, add(padded(np.arange(ends[-1]), self.tile)), every=at)
        if base.gate is None:
            return Reading(of_edits, add(padded(ends - 1, self.tile)))
        gated = np.flatnonzero(self.first <= base.gate)  # whose first row that is read is the gate's
        firsts = ends[gated] - self.tokens + self.read_from[gated]
        return Reading(of_edits, add(padded(np.append(ends - 1, firsts), self.tile)), add(gated), len(gated))


def sizes(base: SuffixRecord, edits: Edits, layers: int, every: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows that each edit runs at once, at most, and the layer that it enters."""
    first = edits.groups.argmax(1)[edits.group]
    entry = edits.layer + (edits.kind != _CODE["resid_pre"])
    read_alone = (entry == layers) & ~np.isin(edits.kind, _KV)
    rows = len(base.ids) - np.where(read_alone, read_from(base, first, every), first)
    return rows, entry


def _ends(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
