"""Gaussian heads: each attribute as a mean and a spread, weighed by an MLP on the same token (URM)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rmfast.heads import rowwise
from rmfast.heads.head import Apply, Head, LinearMap, expect_layer, expect_width
from rmfast.heads.linear import Layers, stacked

HELPSTEER = tuple(
    f"helpsteer-{name}" for name in ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
)


@dataclass(eq=False, kw_only=True)
class Gaussian(Head):
    """score = Σ_a w_a μ_a, of 2A outputs μ_1, s_1, μ_2, s_2, ... and weights w = MLP(x), which are not normalised.

    What a model makes of s for its spread (exp, softplus) is not used here: `outputs` has s as it is.

    Attributes:
        weight: (2A, d).
        bias: (2A,) or None.
        gate: the MLP, of A outputs.
    """

    weight: Tensor
    bias: Tensor | None = None
    gate: Layers

    mixes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_layer(self.weight, self.bias)
        expect_width(self.gate.width, self.width)
        if self.weight.size(0) != 2 * self.gate.out:
            raise ValueError(
                f"Expected a mean and a spread for each of {self.gate.out} weights, got {self.weight.size(0)} outputs"
            )

    @property
    def num_labels(self) -> int:
        return 1

    @property
    def width(self) -> int:
        return self.weight.size(1)

    @cached_property
    def _stacked(self) -> tuple[Tensor, Tensor]:
        return stacked((self.weight, self.bias), self.gate.first)

    def values(self, apply: Apply, rows: Callable[[], Tensor]) -> Tensor:
        out = apply(*self._stacked)
        kept = self.weight.size(0)
        return torch.cat([out[:, :kept], self.gate.above(out[:, kept:])], 1)

    def _parts(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means, spreads and weights, (M, A) each."""
        kept = self.weight.size(0)
        return values[:, :kept:2], values[:, 1:kept:2], values[:, kept:]

    def rewards(self, values: Tensor, gates: Tensor | None = None) -> Tensor:
        means, _, weights = self._parts(values)
        return rowwise.total(means * weights)[:, None]

    def outputs(self, values: Tensor, gates: Tensor | None = None) -> dict[str, Tensor]:
        means, spreads, weights = self._parts(values)
        return {"scores": self.rewards(values), "rewards": means, "spreads": spreads, "gates": weights}

    def linear(self) -> LinearMap:
        return LinearMap(weight=self.weight[::2], bias=None if self.bias is None else self.bias[::2])

    def mixed(self, values: Tensor, gates: Tensor | None = None) -> Tensor:
        return self._parts(values)[2][:, None]
