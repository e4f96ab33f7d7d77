"""Losses of reward models (`rmfast.training.losses`)."""

from rmfast.training.losses import (
    REDUCTIONS,
    bin_factor,
    binned_mmd,
    bradley_terry,
    correlation_penalty,
    linear_value_loss,
    tcrm_loss,
)

__all__ = [
    "REDUCTIONS",
    "bin_factor",
    "binned_mmd",
    "bradley_terry",
    "correlation_penalty",
    "linear_value_loss",
    "tcrm_loss",
]
