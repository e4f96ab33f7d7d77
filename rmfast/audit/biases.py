"""Biases before and after a clamp, which is fitted on some prompts and judged on the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rmfast import debias
from rmfast.audit.data import Bias, Biases, Clamp, Span, span
from rmfast.audit.measures import rewards_of
from rmfast.debias.apply import projections
from rmfast.evaluation.evaluate import evaluated
from rmfast.evaluation.layout import Item
from rmfast.evaluation.result import Evaluation
from rmfast.resampling import clusters
from rmfast.texts.pairs import Pair, read_pairs

if TYPE_CHECKING:
    from rmfast.reward_model import RewardModel

_LEAST, _MOST = 8, 500  # pairs of a fit: it refuses fewer, and the paper takes 500


def mapping_of(item: Item) -> dict[str, Any]:
    """The pair of an item, as `rmfast.debias` and `read_pairs` take it."""
    chosen, rejected = item.inputs
    own = {name: value for name, value in chosen.items() if name not in ("prompt", "response")}
    return {**own, "prompt": chosen["prompt"], "chosen": chosen["response"], "rejected": rejected["response"]}


def pairs_of(items: Sequence[Item]) -> list[Pair]:
    """The texts of items."""
    return read_pairs([mapping_of(item) for item in items])


def without_clamp(found: Evaluation, why: str) -> Biases:
    """How the reward follows attributes, over all pairs."""
    report = _report(found, range(len(found.items)), rewards_of(found))
    rows = [_row(row, None) for row in report.rows]
    return {"rows": rows, "pairs": len(found.items), "clamp": None, "why": why}


def with_clamp(
    rm: RewardModel, found: Evaluation, *, trials: int, seed: int,
    running: Mapping[str, Any], encoding: Mapping[str, Any],
) -> Biases:  # fmt: skip
    """Fits a clamp on half of the prompts, of at most 500 pairs, and reports on all other pairs.

    Raises:
        ValueError: there are fewer than 8 pairs in a half, or as for `rmfast.debias.fit`.
        ImportError: Optuna is not installed.
    """
    fitted, held = _halves(found, seed)
    names = _varying(found, fitted)
    most = sum(projections(rm).values())
    choices = [k for k in debias.CHOICES if k <= most // 20] or [max(1, most // 20)]
    given = [mapping_of(found.items[i]) for i in fitted]
    clamp = debias.fit(
        rm, given, attributes=names, trials=trials, choices=choices, seed=seed, **running, **encoding
    )  # fmt: skip
    texts = [text for i in held for text in found.items[i].inputs]
    after = rm.with_interventions(clamp).score(texts, **running, **encoding).double().numpy().reshape(-1, 2)
    before = rewards_of(found)[held]
    reports = [_report(found, held, rewards) for rewards in (before, after)]
    items = [dataclasses.replace(found.items[i], subset="") for i in held]
    bootstrap: dict[str, Any] = {name: getattr(found, name) for name in ("resamples", "confidence", "seed")}
    second, first = (evaluated(found.layout, items, list(rewards), **bootstrap) for rewards in (after, before))
    change = second.minus(first).rows[0]
    about: Clamp = {
        "neurons": len(clamp), "k": dict(clamp.metadata["k"]), "fitted": len(fitted),
        "change": span(change.difference, change.low, change.high, change.n),
    }  # fmt: skip
    rows = [_row(*each) for each in zip(reports[0].rows, reports[1].rows)]
    return {"rows": rows, "pairs": len(held), "clamp": about, "why": ""}


def _halves(found: Evaluation, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of pairs to fit and to judge; those of one prompt are on one side."""
    of = clusters([item.prompt for item in found.items])
    sizes = np.bincount(of)
    order = np.random.default_rng(seed).permutation(len(sizes))
    before = np.cumsum(sizes[order]) - sizes[order]  # pairs in front of each prompt
    chosen = np.isin(of, order[before < min(_MOST, len(of) // 2)])
    fitted, held = np.flatnonzero(chosen)[:_MOST], np.flatnonzero(~chosen)
    if min(len(fitted), len(held)) < _LEAST:
        raise ValueError(
            f"a clamp needs {_LEAST} pairs to fit it and as many of other prompts to judge it, and there are "
            f"{len(fitted)} and {len(held)}"
        )
    return fitted, held


def _varying(found: Evaluation, places: np.ndarray) -> list[str]:
    """The attributes that differ between some texts."""
    pairs = pairs_of([found.items[i] for i in places])
    values = debias.attributes(
        [pair.prompt for pair in pairs for _ in range(2)], [text for p in pairs for text in (p.chosen, p.rejected)]
    )
    names = [name for name in values.names if np.ptp(values[name]) > 0]
    if not names:
        raise ValueError("no attribute (length, paragraphs, ...) differs between any two of the texts")
    return names


def _report(found: Evaluation, places: Any, rewards: np.ndarray) -> debias.Report:
    given = [mapping_of(found.items[i]) for i in places]
    return debias.report(
        None, given, rewards=rewards, resamples=found.resamples, confidence=found.confidence, seed=found.seed
    )


def _row(before: debias.Row, after: debias.Row | None) -> Bias:
    return {
        "attribute": before.attribute,
        "measure": before.measure,
        "before": _span(before),
        "after": None if after is None else _span(after),
    }


def _span(row: debias.Row) -> Span:
    return span(row.value, row.low, row.high, row.n)
