"""Which layout a file has, by its columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rmfast.arguments import number, word
from rmfast.evaluation.best_of import RewardBench2
from rmfast.evaluation.layout import Layout
from rmfast.evaluation.pairs import Pairs, RewardBench
from rmfast.evaluation.steps import ProcessBench
from rmfast.evaluation.styles import RMBench

LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (ProcessBench(), RewardBench2(), RMBench(), RewardBench(), Pairs())
}  # the first that fits


def layout_of(
    row: Mapping[str, Any], name: str | None = None, step_tag: str | None = None, threshold: float | None = None
) -> Layout:
    """The layout called `name`, or the one that a row's columns are of; of steps, with their tag and threshold.

    Raises:
        ValueError: there is no such layout, or none that fits; steps have no tag, or others have one.
    """
    layout = _named(row, name)
    if isinstance(layout, ProcessBench):
        if not step_tag:
            raise ValueError(
                "Expected step_tag with the layout processbench, the token behind each step at which the model is read "
                "(Qwen2.5-Math-PRM: <extra_0>)"
            )
        return ProcessBench(step_tag, None if threshold is None else number("threshold", threshold))
    if step_tag is not None or threshold is not None:
        raise ValueError(
            f"Expected no step_tag and threshold with rows of the layout {layout.name}, which has no steps"
        )
    return layout


def _named(row: Mapping[str, Any], name: str | None) -> Layout:
    if name is not None:
        return LAYOUTS[word("layout", name, LAYOUTS)]
    for layout in LAYOUTS.values():
        if layout.fits(row):
            return layout
    raise ValueError(
        f"Expected rows of one of the layouts {', '.join(LAYOUTS)} (docs/evaluate.md), got columns "
        f"{', '.join(map(str, row)) or 'none'}"
    )
