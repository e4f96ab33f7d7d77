"""Edits that take a bias out of a reward model (`rmfast.debias.interventions`, `rmfast.debias.apply`)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from rmfast.debias.interventions import (
    LWR,
    Combined,
    DirectionRemoval,
    Intervention,
    LengthCorrection,
    LengthPenalty,
    NeuronClamp,
    load,
)

if TYPE_CHECKING:
    from rmfast.debias.apply import projections as projections

__all__ = [
    "LWR",
    "Combined",
    "DirectionRemoval",
    "Intervention",
    "LengthCorrection",
    "LengthPenalty",
    "NeuronClamp",
    "load",
    "projections",
]


def __getattr__(name: str):
    if name == "projections":  # loads what runs a model; values alone don't need it
        return importlib.import_module("rmfast.debias.apply").projections
    raise AttributeError(f"module 'rmfast.interventions' has no attribute {name!r}")
