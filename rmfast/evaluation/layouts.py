"""Which layout a file has, by its columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rmfast.arguments import word
from rmfast.evaluation.best_of import RewardBench2
from rmfast.evaluation.layout import Layout
from rmfast.evaluation.pairs import Pairs, RewardBench
from rmfast.evaluation.styles import RMBench

LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (RewardBench2(), RMBench(), RewardBench(), Pairs())
}  # the first that fits


def layout_of(row: Mapping[str, Any], name: str | None = None) -> Layout:
    """The layout called `name`, or the one that a row's columns are of.

    Raises:
        ValueError: there is no such layout, or none that fits.
    """
    if name is not None:
        return LAYOUTS[word("layout", name, LAYOUTS)]
    for layout in LAYOUTS.values():
        if layout.fits(row):
            return layout
    raise ValueError(
        f"Expected rows of one of the layouts {', '.join(LAYOUTS)} (docs/evaluate.md), got columns "
        f"{', '.join(map(str, row)) or 'none'}"
    )
