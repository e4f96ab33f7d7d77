"""Triton's interpreter with the programs of a launch in random order, and the addresses that two of them write.

A GPU runs programs in any order and many at once. The interpreter runs them in one: a kernel of which one program reads
what another writes, or two write one place, passes there all the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder


@dataclass
class Launches:
    """What the launches so far did: how many programs ran, and the addresses that more than one of a launch wrote."""

    programs: int = 0
    conflicts: int = 0
    _order: list[tuple[int, int, int]] = field(default_factory=list)
    _written: list[np.ndarray] = field(default_factory=list)
    _by: list[int] = field(default_factory=list)

    def begin(self, grid: tuple[int, int, int], order: random.Random) -> None:
        self.end()
        self._order = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        order.shuffle(self._order)

    def next(self) -> tuple[int, int, int]:
        self.programs += 1
        return self._order.pop()

    def wrote(self, addresses: np.ndarray) -> None:
        self._written.append(addresses)
        self._by.append(self.programs)

    def end(self) -> None:
        if self._written:
            addresses = np.concatenate(self._written)
            programs = np.repeat(self._by, [len(written) for written in self._written])
            once = np.unique(np.stack([addresses, programs.astype(addresses.dtype)]), axis=1)[0]
            self.conflicts += len(once) - len(np.unique(once))
        self._written, self._by = [], []


@contextmanager
def shuffled(seed: int) -> Iterator[Launches]:
    """Runs what is launched inside in an order drawn with this seed."""
    launches, order = Launches(), random.Random(seed)
    builder = InterpreterBuilder
    set_dim, set_index, store = builder.set_grid_dim, builder.set_grid_idx, builder.create_masked_store

    def dim(self, *grid):
        launches.begin(grid, order)
        set_dim(self, *grid)

    def masked_store(self, pointers, value, mask, *rest):
        launches.wrote(np.atleast_1d(pointers.data)[np.atleast_1d(mask.data).astype(bool)].reshape(-1))
        return store(self, pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_dim", dim)
        patch.setattr(builder, "set_grid_idx", lambda self, *at: set_index(self, *launches.next()))
        patch.setattr(builder, "create_masked_store", masked_store)
        yield launches
        launches.end()
