"""Biases of a reward model: measured on pairs, traced to the neurons that carry them, and taken out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from rmfast.debias.measure import ATTRIBUTES, Attribute, Attributes, Report, Row, attributes, plot, report

if TYPE_CHECKING:
    from rmfast.debias.cirm import fit as fit
    from rmfast.debias.neurons import Neurons as Neurons
    from rmfast.debias.neurons import localise as localise
    from rmfast.debias.search import CHOICES as CHOICES
    from rmfast.debias.search import SHARES as SHARES
    from rmfast.debias.validation import Validation as Validation
    from rmfast.debias.validation import validate as validate

# What runs a model is loaded at first use: attributes and reports of known rewards need none.
_HOME = {
    "CHOICES": "rmfast.debias.search",
    "Neurons": "rmfast.debias.neurons",
    "SHARES": "rmfast.debias.search",
    "Validation": "rmfast.debias.validation",
    "fit": "rmfast.debias.cirm",
    "localise": "rmfast.debias.neurons",
    "validate": "rmfast.debias.validation",
}

__all__ = [
    "ATTRIBUTES",
    "CHOICES",
    "SHARES",
    "Attribute",
    "Attributes",
    "Neurons",
    "Report",
    "Row",
    "Validation",
    "attributes",
    "fit",
    "localise",
    "plot",
    "report",
    "validate",
]


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'rmfast.debias' has no attribute {name!r}")
