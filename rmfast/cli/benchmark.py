"""Rows of a benchmark as what a run scores, and the figures of what it has written."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmfast.cli.options import ModelOptions, Options, chosen_backend, encoding_of, load_model
from rmfast.cli.run import Run
from rmfast.evaluation.data import cells_of, rows_of
from rmfast.evaluation.evaluate import evaluated
from rmfast.evaluation.layout import Layout
from rmfast.evaluation.layouts import layout_of
from rmfast.evaluation.parity import Parity, parity
from rmfast.evaluation.result import Evaluation
from rmfast.interventions import load
from rmfast.texts.columns import BadRow
from rmfast.texts.tables import Row, dump_line, kind_of, read_rows

SCORES = "scores"  # the column


class BenchmarkRows:
    """What a run scores of a benchmark's rows: the texts of each item, whose scores become one column."""

    def __init__(self, layout: Layout, subset_column: str | None) -> None:
        self.layout, self.subset_column = layout, subset_column

    def new_columns(self) -> list[str]:
        return [SCORES]

    def inputs(self, row: Row) -> list[Any]:
        if taken := [name for name in (SCORES, "error") if name in row.data]:
            raise BadRow(f"has a column {taken[0]!r} of its own: rename it")
        try:
            return list(self.layout.item(cells_of(row, self.subset_column)).inputs)
        except ValueError as error:
            raise BadRow(str(error)) from None

    def cells(self, model: Any, row: Row, results: list[tuple[Any, Any]]) -> dict[str, Any]:
        return {SCORES: self.layout.scores_of([result for _, result in results])}


class BenchmarkRun(Run):
    """A run over a benchmark's rows, by the method of their layout."""

    def __init__(
        self, options: Options, layout: Layout, subset_column: str | None, step_tag: str | None,
        interventions: list[Path],
    ) -> None:  # fmt: skip
        super().__init__(
            "evaluate", options, SCORES, interventions=interventions,
            layout=lambda *_: BenchmarkRows(layout, subset_column), layout_name=layout.name, step_tag=step_tag,
        )  # fmt: skip
        self.of = layout

    def arguments(self, model: Any) -> dict[str, Any]:
        self.of.expect(model)
        return self.of.arguments(model)


def as_lines(files: Sequence[Path], path: Path) -> Path:
    """All rows as one JSONL file, which is read again and again, and whose digest a resumed run must match."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for row in rows_of(files):
            if row.error:
                raise ValueError(f"line {row.line}: {row.error}")
            file.write(dump_line(row.data))
    return path


def first_layout(
    path: Path, name: str | None, step_tag: str | None, threshold: float | None, subset_column: str | None
) -> Layout:
    """The layout called `name`, or that of the first readable row; of steps, with their tag and threshold."""
    row = next((row for row in read_rows(path) if not row.error), None)
    if row is None:
        raise ValueError(f"Expected {path.name} to hold at least one row, got none")
    return layout_of(cells_of(row, subset_column), name, step_tag, threshold)


def figures_of(layout: Layout, options: Options, subset_column: str | None, **bootstrap: Any) -> Evaluation:
    """The figures of the rows that a run has written; those with an error are left out."""
    typed = kind_of(options.input) != "csv"
    items, scores, places, left_out = [], [], [], 0
    for place, row in enumerate(read_rows(options.output)):
        if row.data.get(SCORES) is None:
            left_out += 1
            continue
        items.append(layout.item(cells_of(dataclasses.replace(row, typed=typed), subset_column)))
        scores.append(row.data[SCORES])
        places.append(place)
    return evaluated(layout, items, scores, places=places, left_out=left_out, **bootstrap)


def parity_of(found: Evaluation, options: ModelOptions, interventions: list[Path], count: int, seed: int) -> Parity:
    """How far the scores of some texts, drawn by `seed`, move between ways to score them."""
    texts = [text for item in found.items for text in item.inputs]
    scores = np.concatenate(list(found.scores))
    some = np.sort(np.random.default_rng(seed).permutation(len(texts))[:count])
    model = load_model(options)
    if interventions:
        model = model.with_interventions(*map(load, interventions))
    with chosen_backend(options):
        return parity(model, [texts[i] for i in some], scores=scores[some], **encoding_of(options))
