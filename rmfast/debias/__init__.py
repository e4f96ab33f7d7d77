"""Biases of a reward model: measured on pairs, traced to the neurons that carry them, and taken out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from rmfast.debias.measure import ATTRIBUTES, Attribute, Attributes, Report, Row, attributes, plot, report

if TYPE_CHECKING:
    from rmfast.debias.cirm import CHOICES as CHOICES
    from rmfast.debias.cirm import fit as fit
    from rmfast.debias.neurons import Neurons as Neurons
    from rmfast.debias.neurons import localise as localise

# What runs a model is loaded at first use: attributes and reports of known rewards need none.
_HOME = {
    "CHOICES": "rmfast.debias.cirm",
    "Neurons": "rmfast.debias.neurons",
    "fit": "rmfast.debias.cirm",
    "localise": "rmfast.debias.neurons",
}

__all__ = [
    "ATTRIBUTES",
    "CHOICES",
    "Attribute",
    "Attributes",
    "Neurons",
    "Report",
    "Row",
    "attributes",
    "fit",
    "localise",
    "plot",
    "report",
]


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'rmfast.debias' has no attribute {name!r}")
