"""Two-way heads: the probability of "right" among two classes, at the end of each step (Qwen2.5-Math-PRM)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rmfast.heads import rowwise
from rmfast.heads.linear import MLP


@dataclass(eq=False, kw_only=True)
class TwoWay(MLP):
    """reward = softmax(MLP(x))_1, of two logits: in (0, 1), the model's own output. `outputs` has the logits."""

    @property
    def num_labels(self) -> int:
        return 1

    @property
    def step_activation(self) -> str:
        return "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers.out != 2:
            raise ValueError(f"Expected a two-way head to have two outputs, got {self.layers.out}")

    def rewards(self, values: Tensor, gates: Tensor | None = None) -> Tensor:
        return rowwise.each(torch.sigmoid, values[:, 1:] - values[:, :1])

    def outputs(self, values: Tensor, gates: Tensor | None = None) -> dict[str, Tensor]:
        return {"rewards": self.rewards(values), "logits": values}
