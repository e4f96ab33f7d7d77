"""Concepts: directions of a model's activations, what they tell apart, and what they do to the reward."""

from rmfast.concepts.activations import activations
from rmfast.concepts.concept import Concept, Interval, fit
from rmfast.concepts.dose import Dose, DoseResponse, Selectivity, dose_response, erased
from rmfast.concepts.erasure import Erasure, erase, leace

__all__ = [
    "Concept",
    "Dose",
    "DoseResponse",
    "Erasure",
    "Interval",
    "Selectivity",
    "activations",
    "dose_response",
    "erase",
    "erased",
    "fit",
    "leace",
]
