"""Gated heads: K attributes of the response, weighed by what a gate makes of the prompt (ArmoRM, QRM)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from rmfast.heads import rowwise
from rmfast.heads.head import Apply, Head, LinearMap, expect_layer, expect_width
from rmfast.heads.linear import Layers

# The attributes of ArmoRM's 19 rewards, in order.
ARMORM = (
    "helpsteer-helpfulness", "helpsteer-correctness", "helpsteer-coherence", "helpsteer-complexity",
    "helpsteer-verbosity", "ultrafeedback-overall_score", "ultrafeedback-instruction_following",
    "ultrafeedback-truthfulness", "ultrafeedback-honesty", "ultrafeedback-helpfulness", "beavertails-is_safe",
    "prometheus-score", "argilla-overall_quality", "argilla-judge_lm", "code-complexity", "code-style",
    "code-explanation", "code-instruction-following", "code-readability",
)  # fmt: skip


@dataclass(eq=False, kw_only=True)
class Gated(Head):
    """score = Σ_k g_k (r T)_k: attributes r = W x at the token that is read, g = softmax(MLP(x) / temperature) · scale
    at the gate's.

    The gate's token is the first of the last occurrence of `pattern` in a text: the end of the prompt, which is the
    same for all responses to it, and is run once for them.

    Attributes:
        weight: (A, d).
        bias: (A,) or None.
        transform: T, (A, G).
        gate: the MLP, of G outputs.
        temperature, scale: of the gate's softmax.
        pattern: token ids; () where they are not known yet.
    """

    weight: Tensor
    bias: Tensor | None = None
    transform: Tensor
    gate: Layers
    temperature: float = 10.0
    scale: float = 1.0
    pattern: tuple[int, ...] = ()

    gated = mixes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_layer(self.weight, self.bias)
        expect_width(self.gate.width, self.width)
        if not self.temperature > 0:
            raise ValueError(f"Expected temperature to be a positive number, got {self.temperature!r}")
        wanted = (self.attributes, self.gate.out)
        if tuple(self.transform.shape) != wanted:
            raise ValueError(
                f"Expected the transform of a gated head to be {wanted}, got {tuple(self.transform.shape)}"
            )

    @property
    def attributes(self) -> int:
        """A."""
        return self.weight.size(0)

    @property
    def num_labels(self) -> int:
        return 1

    @property
    def width(self) -> int:
        return self.weight.size(1)

    def values(self, apply: Apply, rows: Callable[[], Tensor]) -> Tensor:
        return self._attributes(apply(self.weight, self.bias))

    def gate_values(self, apply: Apply) -> Tensor:
        return self.gate.above(apply(*self.gate.first))

    def _attributes(self, out: Tensor) -> Tensor:
        return out

    def _parts(self, values: Tensor, gates: Tensor | None) -> tuple[Tensor, Tensor]:
        """The attributes (M, A) of rows, and what the gate makes of theirs (M or 1, G)."""
        if gates is None:
            raise ValueError(
                f"{self.kind} reads two tokens of a text, the prompt's end for its gate and the one that is scored: "
                "there is no reward of one token's stream alone"
            )
        return values[:, : -self.gate.out], self._gate(gates[:, -self.gate.out :])

    def _gate(self, x: Tensor) -> Tensor:
        return rowwise.softmax(x / self.temperature) * self.scale

    def rewards(self, values: Tensor, gates: Tensor | None = None) -> Tensor:
        attributes, weights = self._parts(values, gates)
        return rowwise.total(weights * rowwise.linear(attributes, self.transform.T))[:, None]

    def outputs(self, values: Tensor, gates: Tensor | None = None) -> dict[str, Tensor]:
        attributes, weights = self._parts(values, gates)
        return {"scores": self.rewards(values, gates), "rewards": attributes, "gates": weights.expand(len(values), -1)}

    def linear(self) -> LinearMap | None:
        return LinearMap(weight=self.weight, bias=self.bias)

    def mixed(self, values: Tensor, gates: Tensor | None = None) -> Tensor | None:
        _, weights = self._parts(values, gates)
        return rowwise.linear(weights, self.transform)[:, None].expand(len(values), -1, -1)

    def found(self, pattern: tuple[int, ...]) -> Gated:
        """The head with another pattern."""
        return replace(self, pattern=pattern)
