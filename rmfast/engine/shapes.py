"""A chunk's index arrays, and the sizes to which they are padded: by tiles, or for a graph that many chunks fit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rmfast.engine.invariance import padding
from rmfast.engine.planner import Chunk

# Least rows, suffixes and rows of a pool of a rounded shape.
_ROWS, _SUFFIXES, _POOL = 64, 16, 256


@dataclass(frozen=True)
class Shape:
    """Sizes of a chunk's arrays.

    Attributes:
        rows: n.
        suffixes: S, one or more of them padding.
        pool: rows of the pool, P.
        reads: rows that are read, M; None: all.
    """

    rows: int
    suffixes: int
    pool: int
    reads: int | None

    @classmethod
    def of(cls, chunk: Chunk, tile: int) -> Shape:
        """The least one whose rows, and rows that are read, are multiples of a tile."""
        reads = len(chunk.read_rows) if len(chunk.read_rows) < chunk.rows else None
        more, more_reads = padding(chunk.rows, reads, tile)
        return cls(
            chunk.rows + more, len(chunk.prefix_len) + 1, len(chunk.pool_rows),
            None if reads is None else reads + more_reads,
        )  # fmt: skip

    @classmethod
    def rounded(cls, chunk: Chunk, tile: int) -> Shape:
        """One of few: rows by eighths of a power of 2, the others powers of 2, all multiples of a tile (itself one).

        3 to 5% of a data set's rows are padding. As many rows are read as there are suffixes: plans read one of each,
        or all rows.
        """
        some = len(chunk.read_rows) < chunk.rows
        suffixes = _power(max(len(chunk.prefix_len) + 1, len(chunk.read_rows) if some else 0), _SUFFIXES)
        reads = max(suffixes, tile)
        least = chunk.rows + (reads - len(chunk.read_rows) if some else 0)  # what is read is a row, also of padding
        step = max(_ROWS, tile, _power(least, 1) // 16)
        pool = _power(len(chunk.pool_rows), _POOL) if len(chunk.pool_rows) else 0
        return cls(-(-least // step) * step, suffixes, pool, reads if some else None)


def _power(count: int, least: int) -> int:
    """The first power of 2 at or above both; `least` is one."""
    return max(least, 1 << max(0, count - 1).bit_length())


def arrays(ids: np.ndarray, chunk: Chunk, shape: Shape) -> list[np.ndarray]:
    """A chunk's cu_seqlens, prefix_start, prefix_len, token ids, positions, pool_rows and keep_rows, and where not all
    rows are read read_rows and cu_reads.

    All but keep_rows are padded to a shape by suffixes of their own, that no row of the chunk sees: short ones, since
    attention takes the square of a suffix's rows.
    """
    more, suffixes = shape.rows - chunk.rows, shape.suffixes - len(chunk.prefix_len)
    ends = chunk.rows + more * np.arange(1, suffixes + 1) // suffixes
    cu_seqlens = np.append(chunk.cu_seqlens, ends).astype(np.int32)
    start, length = (np.append(x, np.zeros(suffixes)).astype(np.int32) for x in (chunk.prefix_start, chunk.prefix_len))
    none = np.zeros(more, np.int64)
    tokens, positions = np.append(ids[chunk.tokens].astype(np.int64), none), np.append(chunk.positions, none)
    pool = np.append(chunk.pool_rows, np.zeros(shape.pool - len(chunk.pool_rows), np.int64))
    made = [cu_seqlens, start, length, tokens, positions, pool, chunk.keep_rows]
    if shape.reads is not None:
        # The last rows of the last suffixes, as attention wants them of each.
        first = shape.rows - (shape.reads - len(chunk.read_rows))
        reads = np.append(chunk.read_rows, np.arange(first, shape.rows))
        made += [reads, np.searchsorted(reads, cu_seqlens).astype(np.int32)]
    return made
