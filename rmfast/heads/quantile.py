"""Quantile heads: each attribute as Q quantiles, whose mean is its reward (QRM)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rmfast.heads import rowwise
from rmfast.heads.gated import Gated
from rmfast.heads.head import LinearMap


@dataclass(eq=False, kw_only=True)
class Quantile(Gated):
    """A gated head whose attributes are means of Q quantiles. `outputs` has the score's own, Σ_k g_k (q T)_k, (M, Q).

    Attributes:
        weight: (A · Q, d), the quantiles of one attribute after another's.
        quantiles: Q.
    """

    quantiles: int

    def __post_init__(self) -> None:
        if not isinstance(self.quantiles, int) or self.quantiles < 1 or len(self.weight) % self.quantiles:
            raise ValueError(
                f"Expected quantiles to divide the {len(self.weight)} outputs of weight, got {self.quantiles!r}"
            )
        super().__post_init__()

    @property
    def attributes(self) -> int:
        return self.weight.size(0) // self.quantiles

    def _attributes(self, out: Tensor) -> Tensor:
        means = rowwise.total(out.unflatten(1, (-1, self.quantiles))) / self.quantiles
        return torch.cat([out, means], 1)

    def _parts(self, values: Tensor, gates: Tensor | None) -> tuple[Tensor, Tensor]:
        attributes, weights = super()._parts(values, gates)
        return attributes[:, self.weight.size(0) :], weights

    def outputs(self, values: Tensor, gates: Tensor | None = None) -> dict[str, Tensor]:
        found = super().outputs(values, gates)
        each = values[:, : self.weight.size(0)].unflatten(1, (-1, self.quantiles)).transpose(1, 2)  # (M, Q, A)
        adjusted = rowwise.linear(each, self.transform.T)
        return found | {"quantiles": rowwise.total(found["gates"][:, None] * adjusted)}

    def linear(self) -> LinearMap | None:
        weight, bias = self.weight.unflatten(0, (-1, self.quantiles)), self.bias
        wide = torch.promote_types(weight.dtype, torch.float32)
        return LinearMap(
            weight=weight.to(wide).mean(1),
            bias=None if bias is None else bias.to(wide).unflatten(0, (-1, self.quantiles)).mean(1),
        )
