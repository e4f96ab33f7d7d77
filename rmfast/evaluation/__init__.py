"""Benchmarks of reward models: published files and users' own, scored, and the tables people quote with intervals."""

from __future__ import annotations

from rmfast.evaluation.data import PUBLISHED
from rmfast.evaluation.evaluate import evaluate, evaluated, read_items
from rmfast.evaluation.layout import Item
from rmfast.evaluation.layouts import LAYOUTS, layout_of
from rmfast.evaluation.parity import Parity, Way, parity
from rmfast.evaluation.result import Change, Differences, Evaluation, Figure

__all__ = [
    "LAYOUTS",
    "PUBLISHED",
    "Change",
    "Differences",
    "Evaluation",
    "Figure",
    "Item",
    "Parity",
    "Way",
    "evaluate",
    "evaluated",
    "layout_of",
    "parity",
    "read_items",
]
