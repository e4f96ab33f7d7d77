"""What the suffix engine runs, in which order: shared prefixes once, in chunks under a budget.

Inputs are sorted by their token ids, which is a depth-first walk of their prefix trie: what an input shares with any
earlier one, it shares with its predecessor. So each distinct input is one *segment*: the rows after the tokens shared
with its predecessor. Those come first in its attention, from a *pool* of K/V rows in which every segment has one range.

A layer projects K and V of all rows before its attention reads any. Parents and children therefore run in the same
chunk, and the pool of a layer is gathered from that layer's own K and V: no waves by depth, no K/V kept over layers.
Only where a chunk ends inside a tree do shared rows have to be kept, in all layers, for the next chunk. They are always
one chain, the beginning of the next segment's text, so that the kept rows are one array, replaced by every chunk, and
nothing is ever allocated or freed piecewise. In the engine, with `kept` and `pool` per layer:

    for chunk in plan:                                        # in order
        for each layer:
            have = cat(kept[layer], k)                        # the same for v; k is (chunk.rows, Hkv, D), after RoPE
            pool = have[chunk.pool_rows]
            ... suffix_attention(q, k, v, chunk.cu_seqlens, pool, ..., chunk.prefix_start, chunk.prefix_len)
            kept[layer] = have[chunk.keep_rows]
        out.append(head(hidden[chunk.read_rows]))
    result = cat(out)[plan.read_index]

`plan` is C++ (csrc/host/planner.cpp) where that is built, and else `planner_python`, with equal results.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rmfast.engine.planner_python import plan_python

try:
    from rmfast import _planner  # type: ignore[attr-defined]
except ImportError:
    _planner = None

# Tokens of a window: 64 MiB of int32 ids, 80,000 texts of 200 tokens.
_WINDOW_TOKENS = 1 << 24


@dataclass(frozen=True)
class Chunk:
    """Rows that run together: S segments, one after another, in n rows.

    Rows of K/V are counted over the `kept` rows that the chunk begins with, followed by its own n.

    Attributes:
        tokens: (n,) int64, each row's index into the flat ids.
        positions: (n,) int64, each row's position in its text.
        cu_seqlens: (S + 1,) int32, segment s is rows cu_seqlens[s] to cu_seqlens[s + 1].
        prefix_start, prefix_len: (S,) int32, the range of the pool that stands before segment s; prefix_len is also
            its first position.
        kept: K/V rows that the preceding chunk leaves to this one: its len(keep_rows). With 0, a chunk does not depend
            on any other.
        pool_rows: (P,) int64, the K/V row that each row of the pool is a copy of.
        keep_rows: (kept by the next chunk,) int64, the K/V rows to keep in every layer; all others are done with.
        read_rows: (M,) int64 in [0, n), ascending: the rows whose reward is read. May be empty.
        inputs: int64, the inputs that have all their rows once this chunk has run.
    """

    tokens: np.ndarray
    positions: np.ndarray
    cu_seqlens: np.ndarray
    prefix_start: np.ndarray
    prefix_len: np.ndarray
    kept: int
    pool_rows: np.ndarray
    keep_rows: np.ndarray
    read_rows: np.ndarray
    inputs: np.ndarray

    @property
    def rows(self) -> int:
        """Rows to compute, n."""
        return len(self.tokens)


@dataclass(frozen=True)
class Stats:
    """Sizes of a plan.

    Attributes:
        inputs, distinct: inputs, and those left of them after duplicates.
        tokens: tokens of all inputs.
        rows: tokens that are run.
        chunks: chunks.
        peak_rows: rows of the largest chunk.
        peak_pool: rows of the largest pool (one layer at a time).
        peak_kept: most rows kept from one chunk for the next (in every layer).
    """

    inputs: int
    distinct: int
    tokens: int
    rows: int
    chunks: int
    peak_rows: int
    peak_pool: int
    peak_kept: int

    @property
    def saved(self) -> float:
        """Share of the tokens that need not be run, 0 to 1."""
        return 1 - self.rows / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class Plan:
    """Chunks in the order in which they run: `for chunk in plan`, `plan[c]`, `len(plan)`.

    Attributes:
        read_index: where each read is among the `read_rows` of all chunks, one chunk after another: (N,) int64 for
            read="last" and positions; (T,) for read="all", one for each token of the flat ids.
        order: (N,) int64, the inputs in the order in which they finish.
        cu_inputs: (C + 1,) int64, chunk c finishes inputs order[cu_inputs[c] : cu_inputs[c + 1]]; order[cu_inputs[c] :]
            is what is left to plan anew if chunk c fails.
        cu_reads: (C + 1,) int64, chunk c's reads are cu_reads[c] to cu_reads[c + 1] of all.
        stats: sizes.
    """

    read_index: np.ndarray
    order: np.ndarray
    cu_inputs: np.ndarray
    cu_reads: np.ndarray
    stats: Stats
    _first: np.ndarray  # (N,) int64, each input's first index into the flat ids
    _arrays: _Arrays

    def __len__(self) -> int:
        return len(self.cu_inputs) - 1

    def __iter__(self) -> Iterator[Chunk]:
        return (self[c] for c in range(len(self)))

    def __getitem__(self, c: int) -> Chunk:
        if not 0 <= c < len(self):
            raise IndexError(f"Expected a chunk in [0, {len(self)}), got {c}")
        a = self._arrays
        at = slice(a.cu_segments[c], a.cu_segments[c + 1])
        start = a.start[at]
        lengths = a.stop[at] - start
        cu = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.arange(cu[-1]) - np.repeat(cu[:-1] - start, lengths)
        return Chunk(
            tokens=positions + np.repeat(self._first[a.input[at]], lengths),
            positions=positions,
            cu_seqlens=cu.astype(np.int32),
            prefix_start=a.prefix_start[at],
            prefix_len=start,
            kept=int(a.cu_keep[c] - a.cu_keep[c - 1]) if c else 0,
            pool_rows=a.pool_rows[a.cu_pool[c] : a.cu_pool[c + 1]].astype(np.int64),
            keep_rows=a.keep_rows[a.cu_keep[c] : a.cu_keep[c + 1]].astype(np.int64),
            read_rows=a.read_rows[a.cu_reads[c] : a.cu_reads[c + 1]].astype(np.int64),
            inputs=self.order[self.cu_inputs[c] : self.cu_inputs[c + 1]],
        )


def plan(
    ids: np.ndarray,
    cu_seqlens: np.ndarray,
    *,
    batch_tokens: int,
    keep_tokens: int | None = None,
    pool_tokens: int | None = None,
    min_shared: int | None = 8,
    read: Literal["last", "all"] | np.ndarray = "last",
    strict: bool = False,
) -> Plan:
    """Plans N inputs, given as flat token ids.

    Every token of the prefix trie is run once, with three exceptions. Where a chunk ends inside a tree and more than
    keep_tokens would have to be kept, those beyond it run again in the next chunk. Where a text shares less than
    min_shared tokens more than others around it do (answers that begin with the same word by chance), it shares only
    what they share; and so does one whose prefix no longer fits into the pool of a chunk that is less than half full.
    Duplicates are run once. A chunk prefers to end where little is shared: it gives up to a quarter of its rows to the
    next one for that. A text is cut, its first part kept for the rest, only where a chunk would else be less than half
    full.

    All inputs of a plan may share rows and chunks: where position embeddings depend on a text's length, plan each
    group of equal embeddings by itself. Without causal attention, pass min_shared None, keep_tokens 0 and read "all".

    Args:
        ids: (T,) int32 or int64, token ids of all inputs, in [0, 2³¹).
        cu_seqlens: (N + 1,) int32 or int64, input i is ids[cu_seqlens[i] : cu_seqlens[i + 1]].
        batch_tokens: most rows of a chunk.
        keep_tokens: most K/V rows kept from one chunk for the next, in every layer; default batch_tokens.
        pool_tokens: most K/V rows of a chunk's pool, held for one layer at a time; default 8 · batch_tokens. In nested
            sharing a pool holds the outer prefix once for every inner one, since a segment's range is contiguous.
        min_shared: shortest prefix that is shared; None shares none (duplicates still run once). A prefix costs each of
            its segments a pass over one more block of keys, for which a BOS token is too little. Of 512 preference
            texts (pairs that share their prompt), 1 saves 38.6% of the tokens, 8 saves 37.1%, and 32 saves 35.1%. It is
            also what a prefix must add to one that the pool holds, to be copied there as well.
        read: where rewards are read: "last" token, (N,) positions in the inputs, or "all" tokens. Tokens after the
            position read are not run.
        strict: raise where one text does not fit into the budgets; by default it runs in a chunk of its own, larger
            than batch_tokens.

    Raises:
        ValueError: an argument is out of range, an input is empty, or (strict) a text is longer than batch_tokens +
            min(keep_tokens, pool_tokens).
        TypeError: an array isn't of integers.
    """
    keep_tokens = batch_tokens if keep_tokens is None else keep_tokens
    pool_tokens = 8 * batch_tokens if pool_tokens is None else pool_tokens
    for name, value, least in (
        ("batch_tokens", batch_tokens, 1),
        ("keep_tokens", keep_tokens, 0),
        ("pool_tokens", pool_tokens, 0),
        ("min_shared", 1 if min_shared is None else min_shared, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"Expected {name} to be an int of at least {least}, got {value!r}")
    ids, cu = _integers("ids", ids), _integers("cu_seqlens", cu_seqlens).astype(np.int64)
    if len(cu) == 0 or cu[0] != 0 or cu[-1] != len(ids):
        raise ValueError(f"Expected cu_seqlens to go from 0 to len(ids) = {len(ids)}, got {cu[:1]} to {cu[-1:]}")
    if len(ids) and (ids.min() < 0 or ids.max() >= 2**31):
        raise ValueError(f"Expected ids to be in [0, 2**31), got {ids.min()} to {ids.max()}")
    length = np.diff(cu)
    if len(short := np.flatnonzero(length <= 0)):
        i = short[0]
        raise ValueError(f"Expected every input to have at least one token, got {length[i]} for input {i}")
    if not isinstance(read, str):
        length = _read_lengths(read, length)
    elif read not in ("last", "all"):
        raise ValueError(f'Expected read to be "last", "all" or positions, got {read!r}')
    kept = min(keep_tokens, pool_tokens)
    if strict and len(length) and length.max() > batch_tokens + kept:
        raise ValueError(
            f"Expected batch_tokens + min(keep_tokens, pool_tokens) to be at least {length.max()}, the tokens of input "
            f"{length.argmax()}; got {batch_tokens} + {kept}"
        )
    make = plan_python if _planner is None else _planner.plan
    limit = 2**30  # kept rows and a chunk's own are counted together in int32
    arrays = _Arrays(
        *make(
            np.ascontiguousarray(ids, np.int32),
            cu[:-1],
            length,
            min(int(batch_tokens), limit),
            min(int(kept), limit),
            min(int(pool_tokens), limit),
            limit if min_shared is None else min(int(min_shared), limit),
            isinstance(read, str) and read == "all",
        )
    )
    return Plan(
        read_index=arrays.read_index,
        order=arrays.order,
        cu_inputs=arrays.cu_inputs,
        cu_reads=arrays.cu_reads,
        stats=_stats(arrays, len(ids)),
        _first=cu[:-1],
        _arrays=arrays,
    )


def windows(lengths: Iterable[int]) -> Iterator[range]:
    """Ranges of inputs to plan one after another, for planning in bounded memory however many inputs there are.

    A window ends with the input that brings it to 2²⁴ tokens. Prefixes are shared inside of a window only, so inputs
    that share should stand near each other.

    Args:
        lengths: tokens of each input.
    """
    start = stop = size = 0
    for length in lengths:
        size, stop = size + length, stop + 1
        if size >= _WINDOW_TOKENS:
            yield range(start, stop)
            start, size = stop, 0
    if start < stop:
        yield range(start, stop)


@dataclass(frozen=True)
class _Arrays:
    """A plan as the planners return it; cu_* are (C + 1,) int64."""

    input: np.ndarray  # (segments,) int64
    start: np.ndarray  # (segments,) int32, first position
    stop: np.ndarray  # (segments,) int32
    prefix_start: np.ndarray  # (segments,) int32
    cu_segments: np.ndarray
    pool_rows: np.ndarray  # int32
    cu_pool: np.ndarray
    keep_rows: np.ndarray  # int32
    cu_keep: np.ndarray
    read_rows: np.ndarray  # int32
    cu_reads: np.ndarray
    read_index: np.ndarray  # int64
    order: np.ndarray  # (N,) int64
    cu_inputs: np.ndarray
    distinct: int


def _integers(name: str, array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"Expected {name} to be a 1-D array of integers, got {array.ndim}-D of {array.dtype}")
    return array.astype(np.int64) if array.dtype.kind != "i" else array


def _read_lengths(read: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Tokens to run of each input that is read at a position."""
    read = _integers("read", read)
    if len(read) != len(length):
        raise ValueError(f"Expected one read position for each of {len(length)} inputs, got {len(read)}")
    if len(bad := np.flatnonzero((read < 0) | (read >= length))):
        i = bad[0]
        raise ValueError(f"Expected read to be in [0, {length[i]}) for input {i}, got {read[i]}")
    return read.astype(np.int64) + 1


def _stats(a: _Arrays, tokens: int) -> Stats:
    rows = np.concatenate([[0], np.cumsum(a.stop - a.start, dtype=np.int64)])[a.cu_segments]
    return Stats(
        inputs=len(a.order),
        distinct=a.distinct,
        tokens=tokens,
        rows=int(rows[-1]),
        chunks=len(rows) - 1,
        peak_rows=int(np.diff(rows).max(initial=0)),
        peak_pool=int(np.diff(a.cu_pool).max(initial=0)),
        peak_kept=int(np.diff(a.cu_keep).max(initial=0)),
    )
