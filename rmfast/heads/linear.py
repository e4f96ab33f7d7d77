"""Linear heads, and layers on top of each other: `score`, `v_head`, `regression_head`, `value_head`, `v_head.summary`.

UltraRM, Eurus, Starling, Athene, OpenRLHF, value heads of TRL, LlamaFactory and Skywork-o1-PRM, GRM; with ReLU between
the layers INF-ORM and GRM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from rmfast.heads import rowwise
from rmfast.heads.head import Apply, Head, LinearMap, activation_of, expect_layer

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": functional.leaky_relu,  # the slope of nn.LeakyReLU, 0.01
    "selu": torch.selu,
}


def stacked(*layers: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    """Weights (n_i, d) and biases (n_i,) or None of several layers on the same rows, as one layer's."""
    dtype = torch.promote_types(layers[0][0].dtype, layers[-1][0].dtype)
    with torch.inference_mode(False):  # kept, and autograd may save them
        biases = [weight.new_zeros(weight.size(0)) if bias is None else bias for weight, bias in layers]
        return torch.cat([weight.to(dtype) for weight, _ in layers]), torch.cat([bias.to(dtype) for bias in biases])


@dataclass(eq=False, kw_only=True)
class Linear(Head):
    """rewards = W x + b.

    Attributes:
        weight: (K, d).
        bias: (K,) or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_layer(self.weight, self.bias)

    @property
    def num_labels(self) -> int:
        return self.weight.size(0)

    @property
    def width(self) -> int:
        return self.weight.size(1)

    @property
    def step_activation(self) -> str | None:
        return activation_of(self.num_labels)

    def values(self, apply: Apply, rows: Callable[[], Tensor]) -> Tensor:
        return apply(self.weight, self.bias)

    def rewards(self, values: Tensor, gates: Tensor | None = None) -> Tensor:
        return values

    def linear(self) -> LinearMap:
        return LinearMap(self.weight, self.bias)


@dataclass(eq=False, kw_only=True)
class Layers:
    """Linear layers with an activation between each two: what a row becomes in an MLP, or in a gate.

    Attributes:
        weights, biases: of each layer, (n_i, n_{i-1}) and (n_i,) or None.
        activation: a name in `ACTIVATIONS`.
    """

    weights: list[Tensor]
    biases: list[Tensor | None]
    activation: str = "relu"

    def __post_init__(self) -> None:
        if not self.weights or len(self.weights) != len(self.biases):
            raise ValueError(
                f"Expected a weight and a bias (or None) for each layer, got {len(self.weights)} and {len(self.biases)}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"Expected activation to be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            expect_layer(weight, bias, f"weights[{i}]")
        for below, above in zip(self.weights, self.weights[1:]):
            if above.size(1) != below.size(0):
                raise ValueError(
                    "Expected layers of a head that fit each other, got weights of shapes "
                    f"{[tuple(weight.shape) for weight in self.weights]}"
                )

    @property
    def first(self) -> tuple[Tensor, Tensor | None]:
        return self.weights[0], self.biases[0]

    @property
    def width(self) -> int:
        """d, of the rows."""
        return self.weights[0].size(1)

    @property
    def out(self) -> int:
        return self.weights[-1].size(0)

    def above(self, x: Tensor) -> Tensor:
        """(M, n_0), what the first layer has made of rows, through the others: (M, out)."""
        for weight, bias in zip(self.weights[1:], self.biases[1:]):
            x = rowwise.linear(rowwise.each(ACTIVATIONS[self.activation], x), weight, bias)
        return x

    def to(self, device: torch.device) -> Layers:
        biases = [None if bias is None else bias.to(device) for bias in self.biases]
        return replace(self, weights=[weight.to(device) for weight in self.weights], biases=biases)

    def tensors(self) -> dict[str, Tensor]:
        named = {f"{i}.weight": weight for i, weight in enumerate(self.weights)}
        return named | {f"{i}.bias": bias for i, bias in enumerate(self.biases) if bias is not None}


@dataclass(eq=False, kw_only=True)
class MLP(Head):
    """rewards = W_n σ(... σ(W_1 x + b_1)) + b_n."""

    layers: Layers

    @property
    def num_labels(self) -> int:
        return self.layers.out

    @property
    def width(self) -> int:
        return self.layers.width

    @property
    def step_activation(self) -> str | None:
        return activation_of(self.num_labels)

    def values(self, apply: Apply, rows: Callable[[], Tensor]) -> Tensor:
        return self.layers.above(apply(*self.layers.first))

    def rewards(self, values: Tensor, gates: Tensor | None = None) -> Tensor:
        return values
