"""Two texts of a sweep: which positions correspond, which are patched together, and the cells of the grid."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from rmfast.arguments import indices, sequence, whole, word
from rmfast.patching.sites import Edits
from rmfast.texts.inputs import Encoded

Align = Literal["auto", "strict"] | Mapping[int, int] | Sequence[int]


@dataclass
class Grid:
    """The sites that were asked for: the cells of the result, and an edit for each that may have an effect."""

    axes: list[str]
    shape: tuple[int, ...]
    spans: list[list[int]]  # the token positions of each group, as asked for
    edits: Edits
    cells: Tensor  # (E,) int64, where each edit is in the flat grid
    same: Tensor  # int64, cells of sites that provably change nothing; all others have no partner, or don't exist


@dataclass
class Pair:
    """One base run and what is put into it."""

    base: Encoded
    other: Encoded | None
    base_read: int
    other_read: int
    partner: np.ndarray  # (T,) the other run's position for each of the base's, or -1
    first: int  # tokens before it are the same in both runs
    gates: tuple[int, int] | None = None  # where the gate of a gated head reads, in the base and in the other run


def spans_of(positions: Any, tokens: int) -> list[list[int]]:
    """Groups of positions that are patched together."""
    if positions is None or (isinstance(positions, str) and positions == "all"):
        return [[t] for t in range(tokens)]
    if isinstance(positions, str):
        if positions != "joint":
            raise ValueError(f'Expected positions to be "all", "joint" or a list, got {positions!r}')
        return [list(range(tokens))]
    groups = []
    for item in positions:
        if isinstance(item, slice):
            for bound in (item.start, item.stop, item.step):
                if bound is not None:
                    whole("positions", bound)
            if item.step == 0:
                raise ValueError(f"Expected positions to be slices of other steps than 0, got {item}")
            item = range(*item.indices(tokens))
        groups.append(sorted(indices("positions", item, tokens)))
    if not groups:
        raise ValueError("Expected positions to name at least one")
    return groups


def aligned(base: np.ndarray, other: np.ndarray, align: Align, noising: bool) -> np.ndarray:
    """For each position of the base run the other run's, or -1.

    A map goes from clean to corrupted, as noising does, and its positions may count from the end. In a sequence, -1 is
    no partner, as None is in both.
    """
    if isinstance(align, str):
        word("align, where it is no map of positions,", align, ("auto", "strict"))
        if len(base) == len(other):
            return np.arange(len(base))
        if align == "strict":
            raise ValueError(
                f'Expected texts of equal length with align="strict", got {len(base)} and {len(other)} tokens'
            )
        return align_tokens(base, other)
    mapped = isinstance(align, Mapping)
    pairs = align.items() if mapped else enumerate(sequence("align", align, "a word or a map of positions"))  # type: ignore[union-attr]
    partner = np.full(len(base), -1)
    tokens = (len(base), len(other)) if noising else (len(other), len(base))
    for two in pairs:
        if two[1] is None or (not mapped and whole("align", two[1]) == -1):
            continue
        found = [whole("align", given) for given in two]
        if mapped:
            found = [place + count if place < 0 else place for place, count in zip(found, tokens)]
        if not all(0 <= place < count for place, count in zip(found, tokens)):
            raise ValueError(f"Expected align to map positions inside of the texts, got {two[0]} -> {two[1]}")
        at, to = found if noising else found[::-1]
        if partner[at] >= 0:
            raise ValueError(f"Expected align to give each position one partner, got two for {at} of the base run")
        partner[at] = to
    return partner


def align_tokens(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """For each token of base (T,) its partner's position in other, or -1.

    What both begin and end with is matched; inside of the span that differs, the longest common runs of tokens
    (difflib), and what is replaced by as many other tokens, one to one.
    """
    shared = min(len(base), len(other))
    differ = np.flatnonzero(base[:shared] != other[:shared])
    head = int(differ[0]) if len(differ) else shared
    differ = np.flatnonzero(base[::-1][: shared - head] != other[::-1][: shared - head])
    tail = int(differ[0]) if len(differ) else shared - head
    partner = np.full(len(base), -1)
    partner[:head] = np.arange(head)
    partner[len(base) - tail :] = np.arange(len(other) - tail, len(other))
    a, b = base[head : len(base) - tail].tolist(), other[head : len(other) - tail].tolist()
    for tag, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag == "equal" or (tag == "replace" and a1 - a0 == b1 - b0):
            partner[head + a0 : head + a1] = np.arange(head + b0, head + b1)
    return partner
