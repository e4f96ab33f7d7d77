"""Binned heads: each attribute as a distribution over bins, weighed by an MLP on the same token (LDL)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rmfast.heads import rowwise
from rmfast.heads.head import Apply, Head, expect_width
from rmfast.heads.linear import Layers, stacked


@dataclass(eq=False, kw_only=True)
class Binned(Head):
    """score = Σ_a w_a Σ_b p_ab b / (B − 1), p_a the softmax over the B bins of attribute a, b from 0 to B − 1.

    Attributes:
        layers: the MLP of A · B outputs, the bins of one attribute after another's.
        gate: the MLP of the A weights w.
        bins: B.
        temperature: of a softmax over w; None for weights as they come.
    """

    layers: Layers
    gate: Layers
    bins: int = 10
    temperature: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_width(self.gate.width, self.width)
        if self.layers.out != self.gate.out * self.bins:
            raise ValueError(
                f"Expected {self.bins} bins for each of {self.gate.out} weights, got {self.layers.out} outputs"
            )

    @property
    def num_labels(self) -> int:
        return 1

    @property
    def width(self) -> int:
        return self.layers.width

    @cached_property
    def _stacked(self) -> tuple[Tensor, Tensor]:
        return stacked(self.layers.first, self.gate.first)

    def values(self, apply: Apply, rows: Callable[[], Tensor]) -> Tensor:
        out = apply(*self._stacked)
        kept = self.layers.weights[0].size(0)
        return torch.cat([self.layers.above(out[:, :kept]), self.gate.above(out[:, kept:])], 1)

    def _parts(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Distributions (M, A, B), their expectations (M, A) and weights (M, A)."""
        kept = self.layers.out
        found = rowwise.softmax(values[:, :kept].unflatten(1, (-1, self.bins)))
        at = torch.linspace(0, 1, self.bins, dtype=torch.float64).to(found)
        weights = values[:, kept:]
        if self.temperature is not None:
            weights = rowwise.softmax(weights / self.temperature)
        return found, rowwise.linear(found, at[None])[..., 0], weights

    def rewards(self, values: Tensor, gates: Tensor | None = None) -> Tensor:
        _, expected, weights = self._parts(values)
        return rowwise.total(expected * weights)[:, None]

    def outputs(self, values: Tensor, gates: Tensor | None = None) -> dict[str, Tensor]:
        bins, expected, weights = self._parts(values)
        return {"scores": self.rewards(values), "rewards": expected, "gates": weights, "bins": bins}
