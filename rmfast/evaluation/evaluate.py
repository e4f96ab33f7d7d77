"""A model on a benchmark's rows: scores of all texts in one run, and the figures of their layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rmfast import arguments
from rmfast.engine.options import Encoding
from rmfast.evaluation.data import cells_of, given_rows
from rmfast.evaluation.layout import Item, Layout
from rmfast.evaluation.layouts import layout_of
from rmfast.evaluation.result import Evaluation, figures
from rmfast.texts.tables import Row

if TYPE_CHECKING:
    from rmfast.engine.scorer import Scorer


def evaluate(
    rm: Scorer,
    data: str | Path | Iterable[Mapping[str, Any]],
    *,
    layout: str | None = None,
    subset_column: str | None = None,
    step_tag: str | None = None,
    threshold: float | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    **scoring: Any,
) -> Evaluation:
    """Score a benchmark and compute its figures, with intervals of a bootstrap over prompts.

    Args:
        rm: a model of one reward (of steps, also of two classes); with interventions too.
        data: a file (JSONL, CSV, Parquet, or a JSON array), a published benchmark by name
            (`rmfast.evaluation.PUBLISHED`), or rows as mappings.
        layout: "pairs", "rewardbench", "rewardbench2", "rm-bench" or "processbench"; default by the columns of the
            first row (docs/evaluate.md).
        subset_column: the column by which figures are told apart; default the layout's own ("subset").
        step_tag, threshold: of processbench, the token behind each step, and the value under which a step is wrong
            (`rmfast.evaluation.steps.ProcessBench`).
        resamples, confidence, seed: of the bootstrap.
        scoring: arguments of `RewardModel.score`, or of steps `step_scores`: batch_tokens, max_length, truncation,
            format, engine, progress, ...

    Returns:
        An `Evaluation`.

    Raises:
        ValueError: a row differs from the layout (the message has its line), there are none, or the model can't score
            them.
        InputError: a text can't be scored; `.index` is its place among all rows' texts.
    """
    expect_scorer(rm)
    of, items = read_items(given_rows(data), layout, step_tag, threshold, subset_column)
    of.expect(rm)
    encoding = {name: scoring.pop(name) for name in Encoding.__annotations__ if name in scoring}
    encoded = rm.encode([text for item in items for text in item.inputs], **encoding)
    results = getattr(rm, of.method)(encoded, max_length=encoding.get("max_length"), **of.arguments(rm), **scoring)
    scores, start = [], 0
    for item in items:
        end = start + len(item.inputs)
        scores.append(of.scores_of(results[start:end]))
        start = end
    return evaluated(of, items, scores, resamples=resamples, confidence=confidence, seed=seed)


def expect_scorer(rm: Any) -> None:
    """TypeError for what is no model."""
    from rmfast.engine.scorer import Scorer  # not before a model is there

    arguments.instance("rm", rm, Scorer)


def read_items(
    rows: Iterable[Row], name: str | None = None, step_tag: str | None = None, threshold: float | None = None,
    subset_column: str | None = None,
) -> tuple[Layout, list[Item]]:  # fmt: skip
    """The layout (called `name`, or that of the first row) and the items of rows.

    step_tag, threshold, subset_column: as for `evaluate`.
    """
    layout: Layout | None = None
    items = []
    for row in rows:
        try:
            cells = cells_of(row, subset_column)
            layout = layout or layout_of(cells, name, step_tag, threshold)
            items.append(layout.item(cells))
        except ValueError as error:
            raise ValueError(f"data, line {row.line}: {error}") from None
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
    found = [arguments.finite(f"scores[{i}]", each, layout.count(items[i])) for i, each in enumerate(scores)]
    at = np.arange(len(items)) if places is None else np.asarray(places, np.int64)
    rows = figures(layout, items, found, **bootstrap)
    return Evaluation(
        rows, bootstrap["confidence"], layout, items, found, at, left_out, bootstrap["resamples"], bootstrap["seed"]
    )
