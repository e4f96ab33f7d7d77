"""A model on a benchmark's rows: scores of all texts in one run, and the figures of their layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rmfast import arguments
from rmfast.evaluation.data import cells_of, given_rows
from rmfast.evaluation.layout import Item, Layout
from rmfast.evaluation.layouts import layout_of
from rmfast.evaluation.result import Evaluation, figures

if TYPE_CHECKING:
    from rmfast.engine.scorer import Scorer


def evaluate(
    rm: Scorer,
    data: str | Path | Iterable[Mapping[str, Any]],
    *,
    layout: str | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    **scoring: Any,
) -> Evaluation:
    """Score a benchmark and compute its figures, with intervals of a bootstrap over prompts.

    Args:
        rm: a model of one reward; with interventions too.
        data: a file (JSONL, CSV, Parquet, or a JSON array), a published benchmark by name
            (`rmfast.evaluation.PUBLISHED`), or rows as mappings.
        layout: "pairs", "rewardbench", "rewardbench2" or "rm-bench"; default by the columns of the first row
            (docs/evaluate.md).
        resamples, confidence, seed: of the bootstrap.
        scoring: arguments of `RewardModel.score`: batch_tokens, max_length, truncation, format, engine, progress, ...

    Returns:
        An `Evaluation`.

    Raises:
        ValueError: a row differs from the layout (the message has its line), there are none, or the model has several
            rewards.
        InputError: a text can't be scored; `.index` is its place among all rows' texts.
    """
    expect_one_reward(rm)
    of, items = read_items(given_rows(data), layout)
    flat = rm.score([text for item in items for text in item.inputs], **scoring).double().numpy()
    ends = np.cumsum([len(item.inputs) for item in items])[:-1]
    return evaluated(of, items, np.split(flat, ends), resamples=resamples, confidence=confidence, seed=seed)


def expect_one_reward(rm: Any) -> None:
    """TypeError for what is no model, ValueError for a model of several rewards."""
    from rmfast.engine.scorer import Scorer  # not before a model is there

    if arguments.instance("rm", rm, Scorer).num_labels != 1:
        raise ValueError(
            f"Expected a model of one reward, got one of {rm.num_labels}: responses have no order under several"
        )


def read_items(rows: Iterable[Any], name: str | None = None) -> tuple[Layout, list[Item]]:
    """The layout (called `name`, or that of the first row) and the items of `rmfast.texts.tables.Row`s."""
    layout: Layout | None = None
    items = []
    for row in rows:
        try:
            cells = cells_of(row)
            layout = layout or layout_of(cells, name)
            items.append(layout.item(cells))
        except ValueError as error:
            raise ValueError(f"line {row.line}: {error}") from None
    if layout is None:
        raise ValueError("Expected data with at least one row, got none")
    return layout, items


def evaluated(
    layout: Layout,
    items: Sequence[Item],
    scores: Sequence[Any],
    *,
    places: Sequence[int] | None = None,
    left_out: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Evaluation:
    """The figures of items whose scores are known: one sequence of finite numbers for each."""
    bootstrap: dict[str, Any] = {
        "resamples": arguments.whole("resamples", resamples, 1),
        "confidence": arguments.number("confidence", confidence, 0, 1, above=True, below=True),
        "seed": arguments.whole("seed", seed, 0),
    }
    if not items:
        raise ValueError("Expected at least one row with scores, got none")
    found = [arguments.finite(f"scores[{i}]", each, len(items[i].inputs)) for i, each in enumerate(scores)]
    at = np.arange(len(items)) if places is None else np.asarray(places, np.int64)
    rows = figures(layout, items, found, **bootstrap)
    return Evaluation(
        rows, bootstrap["confidence"], layout, items, found, at, left_out, bootstrap["resamples"], bootstrap["seed"]
    )
