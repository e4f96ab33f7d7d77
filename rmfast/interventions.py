"""Edits that take a bias out of a reward model (`rmfast.debias.interventions`, `rmfast.debias.apply`)."""

from rmfast.debias.apply import projections
from rmfast.debias.interventions import (
    LWR,
    Combined,
    DirectionRemoval,
    Intervention,
    LengthPenalty,
    NeuronClamp,
    load,
)

__all__ = ["LWR", "Combined", "DirectionRemoval", "Intervention", "LengthPenalty", "NeuronClamp", "load", "projections"]
