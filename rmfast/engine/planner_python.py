"""The planner in Python: what csrc/host/planner.cpp does, function by function."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def plan_python(
    ids: np.ndarray,
    first: np.ndarray,
    length: np.ndarray,
    batch: int,
    keep: int,
    pool: int,
    min_shared: int,
    read_all: bool,
) -> tuple:
    """The planner in Python: what csrc/host/planner.cpp does, function by function."""
    order, texts = _texts(ids, first.tolist(), length.tolist(), min_shared)
    out = _Output(read_all, len(ids) if read_all else len(order), int(length.max(initial=0)))
    text = start = 0
    while text < len(texts):
        segments, text, next_start = _fill(texts, text, start, batch, keep, pool, min_shared)
        out.add(texts, segments, start, next_start, order, first)
        start = next_start
    return out.arrays(order, len(texts))


@dataclass(frozen=True)
class _Text:
    """A distinct input: order[at : at + copies] are its duplicates; it shares `shared` tokens with its predecessor."""

    at: int
    copies: int
    length: int
    shared: int


def _texts(ids: np.ndarray, first: list[int], length: list[int], min_shared: int) -> tuple[list[int], list[_Text]]:
    """The inputs sorted by tokens, then index, and the distinct ones among them."""
    data = ids.astype(">i4").tobytes()  # big-endian, so that bytes compare as the numbers do
    order = sorted(range(len(first)), key=lambda i: data[4 * first[i] : 4 * (first[i] + length[i])])
    texts: list[_Text] = []
    for at, i in enumerate(order):
        shared = 0
        if texts:
            last = order[at - 1]
            n = min(length[last], length[i])
            differ = ids[first[last] : first[last] + n] != ids[first[i] : first[i] + n]
            k = int(differ.argmax())
            shared = k if differ[k] else n
            if shared == length[i] == length[last]:
                t = texts[-1]
                texts[-1] = _Text(t.at, t.copies + 1, t.length, t.shared)
                continue
        texts.append(_Text(at, 1, length[i], shared if shared >= min_shared else 0))
    return order, texts


def _pool_growth(start: int, previous: int, run: int) -> int:
    """Rows that the pool grows by for a prefix of `start` rows.

    The pool's last run has `run` rows, of which the first `previous`, those before the preceding segment, are known
    to begin this text too where start >= previous.
    """
    if start <= previous:
        return 0
    return start - run if previous == run else start


def _fill(
    texts: list[_Text], text: int, start: int, batch: int, keep: int, pool: int, min_shared: int
) -> tuple[list[tuple[int, int, int]], int, int]:
    """One chunk, which begins at token `start` of `text`.

    Returns its segments (text, start, stop), and the text and token at which the next chunk begins.
    """
    segments: list[tuple[int, int, int]] = []
    before: list[int] = []  # rows before each segment
    rows = pooled = run = previous = 0
    while text < len(texts):
        t = texts[text]
        if segments:
            start = t.shared
            # No second copy of the run for a few rows more. (Where the run itself grows by them, nothing is copied.)
            if previous < start < previous + min_shared and previous < run:
                start = previous
        growth = _pool_growth(start, previous, run)
        if pooled + growth > pool and 2 * rows < batch:
            start, growth = previous, 0
        if rows + t.length - start > batch or pooled + growth > pool:
            break
        segments.append((text, start, t.length))
        before.append(rows)
        rows += t.length - start
        pooled += growth
        run = start if growth else run
        previous = start
        text += 1
    else:
        return segments, text, 0

    t = texts[text]
    # A chunk that would be less than half full takes a first part of the text, where that can be kept for the rest.
    if 2 * rows < batch and t.length <= keep + batch:
        stop = min(start + batch - rows, keep)
        if start < stop:
            return [*segments, (text, start, stop)], text, stop
    if segments:
        # The end is the best place in the last quarter to cut: where least is shared, the latest of equals.
        end = len(segments)
        for k in range(len(segments) - 1, 0, -1):
            if 4 * before[k] < 3 * rows:
                break
            if segments[k][1] < start:
                end, (text, start, _) = k, segments[k]
        segments = segments[:end]
    else:  # longer than the budgets together
        segments, text = [(text, start, t.length)], text + 1
    return segments, text, min(texts[text].shared, keep) if text < len(texts) else 0


class _Output:
    """The arrays of a plan, written chunk by chunk."""

    def __init__(self, read_all: bool, reads: int, longest: int):
        self.read_all = read_all
        self.lists: dict[str, list] = {name: [] for name in ("input", "start", "stop", "prefix_start")}
        self.rows: dict[str, list[np.ndarray]] = {name: [] for name in ("pool", "keep", "read")}
        self.cu: dict[str, list[int]] = {name: [0] for name in ("segments", "pool", "keep", "read", "inputs")}
        self.read_index = np.empty(reads, np.int64)
        self.path = np.empty(longest, np.int32)  # K/V row, in the chunk, of each token of the text being added
        self.all_path = np.empty(longest, np.int64)  # the same among the rows of all chunks
        self.total = 0  # rows of all chunks before

    def add(
        self,
        texts: list[_Text],
        segments: list[tuple[int, int, int]],
        kept: int,
        keep: int,
        order: list[int],
        first: np.ndarray,
    ) -> None:
        self.path[:kept] = np.arange(kept)
        rows = pooled = run = previous = finished = 0
        pool: list[np.ndarray] = []
        reads: list[int] = []
        for text, start, stop in segments:
            t = texts[text]
            if growth := _pool_growth(start, previous, run):
                pool.append(self.path[start - growth : start].copy())
                pooled += growth
                run = start
            previous = start
            for name, value in zip(self.lists, (order[t.at], start, stop, pooled - run if start else 0)):
                self.lists[name].append(value)
            self.path[start:stop] = np.arange(kept + rows, kept + rows + stop - start)
            self.all_path[start:stop] = np.arange(self.total + rows, self.total + rows + stop - start)
            rows += stop - start
            if stop == t.length:
                for i in order[t.at : t.at + t.copies]:
                    if self.read_all:
                        self.read_index[first[i] : first[i] + stop] = self.all_path[:stop]
                    else:
                        self.read_index[i] = self.cu["read"][-1] + len(reads)
                reads.append(rows - 1)
                finished += t.copies
        self.total += rows
        self.rows["pool"] += pool
        self.rows["keep"].append(self.path[:keep].copy())
        self.rows["read"].append(np.arange(rows, dtype=np.int32) if self.read_all else np.array(reads, np.int32))
        sizes = (len(segments), pooled, keep, len(self.rows["read"][-1]), finished)
        for cu, size in zip(self.cu.values(), sizes):
            cu.append(cu[-1] + size)

    def arrays(self, order: list[int], distinct: int) -> tuple:
        def joined(name: str) -> tuple[np.ndarray, np.ndarray]:
            return np.concatenate([np.empty(0, np.int32), *self.rows[name]]), np.array(self.cu[name])

        return (
            np.array(self.lists["input"], np.int64),
            *(np.array(self.lists[name], np.int32) for name in ("start", "stop", "prefix_start")),
            np.array(self.cu["segments"]),
            *joined("pool"),
            *joined("keep"),
            *joined("read"),
            self.read_index,
            np.array(order, np.int64),
            np.array(self.cu["inputs"]),
            distinct,
        )
