"""Biases of a reward model: measured on pairs, traced to the neurons that carry them, and taken out."""

from rmfast.debias.cirm import CHOICES, fit
from rmfast.debias.measure import ATTRIBUTES, Attributes, Report, Row, attributes, plot, report
from rmfast.debias.neurons import Neurons, localise

__all__ = [
    "ATTRIBUTES",
    "CHOICES",
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
