"""Texts that wait to be run, and which of them run next: the oldest first, with those that share its beginning."""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# A text belongs to its neighbour's group where it shares this part of its tokens: a prompt of several responses, not
# the words that all prompts begin with.
_SHARED = 0.25
# A batch is full once this many groups did not fit into what was left.
_MISSES = 8
# Texts of a batch: those that are like others add no rows.
_MOST = 8192

_count = itertools.count()


@dataclass(eq=False)
class Piece:
    """One text of a request.

    Attributes:
        owner: the request; `owner.dropped` where nobody waits for it any more.
        place: of the text among the request's.
        item: the text, `ids` (T,) int64.
    """

    owner: Any
    place: int
    item: Any
    key: tuple[bytes, int] = field(init=False)
    waits: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self.key = self.item.ids.astype(">i4").tobytes(), next(_count)  # bytes that compare as the ids do

    def __lt__(self, other: Piece) -> bool:
        return self.key < other.key

    def __len__(self) -> int:
        return len(self.item.ids)


class Waiting:
    """Pieces of equal work, by age and by their tokens. For one thread."""

    def __init__(self) -> None:
        self._by_age: list[Piece] = []
        self._by_ids: list[Piece] = []
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._by_ids)

    def add(self, piece: Piece) -> None:
        self._by_age.append(piece)
        insort(self._by_ids, piece)
        self.tokens += len(piece)

    def oldest(self) -> Piece | None:
        """The piece that has waited longest; those that nobody waits for are dropped."""
        for piece in self._by_age:
            piece.waits = piece.waits and not piece.owner.dropped
        self._by_age = [piece for piece in self._by_age if piece.waits]
        if len(self._by_age) < len(self._by_ids):
            self._by_ids = [piece for piece in self._by_ids if piece.waits]
            self.tokens = sum(map(len, self._by_ids))
        return self._by_age[0] if self._by_age else None

    def take(self, budget: int) -> list[Piece]:
        """The pieces of the next batch, removed: about `budget` rows, of which shared beginnings count once.

        The oldest piece is always among them, whatever its length, so that each text is run some time. A group that
        would be cut in two, with its beginning run twice, is left to the next batch where this one is half full.
        """
        taken: list[Piece] = []
        rows = misses = 0
        if self.oldest() is None:
            return taken
        for piece in self._by_age:
            if rows >= budget or misses == _MISSES or len(taken) >= _MOST:
                break
            if not piece.waits or piece.owner.dropped:
                continue
            group = self._group(piece, budget)
            whole = sum(new for _, new in group)
            if taken and budget - rows < whole <= budget and 2 * rows >= budget:
                misses += 1
                continue
            for each, new in group:
                if taken and rows + new > budget:
                    misses += 1
                    break
                self._remove(each)
                taken.append(each)
                rows += new
        self._by_age = [piece for piece in self._by_age if piece.waits]
        return taken

    def _group(self, piece: Piece, budget: int) -> list[tuple[Piece, int]]:
        """A piece and those that wait and share its beginning, nearest first, each with the rows that it adds.

        As many as have more than `budget` rows at most: what comes behind them is for later batches.
        """
        group, rows = [(piece, len(piece))], len(piece)
        at = bisect_left(self._by_ids, piece)
        for step in (1, -1):
            before, shared, i = piece, len(piece), at + step
            while 0 <= i < len(self._by_ids) and rows <= budget and len(group) < _MOST:
                other = self._by_ids[i]
                if not other.owner.dropped:
                    same = common(before.item.ids, other.item.ids)
                    shared = min(shared, same)
                    if shared < _SHARED * len(other):
                        break
                    group.append((other, len(other) - same))
                    rows, before = rows + len(other) - same, other
                i += step
        return group

    def _remove(self, piece: Piece) -> None:
        """From the texts by their ids at once, so that no group has to walk over what was taken."""
        piece.waits = False
        del self._by_ids[bisect_left(self._by_ids, piece)]
        self.tokens -= len(piece)

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._by_ids)


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids two texts begin with in common."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n
